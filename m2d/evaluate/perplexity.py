"""Perplexity of any causal LM: token-level, over non-overlapping windows.

Protocol: every window of `length` tokens is scored on its own; its first token is context only, so
length - 1 tokens are predicted; perplexity = exp(sum of negative log-likelihoods / tokens
predicted), with log-likelihoods in float32 and their sum in float64.
"""

import argparse
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2d.artifacts import write_json
from m2d.devices import announce, compute_dtype, computed_on, dtype_name, pick_device
from m2d.errors import UserError
from m2d.models.fingerprint import fingerprint
from m2d.models.hub import name_of
from m2d.models.load import load_model
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import (
    dtype_of,
    has_experts,
    locate,
    open_teacher,
    read_config,
)
from m2d.options import add_compute_options, positive
from m2d.progress import progress
from m2d.tokens.files import cut_to, read_tokens
from m2d.tokens.tokenize import add_text_options, tokens_from

PROTOCOL = "token-level, non-overlapping windows, the first token of each is not predicted"
# Logits are widened to float32 for so many elements at a time: on a CPU what its cache holds.
LOGITS_AT_ONCE = {"cpu": 2**19, "other": 2**26}
NO_TOKEN = -100  # what cross_entropy ignores
# Nats per token; the exponential of more is no number.
LARGEST_NLL = 709.0


@dataclass(frozen=True)
class Perplexity:
    """The result, with what it was measured on."""

    model: str
    perplexity: float
    nll: float  # mean negative log-likelihood per predicted token, nats
    n_tokens: int  # predicted tokens
    length: int
    sequences: int
    stderr: float | None  # of the perplexity; None with one window
    dtype: str  # of the computation
    computed_on: dict[str, Any]  # m2d.devices.computed_on
    model_fingerprint: str | None  # of the weights
    tokens_sha256: str  # of the ids, int64 in rows of `length`
    protocol: str = PROTOCOL


def nll_sums(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Summed negative log-likelihood (nats) of tokens 1.. of each sequence [B], float64.

    logits [B, T, V] of ids [B, T].
    """
    targets = torch.full_like(input_ids, NO_TOKEN, dtype=torch.int64)
    targets[:, :-1] = input_ids[:, 1:]
    at_once = LOGITS_AT_ONCE["cpu" if logits.device.type == "cpu" else "other"]
    rows = max(1, at_once // logits.shape[-1])
    losses = [
        functional.cross_entropy(
            part.float(), target.to(part.device), reduction="none", ignore_index=NO_TOKEN
        )
        for part, target in zip(
            logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True
        )
    ]
    return torch.cat(losses).double().cpu().view(len(input_ids), -1).sum(1)


@torch.no_grad()
def loaded_nll(model: nn.Module, tokens: Tensor, batch: int, device: torch.device) -> Tensor:
    """Summed negative log-likelihood [S] of tokens [S, T] under a model in memory."""
    return torch.cat(
        [
            nll_sums(model(ids.to(device), use_cache=False).logits, ids)
            for ids in tokens.split(batch)
        ]
    )


def streamed_nll(stream: StreamedTeacher, tokens: Tensor, batch: int) -> Tensor:
    """The same under a teacher that passes through memory layer by layer."""
    hidden = stream.run(tokens, batch, title="perplexity, layers")
    return torch.cat(
        [
            nll_sums(stream.logits(ids, last, slice(None)), ids)
            for ids, last in zip(tokens.split(batch), hidden, strict=True)
        ]
    )


def digest_of_tokens(tokens: Tensor) -> str:
    """SHA-256 of ids [S, T], as int64."""
    return hashlib.sha256(tokens.long().contiguous().numpy().tobytes()).hexdigest()


def make_result(
    model: str,
    sums: Tensor,
    tokens: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    weights: str | None,
) -> Perplexity:
    """Perplexity from the summed negative log-likelihoods [S] of tokens [S, T].

    weights: their fingerprint; None for a model that is in no folder.
    """
    sequences, length = tokens.shape
    nll = float(sums.sum()) / (sequences * (length - 1))
    perplexity = math.exp(nll) if nll < LARGEST_NLL else math.inf  # NaN stays NaN
    error = None
    if sequences > 1 and perplexity < math.inf:
        error = perplexity * float((sums / (length - 1)).std()) / math.sqrt(sequences)
    predicted = sequences * (length - 1)
    return Perplexity(
        model=model,
        perplexity=perplexity,
        nll=nll,
        n_tokens=predicted,
        length=length,
        sequences=sequences,
        stderr=error,
        dtype=dtype_name(dtype),
        computed_on=computed_on(device),
        model_fingerprint=weights,
        tokens_sha256=digest_of_tokens(tokens),
    )


def measure(
    model: str | Path, tokens: Tensor, batch: int, dtype: str | None, device: torch.device
) -> Perplexity:
    """Perplexity of a model folder or hub id on tokens [S, T]."""
    folder = locate(model)
    _, config = read_config(folder)
    stored = dtype_of(config, folder)
    chosen = compute_dtype(dtype, stored, device)
    if has_experts(model):
        stream = StreamedTeacher(open_teacher(model), chosen, device)
        sums = streamed_nll(stream, tokens, batch)
    else:
        announce(folder.name, stored, chosen, device)
        network = load_model(folder, config, chosen, device, narrow=True)
        parts = progress(tokens.split(batch), "perplexity, batches")
        sums = torch.cat([loaded_nll(network, part, batch, device) for part in parts])
    name, weights = Path(name_of(model)).name, fingerprint(folder)
    result = make_result(name, sums, tokens, chosen, device, weights)
    if not math.isfinite(result.perplexity):
        raise UserError(
            f"{model}: its loss is {result.nll:.6g} nats per token, which is no perplexity; are "
            "its weights numbers that --dtype can hold?"
        )
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id, teacher or student")
    add_text_options(parser).add_argument("--tokens", help="token file from m2d tokenize")
    parser.add_argument(
        "--length", type=positive, help="window, tokens (default: the file's; 2048)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="also write it to this file, .json")
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    _, config = read_config(locate(args.model))
    vocabulary = config.get_text_config().vocab_size
    if args.tokens:
        tokens = cut_to(read_tokens(args.tokens, vocabulary), None, args.length)
    else:
        tokens = tokens_from(
            args.model, args.text, args.dataset, args.length or 2048, None,
            column=args.column, bos=args.bos, vocab_size=vocabulary,
        )  # fmt: skip
    result = measure(args.model, tokens, args.batch, args.dtype, pick_device(args.device))
    if args.out:
        write_json(args.out, asdict(result))
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        error = "" if result.stderr is None else f" ± {result.stderr:.2g}"
        print(
            f"perplexity {result.perplexity:.4f}{error} over {result.n_tokens} tokens "
            f"({result.sequences} windows of {result.length}; {PROTOCOL})"
        )
