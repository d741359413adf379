"""Token files: safetensors with `input_ids`, whole numbers [sequences, length].

Beside it may stand, of the same shape, what a loss counts: `loss_mask` (1: the token is a target),
`labels` (-100: it is not; as input_ids otherwise) or `attention_mask` (0: padding, at the end).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from m2d.errors import UserError

INTEGERS = ("I64", "I32", "I16", "U32", "U16")
MASKS = ("loss_mask", "labels", "attention_mask")
IGNORED = -100  # the label of a token that a loss does not count, as in torch and transformers
# Sequences that are looked at together.
ROWS_AT_ONCE = 4096

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TokenFile:
    """A token file whose header is sound. Rows are read from a memory map."""

    path: Path
    sequences: int
    length: int
    notes: dict[str, str]  # what it says of itself: source, tokenizer
    masks: tuple[str, ...]  # those of MASKS that it has

    def open(self) -> Any:
        """A handle of the file; not to be passed to other processes."""
        return safe_open(self.path, "np")

    def counted(self, file: Any, start: int, stop: int) -> Array | None:
        """Which tokens of these rows a loss counts as targets, bool; None: every one.

        Raises UserError where the masks make no sense.
        """
        if not self.masks:
            return None
        kept = np.ones((stop - start, self.length), bool)
        for name in self.masks:
            values = file.get_slice(name)[start:stop]
            if name == "labels":
                ids = file.get_slice("input_ids")[start:stop].astype(np.int64)
                if not np.all((values == IGNORED) | (values.astype(np.int64) == ids)):
                    raise UserError(
                        f"{self.path}: labels must be as input_ids, or {IGNORED} where the loss "
                        "does not count the token; the shift to the next token is not theirs"
                    )
                kept &= values != IGNORED
                continue
            if not np.all((values == 0) | (values == 1)):
                raise UserError(f"{self.path}: {name} holds numbers other than 0 and 1")
            if name == "attention_mask" and np.any(np.diff(values.astype(np.int8), axis=1) > 0):
                raise UserError(
                    f"{self.path}: padding must stand at the end of a sequence, not before tokens"
                )
            kept &= values.astype(bool)
        return kept

    def check(self, vocab_size: int | None = None) -> None:
        """Raise UserError for ids outside [0, vocab_size), or masks that make no sense."""
        with self.open() as file:
            for start in range(0, self.sequences, ROWS_AT_ONCE):
                stop = min(start + ROWS_AT_ONCE, self.sequences)
                part = file.get_slice("input_ids")[start:stop]
                low, high = int(part.min()), int(part.max())
                if low < 0 or (vocab_size is not None and high >= vocab_size):
                    wrong = low if low < 0 else high
                    raise UserError(
                        f"{self.path}: token id {wrong} is outside the model's vocabulary of "
                        f"{vocab_size}; was it made with another tokenizer?"
                    )
                self.counted(file, start, stop)


def open_tokens(path: str | Path) -> TokenFile:
    """Check a token file's header. Raises UserError where it is none."""
    path = Path(path)
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}; make a token file with m2d tokenize")
    try:
        with safe_open(path, "np") as file:
            notes = dict(file.metadata() or {})
            names = set(file.keys())
            if "input_ids" not in names:
                raise UserError(f"{path}: has no tensor 'input_ids'; make one with m2d tokenize")
            if unknown := sorted(names - {"input_ids", *MASKS}):
                raise UserError(
                    f"{path}: has {unknown[0]!r}, which m2d would not heed; a token file holds "
                    f"input_ids and perhaps {', '.join(MASKS)}"
                )
            kinds = {}
            for name in ("input_ids", *MASKS):
                if name in names:
                    part = file.get_slice(name)
                    kinds[name] = (list(part.get_shape()), str(part.get_dtype()))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable token file ({error})") from None
    shape, dtype = kinds["input_ids"]
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or dtype not in INTEGERS:
        raise UserError(
            f"{path}: input_ids is {dtype} {shape}; whole numbers of shape [sequences, length], "
            "length at least 2, are expected"
        )
    for name, (other, kind) in kinds.items():
        if other != shape or kind not in (*INTEGERS, "U8", "I8", "BOOL"):
            raise UserError(f"{path}: {name} is {kind} {other}; whole numbers {shape} are expected")
    masks = tuple(name for name in MASKS if name in kinds)
    return TokenFile(path, shape[0], shape[1], notes, masks)


def read_tokens(path: str | Path, vocab_size: int | None = None) -> torch.Tensor:
    """Read input_ids, int64 [sequences, length], of a file without padding.

    What a loss would count is not looked at: statistics are of all tokens.

    Raises UserError where the file is unreadable, has no such tensor, is padded, or holds ids that
    a model of `vocab_size` tokens does not know.
    """
    found = open_tokens(path)
    found.check(vocab_size)
    with found.open() as file:
        ids = file.get_tensor("input_ids").astype(np.int64)
        if "attention_mask" in found.masks and not file.get_tensor("attention_mask").all():
            raise UserError(
                f"{path}: is padded, and statistics would count the padding; m2d tokenize packs "
                "text without"
            )
    return torch.from_numpy(ids)


def cut_to(tokens: torch.Tensor, sequences: int | None, length: int | None) -> torch.Tensor:
    """The first `sequences` windows of `length` tokens, of tokens [S, T]; None: all, T.

    A sequence gives as many windows as fit in it. Raises UserError where there are too few.
    """
    if length is not None and not 2 <= length <= tokens.shape[1]:
        raise UserError(
            f"--length {length}: must lie between 2 and the file's length, {tokens.shape[1]}"
        )
    if length is not None:
        whole = tokens.shape[1] // length * length
        tokens = tokens[:, :whole].reshape(-1, length)
    if sequences is not None and sequences > len(tokens):
        raise UserError(
            f"--sequences {sequences}: the file gives {len(tokens)} of {tokens.shape[1]} tokens"
        )
    return tokens[:sequences]


def read_token_notes(path: str | Path) -> dict[str, str]:
    """What a token file says of itself: source, tokenizer, sequences, length."""
    return open_tokens(path).notes
