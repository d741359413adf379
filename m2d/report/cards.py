"""The model cards of finished students, with the scores measured since they were written."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from m2d.artifacts import read_json, write_text
from m2d.errors import UserError
from m2d.progress import say
from m2d.report.results import SCORES, Place, place_of
from m2d.students.card import model_card


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
        scores[words] = {"value": result["perplexity"], "stderr": result.get("stderr")}
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
        raise UserError(f"{file}: not a token file of m2d tokenize ({error})") from None
    return {"source": metadata.get("source"), "sequences": sequences, "length": length}


def place_of_folder(student: Path) -> Place | None:
    """What a student's folder is about, where it stands in a run's results."""
    try:
        return place_of(student / "m2d.json")
    except UserError:
        return None


def belonging(files: Iterable[Path], place: Place | None) -> list[Path]:
    """The result files of the student at `place`."""
    places = [(file, place_of(file)) for file in files]
    return [file for file, found in places if replace(found, task="", scoring="") == place]


def card_of(
    student: Path,
    perplexity_files: Sequence[Path],
    evaluation_files: Iterable[Path],
    calibration_files: Iterable[Path],
) -> str:
    """The card of a student's folder with the scores and the calibration in these files."""
    record = read_json(student / "m2d.json")
    if not isinstance(record, dict):
        raise UserError(f"{student / 'm2d.json'}: not a student's m2d.json")
    uncalibrated = str((record.get("baseline") or {}).get("kind")).startswith("random_")
    for file in () if uncalibrated else calibration_files:
        record = {**record, "calibration": calibration_of(file)}
    if len(perplexity_files) > 1:
        raise UserError(f"{student}: more than one perplexity file; give its own alone")
    return model_card(record, scores_of(next(iter(perplexity_files), None), evaluation_files))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "students",
        nargs="+",
        type=Path,
        metavar="STUDENT",
        help="a student's folder, whose README.md is renewed; of several, each gets the files that "
        "stand beside it in the workflow's results",
    )
    for name, source in (("perplexity", "m2d perplexity --out"), ("evaluation", "m2d evaluate")):
        parser.add_argument(
            f"--{name}", nargs="*", default=[], type=Path, metavar="FILE", help=f"from {source}"
        )
    parser.add_argument(
        "--tokens",
        nargs="*",
        default=[],
        type=Path,
        metavar="FILE",
        help="the token file of the teacher's statistics",
    )
    parser.add_argument("--out", type=Path, help="also write the cards into this folder")


def main(args: argparse.Namespace) -> None:
    cards = {}
    for student in args.students:
        place = place_of_folder(student)
        files = (args.perplexity, args.evaluation, args.tokens)
        if len(args.students) > 1:
            # A teacher's tokens lie in its folder, and its students below.
            own = [file for file in args.tokens if student.is_relative_to(file.parents[1])]
            files = (belonging(args.perplexity, place), belonging(args.evaluation, place), own)
        name = f"{place.teacher}.{place.student}.{place.variant}" if place else student.name
        cards[student] = (name, card_of(student, *files))
    for student, (name, card) in cards.items():
        write_text(student / "README.md", card)
        if args.out is not None:
            write_text(args.out / f"{name}.md", card)
    say(f"{len(cards)} model cards with scores")
