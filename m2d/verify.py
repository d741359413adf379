"""Verify: whether artifacts are what was written, and of one teacher.

`m2d verify PATH...` reads every byte of a student's folder, a file of statistics, stored teacher
logits, or all of these below a results folder; compares the digests that they carry, and the
fingerprints of the teachers that they were made from, and the students with the statistics,
rankings and students beside them that they were made from. With `--teacher` all must be of that
teacher; `--full FILE` also compares every byte of its weights.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2d.artifacts import read_json, sha256_of
from m2d.errors import UserError
from m2d.progress import progress, say
from m2d.sealed import digest_of_record, read_rows
from m2d.upstream import faults_of

CHANGED = "was changed or damaged: its numbers are not those that were written"
LOGITS = "index.json"
STUDENT = "m2d.json"


@dataclass
class Found:
    """What is known of one artifact."""

    path: Path
    kind: str
    fingerprint: str | None = None
    """Of the teacher that it was made from."""
    faults: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    parser.add_argument("--teacher", help="folder or hub id that all must have been made from")
    parser.add_argument(
        "--full",
        type=Path,
        metavar="FILE",
        help="read all weights of --teacher, and compare their SHA-256 digests with those in FILE "
        "(made where there is none; as of sha256sum) and with the hub's, where they are known",
    )


def main(args: argparse.Namespace) -> None:
    """Exit code 1 where something was changed, or belongs to another run."""
    expected = None
    faults = 0
    if args.full and not args.teacher:
        raise UserError("--full: is of a teacher's weights; give --teacher")
    if args.teacher:
        from m2d.models.fingerprint import fingerprint
        from m2d.models.teacher import locate

        expected = fingerprint(locate(args.teacher))
        if expected is None:
            raise UserError(f"{args.teacher}: has no weights to compare with")
        if not args.full:
            say(f"{args.teacher}: compared by samples of its weights; --full FILE reads them all")
        else:
            for line in changed_weights(locate(args.teacher), args.full):
                faults += 1
                print(f"{args.teacher}: {line}")
    for path in args.paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        artifacts = list(progress(list(artifacts_in(path)), f"{path}, verified"))
        found = [check(artifact) for artifact in artifacts]
        if not found:
            raise UserError(f"{path}: holds no student, statistics or stored logits of m2d's")
        compare_teachers(found, path, expected)
        compare_upstream(found, path)
        for one in found:
            for fault in one.faults:
                faults += 1
                print(f"{one.path}: {fault}")
        unbound = [str(one.path) for one in found if not one.fingerprint and not one.faults]
        if unbound:
            say(f"{path}: no fingerprint of a teacher, so of any: {', '.join(unbound)}")
        count = sum(not one.faults for one in found)
        say(f"{path}: {count} of {len(found)} artifacts are as they were written")
    if faults:
        raise SystemExit(1)


def artifacts_in(path: Path) -> Iterator[Path]:
    """Files and folders below `path`, or itself, that carry digests."""
    if path.is_file():
        yield path
        return
    if (path / STUDENT).is_file() or (path / LOGITS).is_file():
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.name.startswith(".") or child.is_symlink():
            continue
        if child.is_dir():
            yield from artifacts_in(child)
        elif child.suffix in (".parquet", ".safetensors") and metadata_of(child) is not None:
            yield child


def check(path: Path) -> Found:
    """Read an artifact wholly."""
    if path.is_file():
        return _check_file(path)
    return _check_student(path) if (path / STUDENT).is_file() else _check_logits(path)


def is_parquet(path: Path) -> bool:
    """By its first bytes, whatever its name is; by its name where those are damaged."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1" or path.suffix == ".parquet"


def metadata_of(path: Path) -> dict[str, Any] | None:
    """What m2d wrote into a file's metadata, of whatever kind; None where it wrote nothing."""
    import pyarrow
    import pyarrow.parquet
    from safetensors import SafetensorError, safe_open

    try:
        if is_parquet(path):
            raw = pyarrow.parquet.read_schema(path).metadata or {}
            text: Any = raw.get(b"m2d")
        else:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
            text = metadata.get("m2d") or metadata.get("m2d-share")
        found = json.loads(text) if text else None
    except (OSError, SafetensorError, pyarrow.ArrowException, ValueError):
        return {"unreadable": True}
    return found if isinstance(found, dict) else None


def _check_file(path: Path) -> Found:
    about = metadata_of(path)
    if about is None:
        return Found(path, "file", faults=["carries no digest of m2d's"])
    found = Found(path, "file", about.get("teacher_fingerprint"))
    if about.get("unreadable"):
        found.faults.append("is not readable: cut off, or damaged")
    elif (recorded := about.get("sha256")) is not None and recorded != _digest(path):
        found.faults.append(CHANGED)
    elif "rows_sha256" in about:
        try:
            read_rows(path)
        except UserError:
            found.faults.append(CHANGED)
    return found


def _digest(path: Path) -> str | None:
    """The digest of a file's numbers, computed anew; None where they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from m2d.sealed import digest_of
    from m2d.statistics.files import routing_columns

    try:
        arrays = routing_columns(path) if is_parquet(path) else load_file(path)
    except (OSError, SafetensorError, UserError, ValueError, KeyError):
        return None
    return digest_of(arrays)


def record_of(student: Path) -> dict[str, Any] | None:
    """A student's m2d.json; None where it is damaged."""
    try:
        return read_json(student / STUDENT)
    except UserError:
        return None


