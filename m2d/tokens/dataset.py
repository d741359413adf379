"""A token file as the data of a training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from m2d.errors import UserError
from m2d.tokens.files import open_tokens


class PackedTokens(Dataset):
    """The packed sequences in training order: every epoch is a fresh permutation of all rows.

    Item i is a pure function of the file, the seed and i, and item i belongs to step
    i // (sequences a step), whatever the number of processes; so a step number is an exact
    position in the data. Rows are read from a memory map.
    """

    def __init__(self, path: str | Path, seed: int, items: int | None = None) -> None:
        """Open a token file for `items` items (default: one epoch).

        Raises:
            UserError: it is no token file (m2d.tokens.files).
        """
        self.file = open_tokens(path)
        self.path, self.masked = self.file.path, bool(self.file.masks)
        self.sequences, self.length = self.file.sequences, self.file.length
        self.seed = seed
        self.items = items if items is not None else self.sequences
        self._handle: Any = None
        self._order: tuple[int, np.ndarray] | None = None

    def handle(self) -> Any:
        """The open file; opened on first use, so that workers open their own."""
        if self._handle is None:
            self._handle = self.file.open()
        return self._handle

    def rows(self) -> Any:
        """The memory-mapped `input_ids`."""
        return self.handle().get_slice("input_ids")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a UserError if any token id lies outside [0, vocab_size), or a mask is no mask.

        And where the masks leave a loss nothing to count.
        """
        self.file.check(vocab_size)
        rows = (self.counted(row) for row in range(self.sequences))
        if self.masked and not any(kept is not None and kept.any() for kept in rows):
            raise UserError(f"{self.path}: by its {', '.join(self.file.masks)} no token counts")

    def row_of(self, item: int) -> int:
        """The row of the file that item `item` is."""
        epoch, place = divmod(item, self.sequences)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, generator.permutation(self.sequences))
        return int(self._order[1][place])

    def counted(self, row: int) -> np.ndarray | None:
        """bool [length]: at which positions the next token is one that the loss counts.

        None without a mask: then the loss counts every position, the last one too.
        """
        kept = self.file.counted(self.handle(), row, row + 1)
        return None if kept is None else np.append(kept[0, 1:], False)

    def counted_in(self, items: range) -> int:
        """How many positions of these items the loss counts."""
        if not self.masked:
            return len(items) * self.length
        rows = (self.counted(self.row_of(item)) for item in items)
        return sum(self.length if kept is None else int(kept.sum()) for kept in rows)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """{"input_ids": int64 [length], "row": int64 [], with a mask "counted": bool [length]}."""
        row = self.row_of(item)
        ids = self.rows()[row : row + 1][0].astype(np.int64)
        found = {"input_ids": torch.from_numpy(ids), "row": torch.tensor(row)}
        kept = self.counted(row)
        return found if kept is None else {**found, "counted": torch.from_numpy(kept)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}
