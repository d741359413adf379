"""Calibration tokens of the commands that run a teacher on them, from their options."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d.artifacts import sha256_of
from m2d.devices import compute_dtype, dtype_name, pick_device
from m2d.errors import UserError
from m2d.models.teacher import Teacher
from m2d.tokens.encode import BOS
from m2d.tokens.files import cut_to, read_tokens
from m2d.tokens.tokenize import tokens_from

LENGTH = 2048  # tokens of a sequence that is made of text


def calibration(
    args: argparse.Namespace, teacher: Teacher
) -> tuple[Tensor, torch.dtype, torch.device]:
    """--tokens [sequences, length], and what --dtype and --device say of the products.

    Raises UserError where the tokens are not this teacher's, or there is no such device.
    """
    tokens = read_tokens(args.tokens, teacher.config.vocab_size)
    device = pick_device(args.device)
    return tokens, compute_dtype(args.dtype, teacher.dtype, device), device


@dataclass(frozen=True)
class CalibrationSource:
    """Where a teacher's calibration sequences come from: text files, a token file or a dataset."""

    teacher: Teacher
    text: Sequence[str | Path] | None
    tokens: str | Path | None
    dataset: str | None
    """One of the three is given."""
    length: int | None
    """Tokens of a sequence; None: LENGTH, or the token file's own."""
    column: str | None = None
    bos: str = BOS[0]

    def read(self, sequences: int | None) -> Tensor:
        """So many sequences [S, T]; None: all. Raises UserError where there are fewer."""
        vocabulary = self.teacher.config.get_text_config().vocab_size
        if self.tokens is not None:
            return cut_to(read_tokens(self.tokens, vocabulary), sequences, self.length)
        return tokens_from(
            self.teacher.folder, self.text, self.dataset, self.length or LENGTH, sequences,
            column=self.column, bos=self.bos, vocab_size=vocabulary,
        )  # fmt: skip

    def at_most(self, sequences: int) -> Tensor:
        """The same, but all where there are fewer."""
        try:
            return self.read(sequences)
        except UserError:
            return self.read(None)[:sequences]

    def record(self, input_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """What m2d.json says of sequences [S, T] that were read, and of what they ran in."""
        files = [self.tokens] if self.tokens is not None else self.text or []
        sequences, length = input_ids.shape
        return {
            "source": ", ".join(Path(file).name for file in files) or str(self.dataset),
            "sequences": sequences,
            "length": length,
            **({} if self.tokens is None else {"sha256": sha256_of(self.tokens)}),
            "compute_dtype": dtype_name(dtype),
        }
