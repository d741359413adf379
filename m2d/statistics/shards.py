"""Shares of the statistics: jobs take some calibration sequences each, and one adds them up.

A share's file (safetensors) holds, per layer, `layers.{layer}.sum.{name}`, float64 [2, ...]: a sum
and what rounding took from it (m2d/statistics/sums.py), and `layers.{layer}.same.{name}`, which
every share must agree on. Shares are cut between batches, so that the jobs compute just what one
job would.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from m2d.artifacts import atomic_path, reading
from m2d.choose.layer_statistics import GramStatistics, RoutingStatistics
from m2d.errors import UserError
from m2d.progress import say
from m2d.sealed import digest_of, require_digest, require_finite_arrays
from m2d.statistics.files import write_gram, write_routing
from m2d.statistics.sums import Array, LongSum

FORMAT = 1
KINDS = ("routing", "gram")
SAME = 1e-5


@dataclass
class LayerSums:
    """One layer's sums over tokens, and what is the same whatever the tokens; by name."""

    sums: dict[str, LongSum] = field(default_factory=dict)
    same: dict[str, Array] = field(default_factory=dict)

    def arrays(self) -> dict[str, Array]:
        """All of it, by name; `of_arrays` makes the same of it again, to the bit."""
        sums = {f"sum.{n}": np.stack([total.high, total.low]) for n, total in self.sums.items()}
        return sums | {f"same.{n}": np.ascontiguousarray(v) for n, v in self.same.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> "LayerSums":
        """What `arrays` gave."""
        found = cls()
        for key, value in arrays.items():
            group, name = key.split(".")
            if group == "sum":
                high, low = value
                found.sums[name] = LongSum(np.asarray(high), np.asarray(low))
            else:
                found.same[name] = value
        return found

    def add(self, terms: Mapping[str, Array]) -> None:
        """Add one batch's sums."""
        for name, term in terms.items():
            if name in self.sums:
                self.sums[name].add(term)
            else:
                self.sums[name] = LongSum(term)


class LayerTotals:
    """What a pass adds up, by layer."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerSums] = {}

    def state(self, layer: int) -> dict[str, Any]:
        """A layer's sums (m2d.models.resume.Totals)."""
        return self.layers[layer].arrays()

    def restore(self, layer: int, state: dict[str, Any]) -> None:
        """A layer's sums as `state` gave them."""
        self.layers[layer] = LayerSums.of_arrays(state)


def routing_statistics(layer: LayerSums) -> RoutingStatistics:
    """Routing statistics from the sums of `m2d.statistics.routing.routing_sums`."""
    values = {name: np.asarray(total.value) for name, total in layer.sums.items()}
    shared = values.pop("shared_weight_sum", None)
    return RoutingStatistics(
        n_tokens=int(values.pop("n_tokens")),
        shared_weight_sum=None if shared is None else float(shared),
        **values,
    )


def gram_statistics(layer: LayerSums) -> GramStatistics:
    """Gram statistics from the sums of inner products [E + 1, E + 1], y the last, and of norms."""
    tokens = float(layer.sums["n_tokens"].value)
    mean = np.asarray(layer.sums["inner_products"].value) / tokens
    norms = layer.sums.get("out_norm_sum")  # none in a share of an earlier release
    return GramStatistics(
        gram=mean[:-1, :-1],
        output_dot=mean[:-1, -1],
        output_sq_norm=float(mean[-1, -1]),
        weight_gram=layer.same["weight_gram"],
        router_gram=layer.same["router_gram"],
        output_norm=None if norms is None else np.asarray(norms.value) / tokens,
    )


def write_statistics(
    path: str | Path, kind: str, layers: Mapping[int, LayerSums], metadata: dict[str, Any]
) -> None:
    """Write a statistics file of that kind."""
    if kind == "routing":
        write_routing(path, {i: routing_statistics(one) for i, one in layers.items()}, metadata)
    else:
        write_gram(path, {i: gram_statistics(one) for i, one in layers.items()}, metadata)


def parse_share(text: str) -> tuple[int, int]:
    """An argparse type: i/n, the i-th of n shares, from 1."""
    share, _, shares = text.partition("/")
    if share.isdecimal() and shares.isdecimal() and 1 <= int(share) <= int(shares):
        return int(share), int(shares)
    raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 2/8, the second of eight")


def share_rows(share: tuple[int, int], sequences: int, batch: int) -> slice:
    """The sequences of share i/n: whole batches, as even as they come.

    Raises UserError where there are fewer batches than shares.
    """
    one, shares = share
    batches = -(-sequences // batch)
    if batches < shares:
        raise UserError(
            f"--share {one}/{shares}: {sequences} sequences are {batches} batches of {batch}; give "
            f"at most {batches} shares, or a smaller --batch"
        )
    first, last = (batches * i // shares * batch for i in (one - 1, one))
    return slice(first, min(last, sequences))


def write_share(
    path: str | Path, kind: str, layers: dict[int, LayerSums], metadata: dict[str, Any]
) -> None:
    """Write one share; metadata["share"]: its first sequence, the one after its last, and all."""
    tensors: dict[str, Array] = {}
    for index, layer in layers.items():
        tensors |= {f"layers.{index}.{name}": value for name, value in layer.arrays().items()}
    require_finite_arrays(path, tensors)
    about = {"format": FORMAT, "kind": kind, "sha256": digest_of(tensors), **metadata}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"m2d-share": json.dumps(about)})


def read_share(path: str | Path) -> tuple[dict[int, LayerSums], dict[str, Any]]:
    """One share's layers and metadata; UserError where the file is not a share."""
    with reading(path, "a share from m2d stats or m2d gram"):
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["m2d-share"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            require_digest(path, tensors, about)
            arrays: dict[int, dict[str, Array]] = {}
            for key, value in tensors.items():
                _, index, name = key.split(".", 2)
                arrays.setdefault(int(index), {})[name] = value
            layers = {index: LayerSums.of_arrays(own) for index, own in arrays.items()}
        if about["format"] != FORMAT or about["kind"] not in KINDS:
            raise ValueError(f"format {about['format']!r}, kind {about['kind']!r}")
        first, last, total = (int(part) for part in about["share"])
        about["share"] = [first, last, total]
    return layers, about


def combine(files: Sequence[str | Path]) -> tuple[str, dict[int, LayerSums], dict[str, Any]]:
    """Kind, sums and metadata of all shares together.

    Raises UserError unless the shares are of one kind, teacher and calibration, and are all the
    sequences, each once.
    """
    shares = sorted(((*read_share(file), file) for file in files), key=lambda one: one[1]["share"])
    layers, about, first_file = shares[0]
    _check_complete([(one[1]["share"], one[2]) for one in shares])
    for others, about_other, file in shares[1:]:
        for key in sorted((about.keys() | about_other.keys()) - {"share", "computed_on", "sha256"}):
            if about.get(key) != about_other.get(key):
                raise UserError(
                    f"{file}: {key} is {about_other.get(key)!r}, but {about.get(key)!r} in "
                    f"{first_file}; all shares must be of one kind, teacher and calibration file"
                )
        if shapes_of(layers) != shapes_of(others):
            raise UserError(f"{file}: has other layers or shapes than {first_file}")
        for index, layer in layers.items():
            for name, value in layer.same.items():
                theirs = others[index].same[name]
                # The jobs may have run on different machines, whose last digits differ.
                if not np.allclose(value, theirs, rtol=0, atol=SAME * np.abs(value).max()):
                    raise UserError(
                        f"{file}: {name} of layer {index} differs from that of {first_file}; all "
                        "shares must be of the same teacher"
                    )
            for name, total in layer.sums.items():
                total.merge(others[index].sums[name])
    metadata = {k: v for k, v in about.items() if k not in ("share", "kind", "format", "sha256")}
    return str(about["kind"]), layers, metadata


def _check_complete(shares: Sequence[tuple[list[int], str | Path]]) -> None:
    expected = 0
    for (first, last, _), file in shares:
        if first != expected:
            what = "are missing" if first > expected else "stand in two shares"
            low, high = sorted((first, expected))
            raise UserError(f"{file}: sequences {low} to {high - 1} {what}; give every share once")
        expected = last
    (_, last, total), file = shares[-1]
    if last != total:
        raise UserError(f"{file}: sequences {last} to {total - 1} are missing; give every share")


def shapes_of(layers: dict[int, LayerSums]) -> dict[Any, tuple[int, ...]]:
    """The shape of everything in them."""
    sums = {(i, n): s.high.shape for i, one in layers.items() for n, s in one.sums.items()}
    return sums | {
        (i, n, "same"): v.shape for i, one in layers.items() for n, v in one.same.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the file to write, as from m2d stats or m2d gram")
    parser.add_argument("shares", nargs="+", metavar="SHARE", help="all files made with --share")


def main(args: argparse.Namespace) -> None:
    kind, layers, metadata = combine(args.shares)
    write_statistics(args.out, kind, layers, metadata)
    say(f"{args.out}: {kind} statistics of {len(args.shares)} shares, {len(layers)} layers")
