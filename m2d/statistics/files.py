"""The two statistics files: routing sums as Parquet, Gram matrices as safetensors.

Formats: docs/method.md. Reading needs no torch, so that ranking starts at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file

from m2d.artifacts import atomic_path, reading
from m2d.choose.layer_statistics import GramStatistics, LayerStatistics, RoutingStatistics
from m2d.errors import UserError
from m2d.sealed import digest_of, require_digest, require_finite_arrays
from m2d.statistics.identities import require_routing, require_symmetric

FORMAT = 1
SUMS = (
    "prob_sum",
    "prob_sum_selected",
    "weight_sum",
    "out_norm_sum_selected",
    "weighted_out_norm_sum",
    "out_sq_norm_sum_selected",
)
SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("expert", pa.int32()),
        ("n_tokens", pa.int64()),
        ("n_selected", pa.int64()),
        *((name, pa.float64()) for name in SUMS),
    ]
)
# Of layers whose shared expert has a gate, the same in every row.
SHARED = pa.field("shared_weight_sum", pa.float64())
GRAM_PARTS = ("gram", "output_dot", "output_sq_norm", "weight_gram", "router_gram")
ADDED_PARTS = ("output_norm",)  # files of earlier releases have none
Array = npt.NDArray[Any]


def write_routing(
    path: str | Path, layers: Mapping[int, RoutingStatistics], metadata: dict[str, Any]
) -> None:
    """Write one row per layer and expert, and `metadata` as JSON under the schema key "m2d"."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for layer, routing in sorted(layers.items()):
        experts = len(routing.n_selected)
        columns["layer"] += [layer] * experts
        columns["expert"] += range(experts)
        columns["n_tokens"] += [routing.n_tokens] * experts
        columns["n_selected"] += routing.n_selected.astype(np.int64).tolist()
        for name in SUMS:
            columns[name] += getattr(routing, name).tolist()
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    schema = SCHEMA
    if any(routing.shared_weight_sum is not None for routing in layers.values()):
        schema = SCHEMA.append(SHARED)
        columns[SHARED.name] = [
            routing.shared_weight_sum
            for _, routing in sorted(layers.items())
            for _ in routing.n_selected
        ]
    require_finite_arrays(path, {name: _numbers(column) for name, column in columns.items()})
    about = {"format": FORMAT, "sha256": digest_of(arrays), **metadata}
    schema = schema.with_metadata({"m2d": json.dumps(about)})
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary)


def _numbers(column: list[Any]) -> Array:
    """A column without what is not there."""
    return np.asarray([value for value in column if value is not None])


def routing_columns(path: str | Path) -> dict[str, Array]:
    """The columns of routing statistics, as their digest is of them."""
    table = pq.read_table(path)
    columns = {name: table.column(name).to_numpy() for name in SCHEMA.names}
    return {name: column.astype(f"{column.dtype.kind}8") for name, column in columns.items()}


def read_routing(path: str | Path) -> tuple[dict[int, RoutingStatistics], dict[str, Any]]:
    """Routing statistics by layer, and the file's metadata.

    Raises UserError where the file is unreadable, not of this format, or counts what cannot be.
    """
    with reading(path, "a routing statistics file"):
        table = pq.read_table(path)
        metadata = json.loads(table.schema.metadata[b"m2d"])
        check_format(path, metadata)
        shared = table.column(SHARED.name) if SHARED.name in table.column_names else None
        table = table.select(SCHEMA.names).cast(SCHEMA.remove_metadata())
        require_digest(path, routing_columns(path), metadata)
        columns = {name: table.column(name).to_numpy() for name in SCHEMA.names}
        layers = {}
        for layer in np.unique(columns["layer"]):
            rows = np.flatnonzero(columns["layer"] == layer)
            rows = rows[np.argsort(columns["expert"][rows])]
            if columns["expert"][rows].tolist() != list(range(len(rows))):
                raise UserError(f"{path}: layer {layer} does not have one row per expert")
            if len(np.unique(columns["n_tokens"][rows])) > 1:
                raise UserError(f"{path}: layer {layer}: n_tokens differs between its experts")
            layers[int(layer)] = RoutingStatistics(
                n_tokens=int(columns["n_tokens"][rows[0]]),
                n_selected=columns["n_selected"][rows].astype(np.float64),
                **{name: columns[name][rows].astype(np.float64) for name in SUMS},
                shared_weight_sum=None if shared is None else shared[int(rows[0])].as_py(),
            )
        if not layers:
            raise ValueError("it has no layer")
        for index, routing in layers.items():
            require_routing(path, index, int(metadata["top_k"]), routing)
        return layers, metadata


