"""A pass of tokens through a model's layers that goes on, after a kill, at the last finished layer.

A hidden folder beside the output holds the hidden states after that layer (m2d/models/hidden.py)
and what was added up in the layers before, one file each. It is named by everything that the result
depends on, so that other arguments begin anew, and goes when the output is there.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from m2d import __version__
from m2d.artifacts import atomic_path, make_own_folder, read_json, reading, sha256_of, write_json
from m2d.errors import UserError
from m2d.models.visit import Visit
from m2d.progress import say

# A layer's end is kept where the last one that was kept is so many seconds ago.
SECONDS_BETWEEN = 10.0

# Says how far a pass has come, and so that there is something to go on from (m2d.claims).
FINISHED = "finished.json"

Arrays = dict[str, np.ndarray]


class Results(Protocol):
    """What a pass finds, layer by layer."""

    def state(self, layer: int) -> Arrays:
        """All of a finished layer."""

    def restore(self, layer: int, state: Arrays) -> None:
        """The layer as `state` gave it."""


class Totals(Results, Protocol):
    """What a pass adds up, layer by layer."""

    def visit(self, seen: Visit) -> None:
        """Add a batch of a layer."""


Found = TypeVar("Found", bound=Results)


class States(Protocol):
    """The hidden states that a pass has come to."""

    def keep(self) -> int:
        """Make them outlast this process; gives the number of their file."""


Keeper = Callable[[str, Totals], "Kept[Totals]"]
"""Gives the pass of a name, with its totals, a place to be kept in."""


class Together:
    """Several totals of one pass, as one."""

    def __init__(self, **parts: Totals):
        self.parts = parts

    def visit(self, seen: Visit) -> None:
        for part in self.parts.values():
            part.visit(seen)

    def state(self, layer: int) -> Arrays:
        return {
            f"{name}/{key}": value
            for name, part in self.parts.items()
            for key, value in part.state(layer).items()
        }

    def restore(self, layer: int, state: Arrays) -> None:
        for name, part in self.parts.items():
            own = {k.split("/", 1)[1]: v for k, v in state.items() if k.startswith(f"{name}/")}
            part.restore(layer, own)


def kept_folder(out: str | Path, what: dict[str, Any]) -> Path:
    """The hidden folder beside `out` of what depends on all that `what` says (JSON values)."""
    out = Path(out)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return out.parent / f".{out.name}.layers-{digest}"


def keeper(out: str | Path, what: dict[str, Any]) -> Keeper:
    """Keeps the passes that make one output, told apart by their names."""

    def keep(kind: str, totals: Totals) -> Kept[Totals]:
        return Kept(out, totals, {**what, "kind": kind})

    return keep


class Kept(Generic[Found]):
    """What a pass keeps beside its output. `finished`: how many layers need not be run again."""

    def __init__(self, out: str | Path, totals: Found, what: dict[str, Any]):
        """what: all that the totals depend on, JSON values only; see `identity`."""
        self.folder = kept_folder(out, what)
        self.totals = totals
        self.finished = self.file = 0  # the layers, and the file of the states after them
        self.last = time.monotonic()
        self.unsaved: list[int] = []

    def open(self, layers: list[int]) -> None:
        """Take up what an earlier run has kept. layers: the indices of those that are visited."""
        self.layers = set(layers)
        make_own_folder(self.folder)
        if not (self.folder / FINISHED).is_file():
            return
        try:
            with reading(self.folder / FINISHED, "what a pass has kept"):
                state = read_json(self.folder / FINISHED)
                self.finished, self.file = int(state["finished"]), int(state["file"])
                for layer in layers:
                    if layer < self.finished:
                        self.totals.restore(layer, load_file(self._of(layer)))
        except UserError as error:
            raise UserError(f"{error}; remove {self.folder} to begin anew") from None
        say(f"going on after layer {self.finished} of an earlier run, in {self.folder}")

    def done(self, layer: int, hidden: States, last: bool) -> None:
        """A layer is finished; keep it, unless another one was kept just before."""
        if layer in self.layers:
            self.unsaved.append(layer)
        if time.monotonic() - self.last < SECONDS_BETWEEN:
            return
        for index in self.unsaved:
            with atomic_path(self._of(index)) as temporary:
                save_file(self.totals.state(index), temporary)
        self.unsaved = []
        self.file = self.file if last else hidden.keep()
        write_json(self.folder / FINISHED, {"finished": layer + 1, "file": self.file})
        self.last = time.monotonic()

    def _of(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"


def remove_kept(out: str | Path) -> None:
    """Remove what passes for this output have kept, once it is there."""
    for folder in Path(out).parent.glob(f".{escape(Path(out).name)}.layers-*"):
        shutil.rmtree(folder, ignore_errors=True)


def identity(
    folder: Path, tokens: Tensor, batch: int, dtype: torch.dtype, **others: Any
) -> dict[str, Any]:
    """What a pass depends on: the model's files (config by content, weights by size and time), the
    tokens, and how they are computed.
    """
    weights = sorted(f for f in folder.iterdir() if f.suffix == ".safetensors")
    stats = {file.name: file.stat() for file in weights}
    return {
        "config_sha256": sha256_of(folder / "config.json"),
        "files": {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()},
        "tokens_sha256": hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest(),
        "shape": list(tokens.shape),
        "batch": batch,
        "dtype": str(dtype),
        "m2d_version": __version__,
        **others,
    }
