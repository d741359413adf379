"""The hidden states between two layers, of every calibration token: in memory, or in files.

Shapes: B sequences of a batch, T tokens of a sequence, H hidden size.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

IN_MEMORY_BYTES = 256_000_000


class HiddenStates(Sequence[Tensor]):
    """Batches of hidden states [B, T, H], each replaced by the next layer's in turn.

    In a folder they can be kept: `keep` leaves those after a layer in one of two files, which
    stays as it is until the next `keep`. Where they are many they lie in the files alone, so that
    memory holds one batch at a time; both files together are twice as large as the states.
    """

    def __init__(self, batches: int, device: torch.device):
        self.batches, self.device = batches, device
        self.memory: dict[int, Tensor] = {}
        self.in_files = False
        self.source = self.target = 0  # the file that is read, the file that is written
        self.kept: int | None = None
        self.shapes: list[tuple[int, ...]] = []
        self.dtype = torch.float32
        self.files: list[int] = []

    def __len__(self) -> int:
        return self.batches

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.batches))]
        if not -self.batches <= index < self.batches:
            raise IndexError(index)
        index %= self.batches
        return self._read(index) if self.in_files else self.memory[index]

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self.in_files:
            self._write(index, value)
        else:
            self.memory[index] = value

    def plan(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        """Say what will be held: the batches' shapes."""
        self.shapes, self.dtype = shapes, dtype
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        self.sizes, self.offsets = sizes, [sum(sizes[:i]) for i in range(len(sizes))]

    def keep_in(self, folder: Path, name: str, limit: float = math.inf) -> None:
        """Name the files, and the bytes above which they alone hold what is planned."""
        flags = os.O_RDWR | os.O_CREAT
        self.files = [os.open(folder / f"{name}-{i}.bin", flags, 0o644) for i in range(2)]
        self.in_files = sum(self.sizes) > limit

    def next_layer(self) -> None:
        """From now on batches are read as the last layer left them, and written as the next one's.

        What is kept is not written over.
        """
        self.source = self.target
        self.target = self.source if self.source != self.kept else 1 - self.source

    def keep(self) -> int:
        """Make what the last layer left outlast this process; gives the file's number."""
        if not self.in_files:
            self.target = 0 if self.kept is None else 1 - self.kept
            for index in range(self.batches):
                self._write(index, self.memory[index])
        os.fsync(self.files[self.target])
        self.kept = self.target
        return self.kept

    def restore(self, file: int) -> None:
        """Go on from what a file has kept."""
        self.kept = self.source = self.target = file
        if not self.in_files:
            self.memory = {index: self._read(index) for index in range(self.batches)}

    def close(self) -> None:
        """Close the files; what is in them can no longer be read here."""
        for file in self.files:
            os.close(file)
        self.files = []

    def _read(self, index: int) -> Tensor:
        # Where torch allocates it, since products depend to the last bit on where a tensor begins.
        flat = torch.empty(self.sizes[index], dtype=torch.uint8)
        view, done = memoryview(flat.numpy().data), 0
        while done < len(view):
            read = os.preadv(self.files[self.source], [view[done:]], self.offsets[index] + done)
            if not read:
                raise OSError("a file of hidden states is shorter than it was")
            done += read
        return flat.view(self.dtype).view(self.shapes[index]).to(self.device)

    def _write(self, index: int, value: Tensor) -> None:
        if tuple(value.shape) != self.shapes[index] or value.dtype != self.dtype:
            raise ValueError(f"a layer gives {value.dtype} {list(value.shape)}")
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        view, done = memoryview(flat.numpy().data), 0
        while done < len(view):
            done += os.pwrite(self.files[self.target], view[done:], self.offsets[index] + done)


class SeveralStates:
    """The hidden states of several models that are run side by side, kept together; or of none."""

    def __init__(self, folder: Path = Path(), states: Sequence[HiddenStates] = ()):
        self.states = states
        for number, one in enumerate(states):
            one.keep_in(folder, f"hidden-{number}")

    def keep(self) -> int:
        """Keep them all; gives their files' one number."""
        return max((one.keep() for one in self.states), default=0)

    def restore(self, file: int) -> None:
        """Go on from what files of a number have kept."""
        for one in self.states:
            one.restore(file)

    def close(self) -> None:
        """Close the files."""
        for one in self.states:
            one.close()
