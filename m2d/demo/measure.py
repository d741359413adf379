"""What a demo teacher is worth: its perplexity, and how it uses its experts, if it has any.

The usage of an expert is the fraction of tokens that select it; with top-k of E experts and perfect
balance every usage is k / E. L layers, N windows of T tokens.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from m2d.demo.teacher import BATCH, encode, load_tokenizer, watch_routers, windows


@torch.no_grad()
def measure_teacher(
    folder: Path, texts: Sequence[str], domains: Sequence[str], batch: int = BATCH
) -> dict[str, Any]:
    """Perplexity and expert usage of a saved teacher on documents, in windows of `SEQUENCE`.

    Returns a dictionary of: tokens predicted; perplexity (per token; the first token of a window is
    not predicted); bits_per_byte (the same mean loss per token, over the bytes of the documents);
    usage [layers][E] (fraction of tokens that select the expert); usage_by_domain {domain:
    [layers][E]}; and the mutual information in bits, [layers], between a selection's expert and the
    domain of its token (domain_information) and the token itself (token_information): 0 if the
    expert does not depend on it at all, at most log2 E.
    """
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = encode(tokenizer, texts)
    names = sorted(set(domains))
    labels = [np.full(len(d), names.index(n), np.int32) for d, n in zip(ids, domains, strict=True)]
    tokens_NT = torch.from_numpy(windows(ids)).long()
    domains_NT = torch.from_numpy(windows(labels)).long()
    routers = watch_routers(model)
    experts = getattr(model.config, "num_experts", 0)
    layers = model.config.num_hidden_layers if experts else 0
    by_domain = torch.zeros(layers, len(names), experts)
    by_token = torch.zeros(layers, len(tokenizer), experts)
    loss = 0.0
    for tokens, domain in zip(tokens_NT.split(batch), domains_NT.split(batch), strict=True):
        routers.clear()
        logits = model(input_ids=tokens, use_cache=False).logits
        loss += F.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        ).item()
        for layer, (_, selected) in enumerate(routers):
            by_domain[layer] += _pair_counts(domain.flatten(), selected, by_domain[layer].shape)
            by_token[layer] += _pair_counts(tokens.flatten(), selected, by_token[layer].shape)
    predicted = tokens_NT.numel() - len(tokens_NT)
    tokens_per_domain = torch.bincount(domains_NT.flatten(), minlength=len(names))
    bytes_per_token = sum(len(t.encode()) for t in texts) / sum(map(len, ids))
    return {
        "tokens": predicted,
        "perplexity": math.exp(loss / predicted),
        "bits_per_byte": loss / predicted / math.log(2) / bytes_per_token,
        "usage": (by_domain.sum(1) / tokens_NT.numel()).tolist(),
        "usage_by_domain": {
            name: (by_domain[:, i] / tokens_per_domain[i]).tolist() for i, name in enumerate(names)
        },
        "domain_information": [mutual_information(counts) for counts in by_domain],
        "token_information": [mutual_information(counts) for counts in by_token],
    }


def _pair_counts(
    kinds_N: torch.Tensor, selected_Nk: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """How often each kind of token selects each expert: [kinds, E]."""
    pairs = kinds_N[:, None] * shape[1] + selected_Nk
    return torch.bincount(pairs.flatten(), minlength=shape.numel()).view(shape)


def mutual_information(counts: torch.Tensor) -> float:
    """The mutual information, in bits, of the rows and columns of a table of counts."""
    joint = counts.double() / counts.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * (joint / independent).log2()).nansum().item()  # 0 log 0 is 0
