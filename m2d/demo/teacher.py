"""The demo teachers: small language models, trained from nothing on the demo corpus.

One is a Qwen3-MoE; the other, for dense-to-dense baselines, a Qwen3 with as many parameters in all.

Shapes: B sequences per step, T tokens per sequence, H hidden size, I expert intermediate size,
E routed experts, k of them selected per token.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from m2d.artifacts import atomic_path, require_absent
from m2d.demo.corpus import build_corpus
from m2d.distill.heads import Head
from m2d.distill.loss import LossOfRows, apply_head, cross_entropy
from m2d.errors import UserError
from m2d.progress import say
from m2d.refit.muon import Muon

VOCABULARY = 4096
SEQUENCE = 512  # T
BATCH = 16  # B
END_OF_TEXT = "<|endoftext|>"
# What a chat is to a model that has seen documentation alone: text, and it goes on.
CHAT_TEMPLATE = r"{% for message in messages %}{{ message['content'] + '\n\n' }}{% endfor %}"


def train_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, whose one special token ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a saved teacher. Raises UserError if there is none."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json, so not the folder of a demo teacher")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def common_config(eos_token_id: int) -> dict[str, Any]:
    """What both teachers' architectures share."""
    return {
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
    }


def teacher_config(eos_token_id: int = 0) -> Qwen3MoeConfig:
    """The MoE teacher's architecture: 4.94 million parameters, of which 1.5 million are active."""
    return Qwen3MoeConfig(
        **common_config(eos_token_id),
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=256,  # of dense layers, of which there are none: top-k x expert width
        moe_intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )


def dense_teacher_config(eos_token_id: int = 0) -> Qwen3Config:
    """The dense teacher's architecture: 4.94 million parameters, as many as the MoE's.

    It is larger than the MoE's student along every axis: structured pruning has to do on each.
    """
    return Qwen3Config(
        **common_config(eos_token_id),
        hidden_size=224,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=784,
    )


