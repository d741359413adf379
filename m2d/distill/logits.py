"""A teacher's outputs on a token file, stored once and read by every student's distillation.

Per token the folder holds n token ids and their probabilities: either the n most probable ones
(`top`; the rest of the mass is 1 minus their sum), or those of n draws from the distribution with
their shares of the draws (`sampled`; unbiased: the expected gradient is that of full forward KL).

Layout: index.json, and shards of consecutive rows of the token file, shard-I.safetensors, with
`ids` [rows, length, n] (uint16 where the vocabulary allows, else int32) and `log_p` float16 of the
same shape (-inf fills up). A shard appears whole or not at all, so jobs can share the work and be
stopped: what is there is not made again.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2d.artifacts import atomic_path, read_json, reading, sha256_of, write_json
from m2d.distill.heads import Head
from m2d.errors import UserError
from m2d.models.entries import read_header
from m2d.sealed import digest_of

KINDS = ("top", "sampled")
SHARD = re.compile(r"shard-(\d{5,})\.safetensors")


def top_outputs(z_RV: Tensor, n: int, generator: Any = None) -> tuple[Tensor, Tensor]:
    """The n most probable tokens, ids and log-probabilities [R, n], of float32 logits."""
    log_p, ids = torch.log_softmax(z_RV, -1).topk(n, -1)
    return ids, log_p


def sampled_outputs(z_RV: Tensor, n: int, generator: Any = None) -> tuple[Tensor, Tensor]:
    """n draws with replacement from softmax(z): distinct ids and the log of their shares, [R, n].

    A token drawn several times stands once, with its share; what is left over is filled with -inf.
    """
    draws = torch.multinomial(z_RV.softmax(-1), n, replacement=True, generator=generator)
    draws = draws.sort(-1).values
    same = torch.zeros_like(draws, dtype=torch.bool)
    same[:, 1:] = draws[:, 1:] == draws[:, :-1]
    place = (~same).cumsum(-1) - 1  # which distinct token each draw is
    shares = torch.zeros(draws.shape, device=draws.device).scatter_add_(
        -1, place, torch.full(draws.shape, 1 / n, device=draws.device)
    )
    ids = torch.zeros_like(draws).scatter_(-1, place, draws)
    return ids, shares.log()


MAKERS = {"top": top_outputs, "sampled": sampled_outputs}


def outputs_of(
    hidden_TH: Tensor, head: Head, kind: str, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """ids int64 and log-probabilities float32, [T, n], of final hidden states, by small chunks."""
    rows = max(1, 2**24 // len(head.weight_VH))
    parts = [MAKERS[kind](head.logits(x), n, generator) for x in hidden_TH.split(rows)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([log_p for _, log_p in parts])


def shard_rows(sequences: int, rows: int) -> Iterator[tuple[int, range]]:
    """Number and rows of every shard."""
    for number, start in enumerate(range(0, sequences, rows)):
        yield number, range(start, min(start + rows, sequences))


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def missing_shards(folder: Path, sequences: int, rows: int) -> tuple[int, int, Path | None]:
    """How many shards there should be, how many are missing, and the first that is.

    It takes as long as there are files, however many an index speaks of.
    """
    total = -(-sequences // rows)
    there = shards_in(folder)
    first = next((n for n in range(total) if n not in there), None)
    missing = total - sum(number < total for number in there)
    return total, missing, None if first is None else shard_path(folder, first)


def shards_in(folder: Path) -> dict[int, Path]:
    """The files of shards by number, in order."""
    numbers = sorted(int(m[1]) for file in folder.iterdir() if (m := SHARD.fullmatch(file.name)))
    paths = {number: shard_path(folder, number) for number in numbers}
    return {number: file for number, file in paths.items() if file.is_file()}


def check_index(folder: Path, index: dict[str, Any]) -> None:
    """Raise a UserError where the folder is one of other outputs."""
    file = folder / "index.json"
    if file.exists() and (found := read_json(file)) != index:
        differs = next(key for key in index if found.get(key) != index[key])
        raise UserError(
            f"{folder}: holds outputs of {differs} {found.get(differs)}, not {index[differs]}; "
            "name another folder or remove it"
        )


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json, or check that the folder is one of the same outputs."""
    check_index(folder, index)
    if not (folder / "index.json").exists():
        write_json(folder / "index.json", index)


def write_shard(
    path: Path, ids: Tensor, log_p: Tensor, vocabulary: int, index: dict[str, Any]
) -> None:
    """Write ids and log_p, [rows, length, n], marked as a shard of that index, and the index.

    Raises UserError where a log-probability is NaN; -inf fills up.
    """
    if bool(log_p.isnan().any()):
        raise UserError(
            f"{path}: the teacher's logits are not finite, so nothing is written; do its weights "
            "and --dtype go together?"
        )
    write_index(path.parent, index)
    small = torch.uint16 if vocabulary <= 2**16 else torch.int32
    tensors = {"ids": ids.to(small).contiguous(), "log_p": log_p.half().contiguous()}
    digest = digest_of({name: tensor.numpy() for name, tensor in tensors.items()})
    marks = {"shard": path.stem, "index_sha256": index_digest(index), "sha256": digest}
    with atomic_path(path) as temporary:
        # One key: safetensors writes several in any order, and a file's bytes should be its own.
        save_file(tensors, temporary, {"m2d": json.dumps(marks)})


