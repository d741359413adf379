"""Text: the documents of .txt, .jsonl and Parquet files and of folders. Imports nothing heavy."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from m2d.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def read_documents(files: Sequence[str | Path]) -> Iterator[str]:
    """The documents of text files (one each), JSON lines or Parquet files (their `text`).

    Of a folder, those of all such files in it and below, in the order of their paths.
    """
    for file in text_files(files):
        try:
            yield from _documents_of(file)
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{file}: no text can be read from it ({error!r})") from None


def text_files(paths: Sequence[str | Path]) -> Iterator[Path]:
    """The files behind `read_documents`' argument."""
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no text file in this folder ({', '.join(SUFFIXES)})")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path}: no such file")


def _documents_of(file: Path) -> Iterator[str]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
    elif file.suffix == ".parquet":
        import pyarrow.parquet as pq

        for part in pq.ParquetFile(file).iter_batches(columns=["text"]):
            yield from part.column(0).to_pylist()
    elif file.suffix in TEXT_SUFFIXES:
        yield file.read_text(encoding="utf-8")
    else:
        raise UserError(f"{file}: unknown kind of text file; known: {', '.join(SUFFIXES)}")
