"""Gram statistics: inner products of all experts' outputs on every calibration token.

Definitions: docs/method.md. Expert outputs are large products in the dtype of the computation;
their inner products are taken over chunks of tokens with float32 accuracy, and added up in float64.
Shapes: N tokens, E experts, H hidden size, I expert intermediate size.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2d.choose.layer_statistics import GramStatistics
from m2d.devices import CHUNK_BYTES, free_memory, multiplies_fast
from m2d.models.experts import TILE, StackedExperts
from m2d.models.folded import FoldedInTurn, Folds, folds_of
from m2d.models.routers import router_gram
from m2d.models.visit import Visit
from m2d.statistics.routing import add_statistics_options, collect
from m2d.statistics.shards import LayerSums, LayerTotals, gram_statistics

COLUMNS_AT_ONCE = 16_384  # columns of the outputs whose products are summed in float32
GPU_PARTS = 128  # so many of these at a time fill a GPU; 1 GB for 128 experts
# Rows of one block of the upper triangle: in smaller ones the products cost more than is saved.
BLOCK_ROWS = 64


def inner_products(rows: Tensor, parts: int | None = None) -> Tensor:
    """rows @ rows.T, float64 [R, R] of [R, M], accumulated in float32 within chunks of M.

    Only blocks on and above the diagonal are computed. Rows of bfloat16 are multiplied as
    bfloat16 (exact products), with float32 sums. parts: chunks at a time; a GPU takes many.
    """
    count, columns = rows.shape
    total = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    at_once = COLUMNS_AT_ONCE * (parts or (GPU_PARTS if rows.is_cuda else 1))
    with _exact_low_precision_products(rows):
        # One buffer for all parts: fresh memory for each would cost more than the products.
        buffer = rows.new_empty(count, min(columns, at_once), dtype=wide)
        for start in range(0, columns, at_once):
            part = buffer[:, : min(at_once, columns - start)]
            part.copy_(rows[:, start : start + at_once])
            whole = part.shape[1] // COLUMNS_AT_ONCE
            if whole > 1:
                chunks, part = part.tensor_split([whole * COLUMNS_AT_ONCE], dim=1)
                batch = chunks.unflatten(1, (whole, -1)).transpose(0, 1)
                total += torch.bmm(batch, batch.mT).sum(0, dtype=torch.float64)
            add_upper_blocks(total, part)
    upper = total.triu()
    return upper + upper.triu(1).T


def add_upper_blocks(total: Tensor, part: Tensor) -> None:
    """Add part @ part.T on and above the diagonal, in blocks of rows."""
    count = len(part)
    step = -(-count // max(1, count // BLOCK_ROWS))
    for top in range(0, count, step):
        total[top : top + step, top:] += part[top : top + step] @ part[top:].T


@contextlib.contextmanager
def _exact_low_precision_products(rows: Tensor) -> Iterator[None]:
    """Let float32 products run on the bfloat16 units where the values are bfloat16 anyway.

    The result is float32 either way; only the factors would be rounded, and they need none.
    """
    if rows.dtype != torch.bfloat16 or not multiplies_fast(torch.bfloat16, rows.device):
        yield
        return
    backends: Any = torch.backends
    backend = backends.cuda.matmul if rows.is_cuda else backends.mkldnn.matmul
    before = backend.fp32_precision
    # On a GPU, TF32 holds every bfloat16 exactly.
    backend.fp32_precision = "tf32" if rows.is_cuda else "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def routed_output(outputs: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """y [N, H]: the weighted sum of the selected experts among outputs [E + 1, N H]."""
    tokens = torch.arange(index.shape[0], device=index.device)[:, None]
    by_token = outputs.unflatten(1, (len(index), -1))
    chosen = by_token[index, tokens]  # [N, k, H]
    return torch.bmm(weights[:, None].to(outputs.dtype), chosen).squeeze(1)


class GramTotals(LayerTotals):
    """Adds up Gram statistics by layer; its `visit` goes to StreamedTeacher.run.

    With `folds`, f_e are the folded experts' outputs; y stays the teacher's.
    """

    def __init__(self, folds: Folds | None = None) -> None:
        super().__init__()  # inner_products [E + 1, E + 1]: experts, then y
        self.folded = FoldedInTurn(folds)
        # [E + 1, N H], reused: fresh memory for every chunk would cost a third of the time.
        self.buffer = torch.empty(0)

    def visit(self, seen: Visit) -> None:
        layer, experts, hidden = seen.layer, seen.experts, seen.hidden
        if layer not in self.layers:
            own = {"weight_gram": weight_gram(experts), "router_gram": router_gram(seen.router)}
            same = {name: value.cpu().numpy() for name, value in own.items()}
            self.layers[layer] = LayerSums(same=same)
        folded = self.folded.at(seen)
        count, size = experts.num_experts + 1, hidden.shape[1]
        chunks = even_chunks(
            len(hidden), chunk_tokens(count * size * hidden.element_size(), hidden)
        )
        width = (chunks[0].stop - chunks[0].start) * size
        if self.buffer.shape != (count, width) or self.buffer.dtype != hidden.dtype:
            self.buffer = hidden.new_empty(count, width)
        for rows in chunks:
            tokens = rows.stop - rows.start
            outputs = self.buffer[:, : tokens * size]
            every_expert(experts, hidden[rows], outputs)
            outputs[-1] = routed_output(outputs, seen.index[rows], seen.weights[rows]).flatten()
            if folded is not experts:
                every_expert(folded, hidden[rows], outputs)
            products = inner_products(outputs).cpu().numpy()
            sums_E = norm_sums(outputs[:-1], tokens).cpu().numpy()
            self.layers[layer].add(
                {
                    "inner_products": products,
                    "out_norm_sum": sums_E,
                    "n_tokens": np.array(float(tokens)),
                }
            )

    def result(self) -> dict[int, GramStatistics]:
        """Gram statistics by layer."""
        return {index: gram_statistics(layer) for index, layer in self.layers.items()}


def norm_sums(outputs: Tensor, tokens: int) -> Tensor:
    """sum_t ||f_e(x_t)||, float64 [E] of outputs [E, N H]."""
    wide = torch.promote_types(outputs.dtype, torch.float32)
    sums = [
        torch.linalg.vector_norm(one.view(tokens, -1), dim=1, dtype=wide).double().sum()
        for one in outputs
    ]
    return torch.stack(sums)


def every_expert(experts: StackedExperts, hidden: Tensor, outputs: Tensor) -> None:
    """f_e(x) of every expert on every token [N, H], into the first E of outputs [E + 1, N H]."""
    for expert in range(experts.num_experts):
        inner, (down, bias) = experts.inner(expert, hidden), experts.down(expert, hidden.dtype)
        out = outputs[expert].view_as(hidden)
        if bias is None:
            torch.mm(inner, down.T, out=out)
        else:
            torch.addmm(bias, inner, down.T, out=out)


def chunk_tokens(token_bytes: int, hidden: Tensor) -> int:
    """Most tokens of a chunk, token_bytes each: a quarter of the free memory holds them.

    On a CPU they are at most CHUNK_BYTES: twice as much is a fifth faster (docs/performance.md),
    but the peak of memory would pass two layers and 1 GB.
    """
    limit = free_memory(hidden.device) // 4
    return max(1, (limit if hidden.is_cuda else min(limit, CHUNK_BYTES)) // token_bytes)


def even_chunks(tokens: int, limit: int) -> list[slice]:
    """Consecutive parts of at most `limit` tokens, the first the largest, whole TILES if it can."""
    size = -(-tokens // -(-tokens // limit))
    tiles = -(-size // TILE) * TILE
    size = tiles if tiles <= limit else size
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def weight_gram(experts: StackedExperts) -> Tensor:
    """W [E, E]: inner products of the experts' own weights, gate, up and down together."""
    return torch.stack([inner_products(p) for p in experts.parameters_of_routed()]).sum(0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    parser.add_argument("--fold", help="file from m2d fold: of the experts folded so")
    add_statistics_options(parser)


def main(args: argparse.Namespace) -> None:
    collect(
        args,
        "gram",
        lambda teacher: GramTotals(folds_of(teacher, args.fold)[0] if args.fold else None),
    )
