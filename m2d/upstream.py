"""Whether students were made from the files that lie beside them, by the digests in m2d.json."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m2d.artifacts import read_json, sha256_of
from m2d.errors import UserError

# What a file of numbers is, by a column or tensor that only such a file has.
MARKS = {
    "n_selected": "statistics",
    "weight_gram": "gram",
    "down_square_norm": "neurons",
    "alpha": "fold",
}
# What may be done to a student, in this order; sections of its m2d.json.
STEPS = ("refit", "align", "distillation")
RANKING = {"format", "scoring", "layers"}


def kind_of(path: Path) -> str | None:
    """What a file is to the students made from it, a key of upstream_sha256; None for others."""
    import pyarrow
    import pyarrow.parquet
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".parquet":
            names = set(pyarrow.parquet.read_schema(path).names)
        elif path.suffix == ".json":
            content = read_json(path)
            return "ranking" if content.keys() >= RANKING else None
        else:
            with safe_open(path, "np") as file:
                if "m2d" not in (file.metadata() or {}):
                    return None
                names = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, pyarrow.ArrowException, UserError):
        return None
    return next((kind for mark, kind in MARKS.items() if mark in names), None)


def faults_of(records: Mapping[Path, dict[str, Any]], files: Iterable[Path]) -> dict[Path, str]:
    """Student's folder -> what lies there in another state than the student was made from.

    records: what each student's m2d.json says. Of a kind of which nothing lies there, nothing can
    be said; of several files of a kind, one must be what the student was made from.
    """
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        if kind := kind_of(file):
            by_kind.setdefault(kind, []).append(file)
    digests: dict[Path, str] = {}

    def digest(file: Path) -> str:
        if file not in digests:
            digests[file] = sha256_of(file)
        return digests[file]

    found = {}
    for folder, record in records.items():
        for kind, recorded in _mapping(record.get("upstream_sha256")).items():
            there = by_kind.get(kind, [])
            if there and isinstance(recorded, str) and recorded not in map(digest, there):
                names = ", ".join(file.name for file in there[:3])
                more = ", ..." if len(there) > 3 else ""
                found[folder] = f"was made from other {kind} than lie there ({names}{more})"
        if not _has_its_student(folder, record, records):
            found[folder] = "was made from another student than the one of its plan beside it"
    return found


def _has_its_student(
    folder: Path, record: dict[str, Any], records: Mapping[Path, dict[str, Any]]
) -> bool:
    """Whether students beside this one, of its plan and its earlier steps, are what it began as.

    True where there are none.
    """
    beside = [
        about
        for other, about in records.items()
        if other != folder
        and other.parent == folder.parent
        and about.get("plan") == record.get("plan") is not None
        and about.get("fold") == record.get("fold")
    ]
    for number, step in enumerate(STEPS):
        made = _mapping(record.get(step))
        student = _mapping(made.get("upstream_sha256")).get("student", made.get("student_sha256"))
        before = [
            _mapping(about.get("files_sha256")).items()
            for about in beside
            if [about.get(s) for s in STEPS]
            == [record.get(s) if s in STEPS[:number] else None for s in STEPS]
        ]
        wanted = _mapping(student).items()
        if wanted and before and not any(wanted <= files for files in before):
            return False
    return True


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
