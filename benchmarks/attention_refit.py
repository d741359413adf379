"""What refitting the attention's output projections too is worth, before and after a distillation.

The demo teacher's student of greedy neurons with a fold and a sequential refit, and the same where
each layer's output projection is first solved, by ridge regression on the student's own stream, for
the teacher's residual stream after attention. Prints perplexity and KL(teacher || student) on test
tokens of each seed of calibration, as they are and after 65,536 tokens of `m2d distill`.

    python benchmarks/attention_refit.py CORPUS [--seeds 0 1 2]
"""

import argparse
import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hidden_loss import BATCH, LENGTH, STEPS, TEACHER, distilled
from safetensors.torch import save_file
from shared_gate import log_probabilities
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import m2d
from m2d.cli import main as run
from m2d.models.teacher import open_teacher, quiet
from m2d.refit.halves import Halves, SteppedModel, open_student, run_halves
from m2d.refit.refit import teacher_half
from m2d.refit.ridge import refit_down
from m2d.statistics.moments import Moments
from m2d.tokens.tokenize import tokens_from

SEQUENCES, BATCH_SEQUENCES = 128, 16
CPU = torch.device("cpu")
RATE = "1e-3"


def solved(columns: list[Tensor], wanted: list[Tensor], weight: Tensor) -> Tensor:
    """The projection [out, in] that ridge regression gives, towards `weight`."""
    parts = [Moments.zero(weight.shape[1], weight.shape[0]) for _ in range(2)]
    for i, (x, y) in enumerate(zip(columns, wanted, strict=True)):
        parts[i % 8 == 7].add(x.flatten(0, 1), y.flatten(0, 1))  # every eighth batch is held out
    rows, _ = refit_down(*parts, weight.T.double())
    return rows.T.float()


@contextlib.contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is called with."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    yield seen
    handle.remove()


def halves_of(model: SteppedModel, layer: nn.Module, index: int, block: nn.Module) -> list[Halves]:
    """Every batch between the halves of a layer."""
    return [run_halves(model, layer, block, index, i) for i in range(len(model.hidden))]


@torch.no_grad()
def refitted(folder: Path, out: Path, tokens: Tensor, attention: bool) -> None:
    """The sequential refit, in memory, of output projections (if `attention`) and FFNs."""
    teacher = open_teacher(TEACHER)
    opened = open_student(folder, teacher)
    source, target = (SteppedModel(model, torch.float32, CPU) for model in (teacher, opened))
    source.start(tokens, BATCH_SEQUENCES)
    target.start(tokens, BATCH_SEQUENCES)
    new = {}
    for index, prefix in enumerate(target.prefixes):
        theirs, ours = source.load(index), target.load(index)
        output: Any = ours.get_submodule("self_attn.o_proj")
        block: Any = ours.get_submodule("mlp")
        down = block.down_proj
        batches = range(len(source.hidden))
        expected = [teacher_half(source, theirs, index, i, check=False) for i in batches]
        if attention:
            with inputs_of(output) as columns:
                halves_of(target, ours, index, block)
            wanted = [e.residual - h for e, h in zip(expected, target.hidden, strict=True)]
            output.weight.copy_(solved(columns, wanted, output.weight))
        with inputs_of(down) as columns:
            found = halves_of(target, ours, index, block)
        wanted = [t - f.residual for t, f in zip(source.hidden, found, strict=True)]
        down.weight.copy_(solved(columns, wanted, down.weight))
        for i, half in enumerate(found):
            target.hidden[i] = half.residual + block(half.block_input)
        new[f"{prefix}self_attn.o_proj.weight"] = output.weight.clone()
        new[f"{prefix}mlp.down_proj.weight"] = down.weight.clone()
        source.drop(theirs)
        target.drop(ours)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "m2d.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.load_state_dict(new, strict=False)
    model.save_pretrained(out)


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