def new_model(dense: bool, eos_token_id: int) -> PreTrainedModel:
    """An untrained teacher."""
    if dense:
        return Qwen3ForCausalLM._from_config(dense_teacher_config(eos_token_id))
    return Qwen3MoeForCausalLM._from_config(
        teacher_config(eos_token_id), experts_implementation="grouped_mm"
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """The token ids of each document, each ended by the end-of-text token."""
    end = tokenizer.eos_token_id
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [np.array([*document, end], dtype=np.int32) for document in ids]


def windows(documents: Sequence[np.ndarray], length: int = SEQUENCE) -> np.ndarray:
    """Documents one after another, cut into non-overlapping windows: [N, length] int32.

    What is left at the end and fills no window is dropped.
    """
    stream = np.concatenate(documents)
    return stream[: len(stream) // length * length].reshape(-1, length)


def batches(documents: Sequence[np.ndarray], seed: int, skip: int) -> Iterator[torch.Tensor]:
    """Endless training batches [B, T], from the batch number `skip` on.

    Each epoch has its own order of the documents, a function of the seed and the epoch alone.
    """
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        shuffled = windows([documents[i] for i in order])
        number = len(shuffled) // BATCH
        for i in range(min(skip, number), number):
            yield torch.from_numpy(shuffled[i * BATCH : (i + 1) * BATCH]).long()
        skip = max(0, skip - number)
        epoch += 1


# --- the balance of the experts -------------------------------------------------------


def balance_loss(logits_NE: torch.Tensor, selected_Nk: torch.Tensor) -> torch.Tensor:
    """The load-balancing loss of one layer: E * sum_e f_e P_e, which is 1 if balanced.

    f_e is expert e's share of all selections, P_e its mean router probability. One layer at a time:
    pooled over the layers, one layer's preference could make up for another's.
    Source: Fedus, Zoph and Shazeer 2022, Switch Transformers, eq. 4-6.
    """
    experts = logits_NE.shape[-1]
    counts = torch.bincount(selected_Nk.flatten(), minlength=experts)
    share_E = counts / selected_Nk.numel()
    probability_E = logits_NE.float().softmax(-1).mean(0)
    return experts * (share_E * probability_E).sum()


def watch_routers(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A list to which layers in turn append router logits [N, E], selected experts [N, k].

    Layers without experts append nothing.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        seen.append((output[0], output[2]))

    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(keep)
    return seen


# --- the optimiser --------------------------------------------------------------------


def make_optimisers(
    model: PreTrainedModel, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embedding, routers and norms."""
    gate_up: list[torch.Tensor] = []
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    vectors: list[torch.Tensor] = []
    for name, p in model.named_parameters():
        if name.endswith("gate_up_proj"):
            gate_up.append(p)
        elif p.ndim >= 2 and "_proj" in name:
            matrices.append(p)
        else:
            (others if p.ndim >= 2 else vectors).append(p)
    groups: list[dict[str, Any]] = [{"params": gate_up, "halves": 2}, {"params": matrices}]
    muon = Muon(groups, learning_rate, weight_decay, torch.bfloat16)
    adam_groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        adam_groups,
        lr=learning_rate,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
    )
    return [muon, adam]


def schedule(step: int, steps: int, warm_up: int = 100, decay: float = 0.5) -> float:
    """Factor of the learning rate: warm-up, constant, then linearly to 0 over the last part.

    Until the decay begins it does not depend on `steps`: a run can be resumed with more steps.
    """
    return min(1.0, (step + 1) / warm_up, (steps - step) / (decay * steps))


# --- training -------------------------------------------------------------------------


def language_model_loss(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, without full logits, which took a third of a step."""
    hidden_NH = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state.flatten(0, 1)
    labels_N = F.pad(tokens_BT[:, 1:], (0, 1), value=-1).flatten()

    def loss_of_chunk(tokens: slice) -> LossOfRows:
        labels_C = labels_N[tokens]
        return lambda z_RV, rows: cross_entropy(z_RV, labels_C[rows])

    total = apply_head(hidden_NH, Head(model.lm_head.weight), loss_of_chunk)
    return total / (labels_N >= 0).sum()


def train_teacher(
    out: Path,
    steps: int = 3000,
    learning_rate: float = 4e-3,
    weight_decay: float = 0.1,
    balance: float = 0.02,
    seed: int = 0,
    checkpoint_minutes: float = 4.0,
    dense: bool = False,
) -> None:
    """Train a demo teacher and write it, with its tokenizer, to the new folder `out`.

    dense: the dense one; else the Mixture-of-Experts. Both see the same tokens in the same order.
    Each step is `BATCH` sequences of `SEQUENCE` tokens. A checkpoint beside `out`
    (`<out>.checkpoint`) lets the same call resume after an interruption; it is removed at the end.
    Raises UserError if `out` exists.
    """
    require_absent(out)
    documents = [d for d in build_corpus() if d.split == "train"]
    tokenizer = train_tokenizer([d.text for d in documents])
    ids = encode(tokenizer, [d.text for d in documents])
    say(f"teacher: {sum(map(len, ids)):,} training tokens")

    torch.manual_seed(seed)
    model = new_model(dense, tokenizer.eos_token_id).train()
    optimisers = make_optimisers(model, learning_rate, weight_decay)
    routers = watch_routers(model)
    checkpoint = out.with_name(out.name + ".checkpoint")
    step = 0
    spent = 0.0  # CPU seconds of this process, over all resumed runs
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, spent = state["step"], state["cpu_seconds"]
        say(f"teacher: resuming at step {step}")

    start, first, saved_at, mean = time.monotonic(), step, time.monotonic(), 0.0
    for tokens in batches(ids, seed, skip=step):
        if step == steps:
            break
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * schedule(step, steps)
        routers.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = language_model_loss(model, tokens)
        unbalance = [balance_loss(*router) for router in routers]  # empty without experts
        (loss + balance * sum(unbalance)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        mean = loss.item() if step == first + 1 else 0.95 * mean + 0.05 * loss.item()
        now = time.monotonic()
        if step % 20 == 0 or step == steps:
            pace = (now - start) / (step - first)  # seconds per step
            worst = f"balance {max(unbalance).item():.3f}, " if unbalance else ""
            say(
                f"teacher: step {step}/{steps}, loss {mean:.3f}, {worst}"
                f"{BATCH * SEQUENCE / pace:,.0f} tokens/s, "
                f"{pace * (steps - step) / 60:.0f} min left"
            )
        if now - saved_at > 60 * checkpoint_minutes and step < steps:
            with atomic_path(checkpoint) as temporary:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimisers": [o.state_dict() for o in optimisers],
                        "step": step,
                        "cpu_seconds": spent + time.process_time(),
                    },
                    temporary,
                )
            saved_at = now
    say(f"teacher: {(spent + time.process_time()) / 3600:.2f} CPU hours")
    save_teacher(model, tokenizer, out)
    checkpoint.unlink(missing_ok=True)


# --- writing ------------------------------------------------------------------------


def save_teacher(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16, in the hub's layout (a tensor per expert), and the tokenizer."""
    copy = type(model)._from_config(model.config)
    copy.load_state_dict(model.state_dict())
    with atomic_path(out) as temporary:
        copy.bfloat16().save_pretrained(temporary)
        (temporary / "model.safetensors").chmod(0o644)
        tokenizer.save_pretrained(temporary)
        # transformers 5 writes names of its own, which it also reads; the hub's are understood by
        # every version and by other software.
        _edit(temporary / "config.json", _hub_names)
        _edit(
            temporary / "tokenizer_config.json",
            lambda c: {
                **{k: v for k, v in c.items() if k not in ("is_local", "local_files_only")},
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
        )


def _hub_names(config: dict[str, Any]) -> dict[str, Any]:
    names = {"num_local_experts": "num_experts"}
    return {names.get(key, key): value for key, value in config.items()}


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    edited = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(edited, indent=2, sort_keys=True) + "\n", encoding="utf-8")
