"""Tokens for distillation and calibration: packing text, and reading the packed artifact.

The artifact is one safetensors file with `input_ids`, int64 [sequences, length], and no padding:
documents follow one another, each closed by the end-of-sequence token, and are cut at every
`length` tokens.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from m2d.errors import UserError

# Documents that go to the tokenizer at once, so that a fast tokenizer can use its threads.
DOCUMENTS_AT_ONCE = 256


def iterate_packed(documents: Iterable[str], tokenizer: Any, length: int) -> Iterator[np.ndarray]:
    """Yield int64 [length] sequences of the packed documents; the unfilled last one is dropped.

    No special token is added but the end-of-sequence token after each document. Only a batch of
    documents is held at a time, so that the documents may be a stream.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    rest = np.empty(0, np.int64)
    documents = iter(documents)
    while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        # verbose=False: a document longer than the model's context is no mistake here.
        rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        parts = [np.asarray([*row, tokenizer.eos_token_id], np.int64) for row in rows]
        rest = np.concatenate([rest, *parts])
        whole = len(rest) // length
        yield from rest[: whole * length].reshape(whole, length)
        rest = rest[whole * length :]


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
    rows = list(itertools.islice(iterate_packed(documents, tokenizer, length), sequences))
    if len(rows) < (1 if sequences is None else sequences):
        raise UserError(
            f"the text fills {len(rows)} sequences of {length} tokens, not {sequences or 1}; "
            f"give more text, or fewer or shorter sequences"
        )
    return torch.from_numpy(np.stack(rows))
