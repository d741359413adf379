"""Tokens for distillation and calibration: packing text into a token file.

The artifact is one safetensors file with `input_ids`, int64 [sequences, length], and no padding:
documents follow one another, each closed by the end-of-sequence token, and are cut at every
`length` tokens. Where a loss counts some tokens only, uint8 `loss_mask` [sequences, length] is 1
for those that it counts as targets.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from m2d.artifacts import flush_to_disk, fsync, make_own_folder, read_json, write_json
from m2d.errors import UserError
from m2d.progress import progress, say
from m2d.tokens.encode import Encoder, bos_token
from m2d.tokens.rows import Document, text_of

# Documents that go to the tokenizer at once, so that a fast tokenizer can use its threads.
DOCUMENTS_AT_ONCE = 256
SECONDS_BETWEEN_POSITIONS = 60.0


def packed_batches(
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    rest: Sequence[Sequence[int]] = (),
    *,
    bos: str = "auto",
    loss_on: str = "all",
    vocab_size: int | None = None,
) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """Yield, for a batch of documents at a time, what they fill, how many they are, what is over.

    That is int64 [sequences, length, C], a number, and int64 [fewer than length, C], which the next
    batch goes on from, as the first does from `rest`. C is 1, token ids, or 2, with what a loss
    counts (m2d.tokens.encode, which says what `bos` and `loss_on` are). The unfilled last sequence
    is dropped.

    Raises:
        UserError: the tokenizer lacks a special token or a chat template that is needed, its
            template takes none of the chats, or it gives an id outside the vocabulary.
    """
    encode = Encoder(tokenizer, bos, loss_on, vocab_size)
    columns = 2 if encode.masked else 1
    begin = np.empty((0, columns), np.int64)
    if bos == "sequence":
        begin = np.asarray([[bos_token(tokenizer, bos), 0][:columns]], np.int64)
    room = length - len(begin)
    over = np.asarray(rest, np.int64).reshape(-1, columns)
    documents, taken = iter(documents), 0
    while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        over = np.concatenate([over, *encode(batch)])
        taken += len(batch)
        whole = len(over) // room
        filled = over[: whole * room].reshape(whole, room, columns)
        over = over[whole * room :]
        heads = np.broadcast_to(begin, (whole, *begin.shape))
        yield np.concatenate([heads, filled], axis=1), len(batch), over
    if encode.refused and encode.refused == taken:
        raise UserError(f"none of the chats is usable: {encode.reason}")
    if encode.refused:
        say(f"skipped {encode.refused} of {taken} documents: {encode.reason}")


def pack_tokens(
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    sequences: int | None,
    bos: str = "auto",
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Pack documents into int64 [sequences, length] tokens.

    Args:
        documents: texts or chats, in the order in which they are used; read no further than needed.
        tokenizer: a transformers tokenizer.
        length: tokens of a sequence.
        sequences: how many sequences; None takes all that the documents fill.
        bos: where a beginning-of-sequence token stands (m2d.tokens.encode).
        vocab_size: of the model that is to read them, where it is known.

    Raises:
        UserError: too little text for `sequences` (or for one), or as `packed_batches`.
    """
    batches = packed_batches(documents, tokenizer, length, bos=bos, vocab_size=vocab_size)
    rows = list(
        itertools.islice((row[:, 0] for filled, *_ in batches for row in filled), sequences)
    )
    require_filled(len(rows), length, sequences)
    return torch.from_numpy(np.stack(rows))