def marks_of(path: Path) -> dict[str, Any]:
    """What a shard says of itself: shard, index_sha256, sha256; empty where it says nothing."""
    with reading(path, "a shard of m2d teacher-logits"):
        marks = json.loads(read_header(path)[1].get("m2d", "{}"))
        if not isinstance(marks, dict):
            raise ValueError("its metadata is no mapping")
    return marks


def index_digest(index: dict[str, Any]) -> str:
    """Of what the shards of a folder have in common."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder of outputs. Raises UserError where it is none."""
    file = folder / "index.json"
    index = read_json(file)
    with reading(file, "an index of m2d teacher-logits"):
        for key in ("size", "vocabulary", "sequences", "length", "rows_of_shard"):
            if type(index[key]) is not int or not 1 <= index[key] < 2**40:
                raise ValueError(f"{key} is {str(index[key])[:40]!r}, and must be a whole number")
        if index["kind"] not in KINDS or not isinstance(index["tokens_sha256"], str):
            raise ValueError("its kind or its tokens_sha256 makes no sense")
    return index


def check_shard(path: Path, index: dict[str, Any], rows: int) -> None:
    """Raise a UserError unless the header of a shard is of `rows` rows of these outputs."""
    shape = [rows, index["length"], index["size"]]
    with reading(path, "a shard of m2d teacher-logits"), safe_open(path, "np") as file:
        for key, kinds in (("ids", ("U16", "I32")), ("log_p", ("F16",))):
            part = file.get_slice(key)
            if list(part.get_shape()) != shape or part.get_dtype() not in kinds:
                raise ValueError(f"{key} is {part.get_dtype()} {part.get_shape()}, not {shape}")


class StoredLogits:
    """The rows of a folder of outputs, read from memory maps."""

    def __init__(
        self, folder: str | Path, tokens: Path, vocabulary: int, of_teacher: int | None = None
    ) -> None:
        """vocabulary: the tokens that count, the first ones; `of_teacher`: how many it has.

        Raises UserError unless the folder is complete and of this token file.
        """
        of_teacher = of_teacher or vocabulary
        self.vocabulary = vocabulary
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if self.index["vocabulary"] != of_teacher:
            raise UserError(
                f"{folder}: of a vocabulary of {self.index['vocabulary']} tokens, not {of_teacher}"
            )
        if self.index["tokens_sha256"] != sha256_of(tokens):
            raise UserError(f"{folder}: was not made on {tokens}; make it with m2d teacher-logits")
        self.rows_of_shard = self.index["rows_of_shard"]
        total, missing, first = missing_shards(
            self.folder, self.index["sequences"], self.rows_of_shard
        )
        if first is not None:
            raise UserError(
                f"{folder}: {missing} of {total} shards are missing, the first is {first.name}; "
                "run m2d teacher-logits to the end"
            )
        for number, rows in shard_rows(self.index["sequences"], self.rows_of_shard):
            check_shard(shard_path(self.folder, number), self.index, len(rows))
        expected = index_digest(self.index)
        for number in range(total):
            file = shard_path(self.folder, number)
            marks = marks_of(file)
            if (marks.get("shard"), marks.get("index_sha256")) != (file.stem, expected):
                raise UserError(
                    f"{file}: is a shard of other outputs, or another of these; remove it, and run "
                    "m2d teacher-logits again"
                )
        self._open: dict[int, Any] = {}

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """ids int64 and probabilities float32, [length, n], of a row of the token file."""
        shard, place = divmod(row, self.rows_of_shard)
        path = shard_path(self.folder, shard)
        with reading(path, "a shard of m2d teacher-logits"):
            if shard not in self._open:
                self._open[shard] = safe_open(path, "np")
            file = self._open[shard]
            ids, log_p = (file.get_slice(key)[place : place + 1][0] for key in ("ids", "log_p"))
            shape = (self.index["length"], self.index["size"])
            if ids.shape != shape or log_p.shape != shape:
                raise ValueError(f"it holds {ids.shape} and {log_p.shape} a sequence, not {shape}")
            ids, log_p = ids.astype(np.int64), log_p.astype(np.float32)
            if ids.min() < 0 or ids.max() >= self.index["vocabulary"]:
                raise ValueError("a token id is outside the vocabulary")
            if not (log_p <= 0).all():  # also false for NaN
                raise ValueError("a log-probability is above 0 or NaN")
        p = np.exp(log_p)
        if self.vocabulary < self.index["vocabulary"]:
            # What the student does not have: padding, on which a teacher puts next to nothing.
            outside = ids >= self.vocabulary
            left = np.where(outside, p, 0).sum(-1, keepdims=True)
            p = np.where(outside, 0, p) / np.maximum(1 - left, 1e-7)
            ids = np.where(outside, 0, ids)
        if self.index["kind"] == "sampled":  # shares that add up to 1, also after rounding
            p /= p.sum(-1, keepdims=True)
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(p)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
