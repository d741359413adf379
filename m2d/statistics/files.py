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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from m2d.artifacts import atomic_path
from m2d.choose.layer_statistics import GramStatistics, LayerStatistics, RoutingStatistics
from m2d.errors import UserError

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
GRAM_PARTS = ("gram", "output_dot", "output_sq_norm", "weight_gram", "router_gram")
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
    schema = SCHEMA.with_metadata({"m2d": json.dumps({"format": FORMAT, **metadata})})
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary)


def read_routing(path: str | Path) -> tuple[dict[int, RoutingStatistics], dict[str, Any]]:
    """Routing statistics by layer, and the file's metadata.

    Raises UserError where the file is unreadable or not of this format.
    """
    try:
        table = pq.read_table(path)
        metadata = json.loads(table.schema.metadata[b"m2d"])
        columns = {name: table.column(name).to_numpy() for name in SCHEMA.names}
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a routing statistics file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: format {metadata.get('format')!r}; this version reads {FORMAT}")
    layers = {}
    for layer in np.unique(columns["layer"]):
        rows = np.flatnonzero(columns["layer"] == layer)
        rows = rows[np.argsort(columns["expert"][rows])]
        if columns["expert"][rows].tolist() != list(range(len(rows))):
            raise UserError(f"{path}: layer {layer} does not have one row per expert")
        layers[int(layer)] = RoutingStatistics(
            n_tokens=int(columns["n_tokens"][rows[0]]),
            n_selected=columns["n_selected"][rows].astype(np.float64),
            **{name: columns[name][rows] for name in SUMS},
        )
    return layers, metadata


def write_gram(
    path: str | Path, layers: Mapping[int, GramStatistics], metadata: dict[str, Any]
) -> None:
    """Write every layer's Gram statistics as float32 tensors `layers.{layer}.{part}`."""
    tensors = {
        f"layers.{layer}.{part}": np.atleast_1d(np.asarray(getattr(gram, part), np.float32))
        for layer, gram in sorted(layers.items())
        for part in GRAM_PARTS
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"m2d": json.dumps({"format": FORMAT, **metadata})})


def read_gram(path: str | Path) -> tuple[dict[int, GramStatistics], dict[str, Any]]:
    """Gram statistics by layer in float64, and the file's metadata.

    Raises UserError where the file is unreadable or not of this format.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = json.loads((file.metadata() or {})["m2d"])
            names = list(file.keys())
            layers = sorted({int(name.split(".")[1]) for name in names})
            parts = {
                layer: {
                    part: file.get_tensor(f"layers.{layer}.{part}").astype(np.float64)
                    for part in GRAM_PARTS
                }
                for layer in layers
            }
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a Gram statistics file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: format {metadata.get('format')!r}; this version reads {FORMAT}")
    return {
        layer: GramStatistics(
            **{**arrays, "output_sq_norm": float(arrays["output_sq_norm"].reshape(-1)[0])}
        )
        for layer, arrays in parts.items()
    }, metadata


def read_layers(statistics: str | Path, gram: str | Path) -> list[LayerStatistics]:
    """Both files joined, in the order of layers.

    Raises UserError where they were not made from the same teacher and calibration tokens.
    """
    routing, about_routing = read_routing(statistics)
    grams, about_gram = read_gram(gram)
    for key in ("model_type", "num_experts", "top_k", "calibration_sha256"):
        if about_routing.get(key) != about_gram.get(key):
            raise UserError(
                f"{gram}: {key} is {about_gram.get(key)!r}, but {about_routing.get(key)!r} in "
                f"{statistics}; make both from the same teacher and calibration tokens"
            )
    if set(routing) != set(grams):
        raise UserError(f"{gram}: has layers {sorted(grams)}, {statistics} has {sorted(routing)}")
    top_k = int(about_routing["top_k"])
    return [
        LayerStatistics(layer, top_k, routing[layer], grams[layer]) for layer in sorted(routing)
    ]