def write_packed(
    path: str | Path,
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    sequences: int | None,
    metadata: dict[str, str],
    identity: object = None,
    *,
    bos: str = "auto",
    loss_on: str = "all",
    vocab_size: int | None = None,
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
    file, mask, position = work / path.name, work / "loss_mask", work / "position.json"
    options: dict[str, Any] = {"bos": bos, "loss_on": loss_on, "vocab_size": vocab_size}
    request = {"metadata": metadata, "sequences": sequences, "length": length, "of": identity}
    start: dict[str, Any] = {"documents": 0, "rows": 0, "rest": []}
    make_own_folder(work)
    # The header comes first and has the number of rows: room is kept for it, and filled later.
    room = len(packed_header(2**40, length, metadata, masked=True))
    # Through JSON, since a tuple that is written comes back as a list.
    same = json.loads(json.dumps(request | options))
    found = position_in(position, same)
    sizes = {} if found is None else {file: room + found["rows"] * length * 8}
    if found is not None and loss_on != "all":
        sizes[mask] = found["rows"] * length
    if found and all(f.is_file() and f.stat().st_size >= size for f, size in sizes.items()):
        start = found
        say(f"{path}: going on after {start['rows']} sequences")
    else:  # a position is of the tokens beside it: it goes before they do
        position.unlink(missing_ok=True)
        fsync(work)
    with open_own(file) as out, open_own(mask) as mask_out:
        rows = start["rows"]
        out.seek(out.truncate(room + rows * length * 8))
        mask_out.seek(mask_out.truncate(rows * length if loss_on != "all" else 0))

        def rows_of_batches() -> Iterator[np.ndarray]:
            read, last = start["documents"], time.monotonic()
            rest = itertools.islice(documents, read, None)
            batches = packed_batches(rest, tokenizer, length, start["rest"], **options)
            for filled, number, over in batches:
                yield from filled
                read += number
                if time.monotonic() - last >= SECONDS_BETWEEN_POSITIONS:
                    last = time.monotonic()
                    for stream in (mask_out, out):
                        stream.flush()
                        os.fsync(stream.fileno())
                    place = {"documents": read, "rows": rows, "rest": over.tolist()}
                    write_json(position, {**place, "request": same})

        left = None if sequences is None else sequences - rows
        packed = itertools.islice(rows_of_batches(), left)
        try:
            for row in progress(packed, "tokens, sequences", total=left):
                out.write(row[:, 0].astype("<i8").tobytes())
                if loss_on != "all":
                    mask_out.write(row[:, 1].astype("u1").tobytes())
                rows += 1
            require_filled(rows, length, sequences)
        except UserError:
            shutil.rmtree(work)
            raise
        if loss_on != "all":
            mask_out.seek(0)
            shutil.copyfileobj(mask_out, out)
        out.seek(0)
        out.write(packed_header(rows, length, metadata, room, masked=loss_on != "all"))
    flush_to_disk(file)
    position.unlink(missing_ok=True)
    file.rename(path)
    fsync(path.parent)
    shutil.rmtree(work)
    return rows


def position_in(file: Path, request: object) -> dict[str, Any] | None:
    """Where a killed run of the same request was, if it left a sound note of it."""
    if not file.is_file() or file.is_symlink():
        return None
    try:
        found = read_json(file)
    except UserError:
        return None
    counts = [found.get(key) for key in ("documents", "rows")]
    sound = all(type(count) is int and count >= 0 for count in counts)
    return found if sound and found.get("request") == request else None


def open_own(file: Path) -> BinaryIO:
    """A work file, made if it is not there, to read and write; never what a link points to."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(file, flags, 0o666), "r+b")


def packed_header(
    rows: int, length: int, metadata: dict[str, str], size: int = 0, masked: bool = False
) -> bytes:
    """The safetensors header of int64 input_ids [rows, length], padded with spaces to `size`.

    masked: with uint8 loss_mask of the same shape behind it.
    """
    notes = {**metadata, "sequences": str(rows), "length": str(length)}
    shape, end = [rows, length], rows * length * 8
    header: dict[str, Any] = {
        "__metadata__": notes,
        "input_ids": {"dtype": "I64", "shape": shape, "data_offsets": [0, end]},
    }
    if masked:
        place = [end, end + rows * length]
        header["loss_mask"] = {"dtype": "U8", "shape": shape, "data_offsets": place}
    text = json.dumps(header).encode()
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


def mixture(sources: Sequence[tuple[Iterable[Document], float]]) -> Iterator[Document]:
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
        used[behind] += max(len(text_of(document)), 1)
        yield document
