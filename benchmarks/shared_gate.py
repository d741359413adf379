"""What a dense sibling makes of a shared expert whose gate depends on the token.

Students of one teacher (`second_teacher.py --kind qwen2_moe` trains one), as dense siblings and in
the teacher's own class, which keeps the gate: perplexity and KL(teacher || student) on test tokens,
and what folding leaves of each layer. Prints the tables of docs/beyond.md.

    python benchmarks/shared_gate.py TEACHER CORPUS
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import m2d
from m2d.tokens.tokenize import tokens_from

LENGTH, CALIBRATION, TEST = 256, 128, 32
NEURONS = {"granularity": "neurons", "choice": "greedy"}
STUDENTS: dict[str, dict[str, Any]] = {
    "whole experts, DO-ACP": {},
    "greedy neurons": NEURONS,
    "greedy neurons, fold": {**NEURONS, "fold": "neuron"},
    "greedy neurons, refit": {**NEURONS, "refit": "sequential"},
    "greedy neurons, fold, refit": {**NEURONS, "fold": "neuron", "refit": "sequential"},
    "greedy neurons, fold, refit, align": {"recipe": "best"},
}


@torch.no_grad()
def log_probabilities(folder: Path, tokens: Tensor) -> Tensor:
    """[S, T, V] of tokens [S, T], float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat([model(ids).logits.log_softmax(-1) for ids in tokens.split(4)])


def figures(teacher: Tensor, student: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Perplexity of the student, and its divergence from the teacher in nats a token."""
    targets = tokens[:, 1:].flatten()
    loss = functional.nll_loss(student[:, :-1].flatten(0, 1), targets)
    kl = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
    return float(loss.exp()), float(kl)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("corpus", type=Path, help="from m2d demo corpus")
    args = parser.parse_args()
    text = [args.corpus / "test.jsonl"]
    tokens = tokens_from(str(args.teacher), text, None, LENGTH, TEST)
    teacher = log_probabilities(args.teacher, tokens)
    print(f"teacher: perplexity {figures(teacher, teacher, tokens)[0]:.1f}\n")
    print("| student | dense sibling: perplexity | KL | own class: perplexity | KL |")
    print("|---|---:|---:|---:|---:|")
    records = {}
    with tempfile.TemporaryDirectory() as work:
        for number, (name, options) in enumerate(STUDENTS.items()):
            cells = []
            for kind in ("sibling", "same"):
                out = m2d.convert(
                    args.teacher, Path(work, f"{number}-{kind}"), student_class=kind,
                    text=[args.corpus / "calibration.jsonl"], sequences=CALIBRATION,
                    length=LENGTH, **options,
                )  # fmt: skip
                found = figures(teacher, log_probabilities(out, tokens), tokens)
                cells.append(f"{found[0]:.1f} | {found[1]:.3f}")
                records[name, kind] = json.loads((out / "m2d.json").read_text())
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print("\n| layer | R2 of the shared expert | folded | alpha | error before refit | after |")
    print("|---:|---:|---:|---:|---:|---:|")
    record = records["greedy neurons, fold, refit", "sibling"]
    for fold, refit in zip(record["fold"]["layers"], record["refit"]["layers"], strict=True):
        shared, held_out = fold["shared"], refit["held_out_before"]
        print(
            f"| {fold['layer']} | {shared['r2_before']:.3f} | {shared['r2_after']:.3f} "
            f"| {shared['alpha']:.2f} | {held_out:.4g} | {refit['held_out_after']:.4g} |"
        )


if __name__ == "__main__":
    main()