def write_gram(
    path: str | Path, layers: Mapping[int, GramStatistics], metadata: dict[str, Any]
) -> None:
    """Write every layer's Gram statistics as float32 tensors `layers.{layer}.{part}`."""
    tensors = {
        f"layers.{layer}.{part}": np.atleast_1d(np.asarray(getattr(gram, part), np.float32))
        for layer, gram in sorted(layers.items())
        for part in (*GRAM_PARTS, *ADDED_PARTS)
        if getattr(gram, part) is not None
    }
    require_finite_arrays(path, tensors)
    about = {"format": FORMAT, "sha256": digest_of(tensors), **metadata}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"m2d": json.dumps(about)})


def read_gram(path: str | Path) -> tuple[dict[int, GramStatistics], dict[str, Any]]:
    """Gram statistics by layer in float64, and the file's metadata.

    Raises UserError where the file is unreadable, not of this format, or has a matrix that is none
    of inner products.
    """
    with reading(path, "a Gram statistics file"):
        with safe_open(path, "np") as file:
            metadata = json.loads((file.metadata() or {})["m2d"])
            check_format(path, metadata)
            names = list(file.keys())
            require_digest(path, {name: file.get_tensor(name) for name in names}, metadata)
            layers = sorted({int(name.split(".")[1]) for name in names})
            parts = {
                layer: {
                    part: file.get_tensor(f"layers.{layer}.{part}").astype(np.float64)
                    for part in (*GRAM_PARTS, *ADDED_PARTS)
                    if part in GRAM_PARTS or f"layers.{layer}.{part}" in names
                }
                for layer in layers
            }
        grams = {
            layer: GramStatistics(
                **{**arrays, "output_sq_norm": float(arrays["output_sq_norm"].reshape(-1)[0])}
            )
            for layer, arrays in parts.items()
        }
        for layer, gram in grams.items():
            require_symmetric(path, layer, gram)
        return grams, metadata


def check_format(path: str | Path, metadata: Any, expected: int = FORMAT) -> None:
    """Raise a UserError for a file of another version; ValueError for metadata of no kind."""
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no object")
    if metadata.get("format") != expected:
        found = str(metadata.get("format"))[:40]
        raise UserError(f"{path}: format {found}; this version reads {expected}")


def teacher_of(statistics: str | Path) -> str | None:
    """The fingerprint of the teacher that routing statistics were made from, if they say."""
    with reading(statistics, "a routing statistics file"):
        metadata = pq.read_schema(statistics).metadata or {}
        found = json.loads(metadata[b"m2d"]).get("teacher_fingerprint")
    return None if found is None else str(found)


def read_layers(statistics: str | Path, gram: str | Path) -> list[LayerStatistics]:
    """Both files joined, in the order of layers.

    Raises UserError where they were not made from the same teacher and calibration tokens.
    """
    routing, about_routing = read_routing(statistics)
    grams, about_gram = read_gram(gram)
    keys = ("model_type", "num_experts", "top_k", "calibration_sha256", "teacher_fingerprint")
    for key in keys:
        if about_routing.get(key) != about_gram.get(key):
            raise UserError(
                f"{gram}: {key} is {about_gram.get(key)!r}, but {about_routing.get(key)!r} in "
                f"{statistics}; make both from the same teacher and calibration tokens"
            )
    if set(routing) != set(grams):
        raise UserError(f"{gram}: has layers {sorted(grams)}, {statistics} has {sorted(routing)}")
    with reading(statistics, "a routing statistics file"):
        top_k = int(about_routing["top_k"])
    return [
        LayerStatistics(layer, top_k, routing[layer], grams[layer]) for layer in sorted(routing)
    ]
