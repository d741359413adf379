"""Token files (`input_ids`, int64 [sequences, length], safetensors) and the text they come from."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from m2d.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def read_tokens(path: str | Path, vocab_size: int | None = None) -> torch.Tensor:
    """Read input_ids, int64 [sequences, length].

    Raises UserError where the file is unreadable, has no such tensor, or holds ids that a model of
    `vocab_size` tokens does not know.
    """
    try:
        with safe_open(path, "pt") as file:
            if "input_ids" not in file.keys():  # noqa: SIM118 (not a mapping)
                raise UserError(f"{path}: has no tensor 'input_ids'; make one with m2d calibrate")
            ids = file.get_tensor("input_ids")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable token file ({error})") from None
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UserError(
            f"{path}: input_ids is {ids.dtype} {list(ids.shape)}; whole numbers of shape "
            "[sequences, length], length at least 2, are expected"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        wrong = low if low < 0 else high
        raise UserError(
            f"{path}: token id {wrong} is outside the model's vocabulary of {vocab_size}; was it "
            "made with another tokenizer?"
        )
    return ids.long()


def read_token_notes(path: str | Path) -> dict[str, str]:
    """What a token file says of itself: source, tokenizer, sequences, length."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


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
