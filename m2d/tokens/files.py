"""Token files (`input_ids`, int64 [sequences, length], safetensors)."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from m2d.errors import UserError


def read_tokens(path: str | Path, vocab_size: int | None = None) -> torch.Tensor:
    """Read input_ids, int64 [sequences, length].

    Raises UserError where the file is unreadable, has no such tensor, or holds ids that a model of
    `vocab_size` tokens does not know.
    """
    try:
        with safe_open(path, "pt") as file:
            if "input_ids" not in file.keys():  # noqa: SIM118 (not a mapping)
                raise UserError(f"{path}: has no tensor 'input_ids'; make one with m2d tokenize")
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
