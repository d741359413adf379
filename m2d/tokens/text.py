"""Text: the documents of text, JSON and Parquet files, packed or not, and of folders of them.

The one reader of text for all commands. Imports nothing heavy.
"""

import contextlib
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from m2d.errors import UserError
from m2d.progress import say
from m2d.tokens.rows import COLUMNS, PEEK, Document, column_of, documents_of, holds_text, values_of

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".ndjson", ".json", ".parquet")
PACKED = (".gz", ".zst")
# Byte order marks, the longer first, since one begins with another.
MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# Characters of one document: more is a mistake, or a trap for a machine's memory.
LONGEST = 2**30

# In a folder: what describes the text rather than being it.
NO_TEXT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|requirements)\b.*"
    r"|(.*config|tokenizer.*|special_tokens_map|added_tokens|vocab|.*\.index|m2d|plan)\.json"
    r"|(dataset_infos?|state|package)\.json|(vocab|merges)\.txt",
    re.IGNORECASE,
)
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


def read_documents(files: Sequence[str | Path], column: str | None = None) -> Iterator[Document]:
    """The documents of text files (one each), and of JSON and Parquet files (one a row).

    Of a folder, those of the files that `files_in` takes. `column` holds the text of a row; by
    default it is found (m2d.tokens.rows). What is no document is skipped, counted and said.

    Raises UserError where a file cannot be read, or holds no text at all.
    """
    for path in map(Path, files):
        inside = [path]
        if path.is_dir():
            inside, left = files_in(path)
            said = f"; left out {', '.join(f'{n} of {kind}' for kind, n in sorted(left.items()))}"
            say(f"{path}: {len(inside)} text files" + (said if left else ""))
        for file in inside:
            yield from _documents_of(file, column)


def text_files(paths: Sequence[str | Path]) -> Iterator[Path]:
    """The files behind `read_documents`' argument."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from files_in(path)[0]
        else:
            yield require_file(path)


def files_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The text files of a folder and below, by path, and how many were left out, by their split.

    Hidden files and folders, checkpoints, and what describes a dataset (README.md) are not text.
    Where files are named after splits, those of the training split are taken, with those that
    name none; a folder of one split alone is taken as it is.
    """
    found: dict[Path, str] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith((".", "checkpoint-"))]
        for file in (Path(place) / name for name in names):
            hidden = file.name.startswith(".") or NO_TEXT.fullmatch(file.name)
            if not hidden and kind_of(file) and file.is_file():
                found[file] = split_of(file.relative_to(folder))
    if not found:
        raise UserError(f"{folder}: no text file in this folder ({', '.join(SUFFIXES)})")
    wanted = set(found.values()) if len(set(found.values())) == 1 else {"train", ""}
    left = Counter(split for split in found.values() if split not in wanted)
    taken = sorted(file for file, split in found.items() if split in wanted)
    if not taken:
        raise UserError(f"{folder}: holds the splits {', '.join(sorted(left))}; name one's files")
    return taken, left


def split_of(path: Path) -> str:
    """The split that a path within a dataset's folder names, or none: ""."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def kind_of(file: Path) -> str | None:
    """The suffix that says what a text file is, without that of its packing; None: unknown."""
    name = file.name.lower()
    for packing in PACKED:
        if name.endswith(packing):
            name = name.removesuffix(packing)
            return next((s for s in SUFFIXES if name.endswith(s) and s != ".parquet"), None)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def require_file(path: Path) -> Path:
    """Raise a UserError unless this is a regular file; a pipe or device would never end."""
    if not path.is_file():
        raise UserError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
    return path


def _documents_of(file: Path, column: str | None) -> Iterator[Document]:
    kind, place = kind_of(require_file(file)), str(file)
    if kind is None:
        raise UserError(
            f"{file}: unknown kind of text file; known: {', '.join(SUFFIXES)}, and but for the "
            f"last with {' or '.join(PACKED)}"
        )
    try:
        if kind in TEXT_SUFFIXES:
            yield from documents_of([_whole(file)], place)
        elif kind == ".parquet":
            yield from documents_of(_parquet_values(file, column), place)
        else:
            rows = iter(_json_rows(file) if kind == ".json" else _json_lines(file))
            head = list(itertools.islice(rows, PEEK))
            chosen = column_of(head, column, place)
            yield from documents_of(values_of(itertools.chain(head, rows), chosen), place)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{file}: no text can be read from it (byte 0x{byte:02x} is not UTF-8); convert it"
        ) from None
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise UserError(f"{file}: no text can be read from it ({error})") from None


def _open(file: Path, newline: str | None) -> io.TextIOWrapper:
    """The file's text, unpacked; as UTF-8, or UTF-16 or -32 where a byte order mark says so."""

    def stream() -> BinaryIO:
        if file.name.lower().endswith(".gz"):
            import gzip

            return gzip.open(file, "rb")  # type: ignore[return-value]
        if file.name.lower().endswith(".zst"):
            import pyarrow as pa

            return pa.input_stream(str(file), compression="zstd")
        return file.open("rb")

    with stream() as beginning:
        mark = beginning.read(4)
    encoding = next((name for start, name in MARKS.items() if mark.startswith(start)), "utf-8-sig")
    return io.TextIOWrapper(stream(), encoding, newline=newline)


def _whole(file: Path) -> str:
    with _open(file, newline=None) as stream:
        return _bounded(stream.read(LONGEST + 1), file)


def _bounded(text: str, file: Path) -> str:
    if len(text) > LONGEST:
        raise UserError(f"{file}: one document of more than {LONGEST:,} characters; split it")
    return text


def _json_lines(file: Path) -> Iterator[Any]:
    with _open(file, newline="\n") as stream:
        number = 0
        while line := _bounded(stream.readline(LONGEST + 1), file):
            number += 1
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{file}: line {number} is not JSON ({error})") from None


def _json_rows(file: Path) -> Iterable[Any]:
    """The rows of a .json file: an array, an object that holds one, or JSON lines after all."""
    try:
        content = json.loads(_whole(file))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _json_lines(file)
    if isinstance(content, dict):
        arrays = [value for value in content.values() if isinstance(value, list) and value]
        is_row = any(holds_text(content.get(name)) for name in COLUMNS)
        holds_rows = len(arrays) == 1 and isinstance(arrays[0][0], dict | str)
        content = arrays[0] if holds_rows and not is_row else [content]
    if not isinstance(content, list):
        raise UserError(f"{file}: an array of rows is expected, not {type(content).__name__}")
    return content


def _parquet_values(file: Path, column: str | None) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            first = next(table.iter_batches(PEEK), None)
            rows = [] if first is None else first.to_pylist()
            head = [{name: _decoded(value) for name, value in row.items()} for row in rows]
            if not head:
                return
            name = column_of(head, column, str(file))
            for part in table.iter_batches(columns=[name]):
                yield from map(_decoded, part.column(0).to_pylist())
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a readable Parquet file ({reason})") from None


def _decoded(value: Any) -> Any:
    """Text that an old writer has stored as bytes; anything else as it is."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value
