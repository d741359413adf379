"""Tokens for distillation and calibration: packing text, and reading the packed artifact.

The artifact is one safetensors file with `input_ids`, int64 [sequences, length], and no padding:
documents follow one another, each closed by the end-of-sequence token, and are cut at every
`length` tokens.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from m2d.artifacts import flush_to_disk, fsync, read_json, write_json
from m2d.errors import UserError
from m2d.progress import progress, say

# Documents that go to the tokenizer at once, so that a fast tokenizer can use its threads.
DOCUMENTS_AT_ONCE = 256
SECONDS_BETWEEN_POSITIONS = 60.0


def packed_batches(
    documents: Iterable[str], tokenizer: Any, length: int, rest: Sequence[int] = ()
) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """Yield, for a batch of documents at a time, what they fill, how many they are, what is over.

    That is int64 [sequences, length], a number, and int64 [fewer than length], which the next batch
    goes on from, as the first does from `rest`. No special token is added but the end-of-sequence
    token after each document; the unfilled last sequence is dropped.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    over = np.asarray(rest, np.int64)
    documents = iter(documents)
    while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        # verbose=False: a document longer than the model's context is no mistake here.
        rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        parts = [np.asarray([*row, tokenizer.eos_token_id], np.int64) for row in rows]
        over = np.concatenate([over, *parts])
        whole = len(over) // length
        filled, over = over[: whole * length].reshape(whole, length), over[whole * length :]
        yield filled, len(batch), over


def pack_tokens(
    documents: Iterable[str], tokenizer: Any, length: int, sequences: int | None
) -> torch.Tensor:
    """Pack documents into int64 [sequences, length] tokens.

    Args:
        documents: texts, in the order in which they are used; read no further than needed.
        tokenizer: a transformers tokenizer.
        length: tokens of a sequence.
        sequences: how many sequences; None takes all that the documents fill.

    Raises:
        UserError: too little text for `sequences` (or for one), or no end-of-sequence token.
    """
    batches = packed_batches(documents, tokenizer, length)
    rows = list(itertools.islice((row for filled, *_ in batches for row in filled), sequences))
    require_filled(len(rows), length, sequences)
    return torch.from_numpy(np.stack(rows))


def write_packed(
    path: str | Path,
    documents: Iterable[str],
    tokenizer: Any,
    length: int,
    sequences: int | None,
    metadata: dict[str, str],
    identity: object = None,
) -> int:
    """Pack documents straight into a token file, of any size; returns its sequences.

    As `pack_tokens`, but only a batch of documents is in memory at a time. The file appears when it
    is complete. `metadata` is added to its sequences and length.

    Called again after it was killed, it goes on from where it was up to a minute before: documents
    that it had read are read over without being tokenized. So they must be the same ones; that they
    are is told by `identity`, any JSON value, which is compared.

    Raises:
        UserError: as `pack_tokens`.
    """
    path = Path(path)
    work = path.with_name(f".{path.name}.packing")
    file, position = work / path.name, work / "position.json"
    request = {"metadata": metadata, "sequences": sequences, "length": length, "of": identity}
    start: dict[str, Any] = {"documents": 0, "rows": 0, "rest": []}
    work.mkdir(parents=True, exist_ok=True)
    # Through JSON, since a tuple that is written comes back as a list.
    same = json.loads(json.dumps(request))
    if file.is_file() and position.is_file() and (found := read_json(position))["request"] == same:
        start = found
        say(f"{path}: going on after {start['rows']} sequences")
    else:  # a position is of the tokens beside it: it goes before they do
        position.unlink(missing_ok=True)
        fsync(work)
    # The header comes first and has the number of rows: room is kept for it, and filled later.
    room = len(packed_header(2**40, length, metadata))
    with file.open("r+b" if start["rows"] else "wb") as out:
        rows = start["rows"]
        out.seek(out.truncate(room + rows * length * 8))

        def rows_of_batches() -> Iterator[np.ndarray]:
            read, last = start["documents"], time.monotonic()
            rest = itertools.islice(documents, read, None)
            for filled, number, over in packed_batches(rest, tokenizer, length, start["rest"]):
                yield from filled
                read += number
                if time.monotonic() - last >= SECONDS_BETWEEN_POSITIONS:
                    last = time.monotonic()
                    out.flush()
                    os.fsync(out.fileno())
                    place = {"documents": read, "rows": rows, "rest": over.tolist()}
                    write_json(position, {**place, "request": request})

        left = None if sequences is None else sequences - rows
        packed = itertools.islice(rows_of_batches(), left)
        for row in progress(packed, "tokens, sequences", total=left):
            out.write(row.astype("<i8").tobytes())
            rows += 1
        try:
            require_filled(rows, length, sequences)
        except UserError:
            shutil.rmtree(work)
            raise
        out.seek(0)
        out.write(packed_header(rows, length, metadata, room))
    flush_to_disk(file)
    position.unlink(missing_ok=True)
    file.rename(path)
    fsync(path.parent)
    shutil.rmtree(work)
    return rows


