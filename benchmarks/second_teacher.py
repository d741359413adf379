"""Train a small teacher of another family on the demo corpus, with AdamW, for docs/beyond.md.

A DeepSeek-V2: unlike the demo teacher it has a dense first layer, shared experts, routing weights
that are not renormalised, latent attention, as many experts as DeepSeek-V2-Lite (6 of 64, and 2
shared) and an optimiser that is not Muon. Or a Qwen2-MoE, whose shared expert has a gate that
depends on the token (4 of 32 experts). It takes the steps that fit into the time: minutes on a GPU,
hours on a CPU for the first, half an hour for the second.

    python benchmarks/second_teacher.py CORPUS TOKENIZER_FOLDER OUT --device cuda --minutes 4
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from m2d.demo.teacher import (
    balance_loss,
    batches,
    encode,
    language_model_loss,
    load_tokenizer,
    save_teacher,
    schedule,
    watch_routers,
)
from m2d.devices import compute_dtype
from m2d.options import AUTO

FIRST, PACE = 10, 60  # steps between which the pace is taken


def deepseek_v2(vocabulary: int, end: int) -> DeepseekV2Config:
    return DeepseekV2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        head_dim=16,
        v_head_dim=64,
        first_k_dense_replace=1,
        intermediate_size=512,
        moe_intermediate_size=64,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        norm_topk_prob=False,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def qwen2_moe(vocabulary: int, end: int) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        vocab_size=vocabulary,
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


CONFIGS: dict[str, Callable[[int, int], PreTrainedConfig]] = {
    "deepseek_v2": deepseek_v2,
    "qwen2_moe": qwen2_moe,
}


def step(
    model: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    routers: list[tuple[torch.Tensor, torch.Tensor]],
    tokens: torch.Tensor,
    dtype: torch.dtype,
) -> float:
    routers.clear()
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        loss = language_model_loss(model, tokens)
    unbalance = sum(balance_loss(*router) for router in routers)
    (loss + 0.02 * unbalance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="from m2d demo corpus")
    parser.add_argument("tokenizer", type=Path, help="the demo teacher's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=CONFIGS, default="deepseek_v2")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    lines = (args.corpus / "train.jsonl").read_text(encoding="utf-8").splitlines()
    documents = encode(tokenizer, [json.loads(line)["text"] for line in lines])
    torch.manual_seed(0)
    own = CONFIGS[args.kind](len(tokenizer), tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(own, experts_implementation="grouped_mm").train()
    dtype = compute_dtype(AUTO, torch.bfloat16, torch.device(args.device))
    model.to(args.device)
    for name, parameter in model.named_parameters():
        if name.endswith(".gate.weight"):  # the class begins with zeros, which rank no experts
            torch.nn.init.normal_(parameter, std=own.initializer_range)
    optimiser = torch.optim.AdamW(
        model.parameters(), args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    routers = watch_routers(model)
    # As many steps as fit, by the pace of the first; until then the rate does not depend on them.
    start, mean, steps = time.monotonic(), 0.0, 10**6
    paced = start
    for number, tokens in enumerate(batches(documents, 0, 0)):
        if number == steps:
            break
        if number == PACE:
            left = 60 * args.minutes - (time.monotonic() - start)
            steps = PACE + int(left * (PACE - FIRST) / (time.monotonic() - paced))
        if number == FIRST:
            paced = time.monotonic()
        for group in optimiser.param_groups:
            group["lr"] = args.learning_rate * schedule(number, steps)
        loss = step(model, optimiser, routers, tokens.to(args.device), dtype)
        mean = 0.95 * mean + 0.05 * loss if number else loss
        if number % 20 == 19:
            spent = time.monotonic() - start
            print(f"step {number + 1}/{steps}, loss {mean:.3f}, {spent:.0f} s", flush=True)
    model.cpu()
    save_teacher(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
