"""What refitting the attention's output projections too is worth, before and after a distillation.

The demo teacher's student of greedy neurons with a fold and a sequential refit, and the same where
each layer's output projection is first solved, by ridge regression on the student's own stream, for
the teacher's residual stream after attention. Prints perplexity and KL(teacher || student) on test
tokens of each seed of calibration, as they are and after 65,536 tokens of `m2d distill`.

    python benchmarks/attention_refit.py CORPUS [--seeds 0 1 2]
"""

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hidden_loss import BATCH, LENGTH, STEPS, TEACHER, distilled
from safetensors.torch import save_file
from shared_gate import log_probabilities
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import m2d
from m2d.cli import main as run
from m2d.models.teacher import quiet
from m2d.refit.ridge import refit_down
from m2d.statistics.moments import Moments
from m2d.tokens.tokenize import tokens_from

SEQUENCES = 128
RATE = "1e-3"


class Stream:
    """A loaded model whose layers are run one by one, on all tokens at once in batches."""

    def __init__(self, folder: Path, tokens: Tensor):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        base = self.model.model
        self.layers = base.layers
        self.hidden = [base.embed_tokens(ids) for ids in tokens.split(16)]
        self.positions = torch.arange(tokens.shape[1])[None]
        self.rotary = base.rotary_emb(self.hidden[0], self.positions)

    def run(self, layer: Any) -> list[tuple[Tensor, ...]]:
        """Push all through a layer; of each batch: the projection's input, r after attention.

        The hidden states are those after the layer then.
        """
        found = []
        for i, hidden in enumerate(self.hidden):
            caught: dict[str, Tensor] = {}
            hooks = [
                layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda _, args, caught=caught: caught.update(a=args[0])
                ),
                layer.post_attention_layernorm.register_forward_pre_hook(
                    lambda _, args, caught=caught: caught.update(r=args[0])
                ),
            ]
            out = layer(
                hidden, position_embeddings=self.rotary, position_ids=self.positions,
                attention_mask=None,
            )  # fmt: skip
            for hook in hooks:
                hook.remove()
            self.hidden[i] = out[0] if isinstance(out, tuple) else out
            found.append((caught["a"], caught["r"]))
        return found


def solved(columns: list[Tensor], wanted: list[Tensor], weight: Tensor) -> Tensor:
    """The projection [out, in] that ridge regression gives, towards `weight`."""
    parts = [Moments.zero(weight.shape[1], weight.shape[0]) for _ in range(2)]
    for i, (x, y) in enumerate(zip(columns, wanted, strict=True)):
        parts[i % 8 == 7].add(x.flatten(0, 1), y.flatten(0, 1))  # every eighth batch is held out
    rows, _ = refit_down(*parts, weight.T.double())
    return rows.T.float()


@torch.no_grad()
def refitted(folder: Path, out: Path, tokens: Tensor, attention: bool) -> None:
    """The sequential refit, in memory, of output projections (if `attention`) and FFNs."""
    theirs, ours = Stream(TEACHER, tokens), Stream(folder, tokens)
    for layer_t, layer_s in zip(theirs.layers, ours.layers, strict=True):
        before = list(ours.hidden)
        expected = theirs.run(layer_t)
        if attention:
            found = ours.run(layer_s)
            projection = layer_s.self_attn.o_proj
            wanted = [e[1] - h for e, h in zip(expected, before, strict=True)]
            projection.weight.copy_(solved([f[0] for f in found], wanted, projection.weight))
            ours.hidden = list(before)
        inner: list[Tensor] = []
        down = layer_s.mlp.down_proj
        hook = down.register_forward_pre_hook(lambda _, args, inner=inner: inner.append(args[0]))
        found = ours.run(layer_s)
        hook.remove()
        wanted = [t - f[1] for t, f in zip(theirs.hidden, found, strict=True)]
        down.weight.copy_(solved(inner, wanted, down.weight))
        ours.hidden = before
        ours.run(layer_s)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "m2d.json"))
    ours.model.to(torch.bfloat16).save_pretrained(out)


def measured(folder: Path, test: Tensor, theirs: Tensor) -> dict[str, float]:
    ours = log_probabilities(folder, test)
    own = ours[:, :-1].gather(-1, test[:, 1:, None]).mean()
    kl = functional.kl_div(ours, theirs, log_target=True, reduction="sum") / test.numel()
    return {"perplexity": math.exp(-float(own)), "kl": float(kl)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="from m2d demo corpus")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = tokens_from(TEACHER, [args.corpus / "test.jsonl"], None, LENGTH, 32)
    theirs = log_probabilities(TEACHER, test)
    text = args.corpus / "calibration.jsonl"
    several = tokens_from(TEACHER, [text], None, LENGTH, SEQUENCES * len(args.seeds))
    with tempfile.TemporaryDirectory() as scratch, quiet():
        work = Path(scratch)
        words = ["tokenize", TEACHER, work / "tokens", "--text", args.corpus / "train.jsonl"]
        words += ["--sequences", STEPS * BATCH, "--length", LENGTH]
        run([str(word) for word in words])
        for seed, part in zip(args.seeds, several.chunk(len(args.seeds)), strict=True):
            start, file = work / f"start-{seed}", work / f"calibration-{seed}"
            save_file({"input_ids": part.contiguous()}, file)
            m2d.convert(
                TEACHER, start, tokens=file, granularity="neurons", choice="greedy", fold="neuron",
            )  # fmt: skip
            for attention in (False, True):
                folder = work / f"{seed}-{attention}"
                refitted(start, folder, part, attention)
                row = {"seed": seed, "attention": attention, **measured(folder, test, theirs)}
                out = work / f"{seed}-{attention}-distilled"
                distilled(folder, out, work / "tokens", "--any-teacher", "--seed", seed,
                          "--learning-rate", RATE)  # fmt: skip
                after = measured(out, test, theirs)
                print(json.dumps(row | {f"{k}_after": v for k, v in after.items()}), flush=True)


if __name__ == "__main__":
    main()
