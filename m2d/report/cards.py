"""The model cards of finished students, with the scores measured since they were written."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from m2d.artifacts import finite, read_json, reading, write_text
from m2d.errors import UserError
from m2d.progress import say
from m2d.report.results import SCORES, Place, place_of
from m2d.students.card import Score, model_card
from m2d.students.record import TokensPart, read_record
from m2d.tokens.files import open_tokens


def scores_of(
    perplexity_file: str | Path | None, evaluation_files: Iterable[str | Path]
) -> dict[str, Score]:
    """Scores by label, as `model_card` takes them, from results of m2d perplexity and evaluate."""
    scores: dict[str, Score] = {}
    if perplexity_file is not None:
        result = read_json(perplexity_file)
        if "perplexity" not in result:
            raise UserError(f"{perplexity_file}: holds no perplexity; use m2d perplexity --out")
        with reading(perplexity_file, "a result of m2d perplexity"):
            words = f"perplexity ({int(result.get('n_tokens', 0)):,} tokens of test text)"
            error = result.get("stderr")
            error = None if error is None else finite(error, "stderr")
            scores[words] = Score(finite(result["perplexity"], "perplexity"), error)
    for file in evaluation_files:
        task, content = Path(file).stem, read_json(file)
        with reading(file, "a result of m2d evaluate"):
            found = content.get("results", {}).get(task, {})
            measure = next((m for m in (*SCORES, "word_perplexity") if f"{m},none" in found), None)
            if measure is None:
                raise UserError(f"{file}: holds no score of {task}; make it with m2d evaluate")
            shots = int(content.get("n-shot", {}).get(task, 0))
            error = found.get(f"{measure}_stderr,none")
            error = finite(error, "stderr") if isinstance(error, float) else None
            value = finite(found[f"{measure},none"], measure)
            scores[f"{task}, {shots}-shot, {measure}"] = Score(value, error)
    return scores


def calibration_of(file: str | Path) -> TokensPart:
    """What a token file says of itself: source, sequences, length."""
    found = open_tokens(file)
    return TokensPart(
        source=found.notes.get("source"), sequences=found.sequences, length=found.length
    )


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


def is_of_teacher(tokens: Path, student: Path) -> bool:
    """Whether a teacher's tokens lie in the folder that has its students."""
    return student.absolute().is_relative_to(tokens.absolute().parent.parent)


def card_of(
    student: Path,
    perplexity_files: Sequence[Path],
    evaluation_files: Iterable[Path],
    calibration_files: Iterable[Path],
) -> str:
    """The card of a student's folder with the scores and the calibration in these files."""
    record = read_record(student / "m2d.json")
    uncalibrated = record.baseline is not None and record.baseline.kind.startswith("random_")
    for file in () if uncalibrated else calibration_files:
        record = record.model_copy(update={"calibration": calibration_of(file)})
    if len(perplexity_files) > 1:
        raise UserError(f"{student}: more than one perplexity file; give its own alone")
    evaluation_files = list(evaluation_files)
    for file in (*perplexity_files, *evaluation_files):
        require_own(file, student)
    return model_card(record, scores_of(next(iter(perplexity_files), None), evaluation_files))


def require_own(result: Path, student: Path) -> None:
    """Raise a UserError where a result notes other weights than the student's."""
    noted = read_json(result).get("model_fingerprint")
    if noted is None:
        return
    from m2d.models.fingerprint import fingerprint  # torch, only where it is asked for

    if noted != fingerprint(student):
        raise UserError(f"{result}: was measured on other weights than those of {student}")


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
            own = [file for file in args.tokens if is_of_teacher(file, student)]
            files = (belonging(args.perplexity, place), belonging(args.evaluation, place), own)
        name = f"{place.teacher}.{place.student}.{place.variant}" if place else student.name
        cards[student] = (name, card_of(student, *files))
    for student, (name, card) in cards.items():
        write_text(student / "README.md", card)
        if args.out is not None:
            write_text(args.out / f"{name}.md", card)
    say(f"{len(cards)} model cards with scores")