def _check_student(folder: Path) -> Found:
    record = record_of(folder)
    if record is None:
        return Found(folder, "student", faults=[f"{STUDENT} is not readable: cut off, or damaged"])
    teacher = record.get("teacher")
    found = Found(
        folder, "student", teacher.get("fingerprint") if isinstance(teacher, dict) else None
    )
    if record.get("record_sha256", own := digest_of_record(record)) != own:
        found.faults.append(f"{STUDENT} was changed or damaged")
    recorded = record.get("files_sha256")
    if not isinstance(recorded, dict):
        found.faults.append("m2d.json has no digests of the files (files_sha256)")
        return found
    for name, digest in recorded.items():
        file = folder / name
        if not file.is_file():
            found.faults.append(f"{name} is missing")
        elif sha256_of(file) != digest:
            found.faults.append(f"{name} was changed or damaged")
    weights = {str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")}
    found.faults += [f"{name} was added" for name in sorted(weights - set(recorded))]
    return found


def _check_logits(folder: Path) -> Found:
    import numpy as np
    from safetensors import SafetensorError, safe_open

    from m2d.distill.logits import (
        index_digest,
        marks_of,
        missing_shards,
        read_index,
        shards_in,
    )
    from m2d.sealed import digest_of

    try:
        index = read_index(folder)
    except UserError:
        return Found(folder, "logits", faults=["index.json is not that of stored logits"])
    found = Found(folder, "logits", index.get("teacher_fingerprint"))
    _, missing, first = missing_shards(folder, index["sequences"], index["rows_of_shard"])
    if first is not None:
        more = f", as are {missing - 1} others" if missing > 1 else ""
        found.faults.append(f"{first.name} is missing{more}")
    for file in shards_in(folder).values():
        try:
            with safe_open(file, "np") as shard:
                arrays = {key: np.asarray(shard.get_tensor(key)) for key in ("ids", "log_p")}
            marks = marks_of(file)
        except (OSError, SafetensorError, UserError):
            found.faults.append(f"{file.name} is not readable: cut off, or damaged")
            continue
        if marks.get("shard") != file.stem:
            found.faults.append(f"{file.name} is another shard, {marks.get('shard')}")
        elif marks.get("index_sha256") != index_digest(index):
            found.faults.append(f"{file.name} belongs to another run")
        elif marks.get("sha256") != digest_of(arrays):
            found.faults.append(f"{file.name} was changed or damaged")
    return found


def changed_weights(folder: Path, file: Path) -> list[str]:
    """What of a teacher's files is not as the hub or an earlier `file` has it, which else is made.

    Nothing is written where the hub has other bytes.
    """
    from m2d.models.digests import (
        changed,
        hub_digests,
        read_digests,
        weights_digests,
        write_digests,
    )

    known = read_digests(file) if file.exists() else None
    found = weights_digests(folder)
    lines = changed(found, hub_digests(folder), "the hub")
    if known is not None:
        return lines + changed(found, known, str(file))
    if not lines:
        write_digests(file, found)
        say(f"{file}: digests of {len(found)} files of {folder}, to compare with later")
    return lines


def groups_of(found: list[Found], root: Path) -> dict[Path, list[Found]]:
    """Artifacts by the first folder below `root`: in a results folder every teacher has one."""
    groups: dict[Path, list[Found]] = {}
    for one in found:
        parts = one.path.relative_to(root).parts[:1] if one.path != root else ()
        groups.setdefault(Path(*parts) if one.path.parent != root else root, []).append(one)
    return groups


def compare_upstream(found: list[Found], root: Path) -> None:
    """Note, in `faults`, the students made from other files than those that lie in their group."""
    directly = any(one.kind == "file" and one.path.parent == root for one in found)
    for group in [found] if directly else groups_of(found, root).values():
        students = {one.path: one for one in group if one.kind == "student"}
        found_records = {path: record_of(path) for path in students}
        records = {path: record for path, record in found_records.items() if record is not None}
        files = [one.path for one in group if one.kind == "file" and not one.faults]
        if records:
            for folder in sorted({one.path.parent for one in group}):
                files += sorted({*folder.glob("*.json"), *folder.glob("rankings*/*.json")})
        for path, fault in faults_of(records, dict.fromkeys(files)).items():
            students[path].faults.append(fault)
        for path, student in students.items():
            student.faults += [] if student.faults else foreign_results(path)


def foreign_results(student: Path) -> list[str]:
    """What to say of results beside a student that were not measured on its weights."""
    from m2d.models.fingerprint import fingerprint

    name = student.name
    files = [student.with_name(f"{name}.perplexity.json")]
    files += sorted(student.with_name(f"{name}.eval").glob("*.json"))
    lines = []
    for file in filter(Path.is_file, files):
        noted = read_json(file).get("model_fingerprint")
        if noted is not None and noted != fingerprint(student):
            lines.append(f"{file.name} was measured on other weights; measure it again")
    return lines


def compare_teachers(found: list[Found], root: Path, expected: str | None) -> None:
    """Note, in `faults`, the artifacts of other teachers than the rest beside them.

    They are compared within their group; with `expected`, all with that one.
    """
    for group in groups_of(found, root).values():
        known = Counter(one.fingerprint for one in group if one.fingerprint)
        most = expected or (known.most_common(1)[0][0] if known else None)
        for one in group:
            if expected and not one.fingerprint:
                one.faults.append("has no fingerprint of its teacher; make it again to know")
            if one.fingerprint and one.fingerprint != most:
                one.faults.append(
                    f"belongs to another run: was made from a teacher with the fingerprint "
                    f"{one.fingerprint[:12]}, not {str(most)[:12]}"
                )
