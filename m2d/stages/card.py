"""The model card of a finished student, with the scores that were measured after it was written."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from m2d.artifacts import read_json, write_text
from m2d.errors import UserError
from m2d.model_card import model_card
from m2d.progress import say
from m2d.results import SCORES


def scores_of(
    perplexity_file: str | Path | None, evaluation_files: Iterable[str | Path]
) -> dict[str, Any]:
    """Scores by label, as `model_card` takes them, from results of m2d perplexity and evaluate."""
    scores: dict[str, Any] = {}
    if perplexity_file is not None:
        result = read_json(perplexity_file)
        if not isinstance(result, dict) or "perplexity" not in result:
            raise UserError(f"{perplexity_file}: holds no perplexity; use m2d perplexity --out")
        words = f"perplexity ({result.get('n_tokens', 0):,} tokens of test text)"
        scores[words] = result["perplexity"]
    for file in evaluation_files:
        task, content = Path(file).stem, read_json(file)
        found = content.get("results", {}).get(task, {}) if isinstance(content, dict) else {}
        measure = next((m for m in (*SCORES, "word_perplexity") if f"{m},none" in found), None)
        if measure is None:
            raise UserError(f"{file}: holds no score of {task}; make it with m2d evaluate")
        shots = content.get("n-shot", {}).get(task, 0)
        error = found.get(f"{measure}_stderr,none")
        score = {"value": found[f"{measure},none"]}
        score |= {"stderr": error} if isinstance(error, float) else {}
        scores[f"{task}, {shots}-shot, {measure}"] = score
    return scores


def calibration_of(file: str | Path) -> dict[str, Any]:
    """What a token file says of itself: source, sequences, length."""
    try:
        with safe_open(file, "numpy") as tokens:
            metadata = tokens.metadata() or {}
            sequences, length = tokens.get_slice("input_ids").get_shape()
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file}: not a token file of m2d calibrate ({error})") from None
    return {"source": metadata.get("source"), "sequences": sequences, "length": length}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", type=Path, help="the student's folder; its README.md is renewed")
    parser.add_argument("--perplexity", type=Path, help="from m2d perplexity --out")
    parser.add_argument(
        "--evaluation", nargs="*", default=[], metavar="FILE", help="from m2d evaluate"
    )
    parser.add_argument(
        "--calibration", type=Path, help="the token file of the teacher's statistics"
    )
    parser.add_argument("--out", type=Path, help="also write the card to this file")


def main(args: argparse.Namespace) -> None:
    record = read_json(args.student / "m2d.json")
    if not isinstance(record, dict):
        raise UserError(f"{args.student / 'm2d.json'}: not a student's m2d.json")
    if args.calibration is not None:
        record = {**record, "calibration": calibration_of(args.calibration)}
    card = model_card(record, scores_of(args.perplexity, args.evaluation))
    write_text(args.student / "README.md", card)
    if args.out is not None:
        write_text(args.out, card)
    say(f"{args.student / 'README.md'}: model card with scores")