def packed_header(rows: int, length: int, metadata: dict[str, str], size: int = 0) -> bytes:
    """The safetensors header of int64 input_ids [rows, length], padded with spaces to `size`."""
    notes = {**metadata, "sequences": str(rows), "length": str(length)}
    tensor = {"dtype": "I64", "shape": [rows, length], "data_offsets": [0, rows * length * 8]}
    text = json.dumps({"__metadata__": notes, "input_ids": tensor}).encode()
    # The tensor begins at a multiple of 8.
    text = text.ljust(max(size - 8, -(-len(text) // 8) * 8))
    return len(text).to_bytes(8, "little") + text


def require_filled(rows: int, length: int, sequences: int | None) -> None:
    """Raise a UserError unless the text filled the sequences asked for, or at least one."""
    if rows < (1 if sequences is None else sequences):
        raise UserError(
            f"the text fills {rows} sequences of {length} tokens, not {sequences or 1}; "
            f"give more text, or fewer or shorter sequences"
        )


def mixture(sources: Sequence[tuple[Iterable[str], float]]) -> Iterator[str]:
    """Interleave the documents of several sources by weight; each source keeps its order.

    The next document comes from the source that is furthest behind its share of the characters so
    far, so the mixture is the same each time and its shares hold from the beginning. It ends with
    the first source that ends, since the shares cannot hold beyond.

    Args:
        sources: documents and weight, each weight above 0; only their proportions matter.
    """
    if any(weight <= 0 for _, weight in sources):
        raise UserError("the weights of a mixture must be above 0")
    streams = [iter(documents) for documents, _ in sources]
    used = [0.0] * len(sources)
    while True:
        behind = min(range(len(sources)), key=lambda i: used[i] / sources[i][1])
        try:
            document = next(streams[behind])
        except StopIteration:
            return
        # An empty document still counts, or a source of them would never let another in.
        used[behind] += max(len(document), 1)
        yield document


class PackedTokens(Dataset):
    """The packed sequences in training order: every epoch is a fresh permutation of all rows.

    Item i is a pure function of the file, the seed and i, and item i belongs to step
    i // (sequences a step), whatever the number of processes; so a step number is an exact
    position in the data. Rows are read from a memory map.
    """

    def __init__(self, path: str | Path, seed: int, items: int | None = None) -> None:
        """Open a token file for `items` items (default: one epoch).

        Raises:
            UserError: the file is missing, not safetensors, or has no 2-D integer `input_ids`.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; make one with m2d tokenize")
        try:
            with safe_open(self.path, "np") as file:
                kept = file.get_slice("input_ids")
                shape, dtype = kept.get_shape(), kept.get_dtype()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable token file ({error})") from None
        if len(shape) != 2 or min(shape) < 1 or dtype not in ("I64", "I32", "U32", "U16"):
            raise UserError(
                f"{path}: input_ids is {dtype} {shape}; whole numbers of shape "
                "[sequences, length] are expected"
            )
        self.sequences, self.length = shape
        self.seed = seed
        self.items = items if items is not None else self.sequences
        self._rows: Any = None
        self._order: tuple[int, np.ndarray] | None = None

    def rows(self) -> Any:
        """The memory-mapped `input_ids`; opened on first use, so that workers open their own."""
        if self._rows is None:
            self._rows = safe_open(self.path, "np").get_slice("input_ids")
        return self._rows

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a UserError if any token id lies outside [0, vocab_size)."""
        for start in range(0, self.sequences, 4096):
            part = self.rows()[start : min(start + 4096, self.sequences)]
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= vocab_size:
                raise UserError(
                    f"{self.path}: token id {low if low < 0 else high} is outside the model's "
                    f"vocabulary of {vocab_size}; was it made with another tokenizer?"
                )

    def row_of(self, item: int) -> int:
        """The row of the file that item `item` is."""
        epoch, place = divmod(item, self.sequences)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, generator.permutation(self.sequences))
        return int(self._order[1][place])

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """{"input_ids": int64 [length], "row": int64 []}."""
        row = self.row_of(item)
        ids = self.rows()[row : row + 1][0].astype(np.int64)
        return {"input_ids": torch.from_numpy(ids), "row": torch.tensor(row)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}
