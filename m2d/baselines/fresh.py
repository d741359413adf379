"""New weights, as transformers initialises a model of the same class, one module at a time."""

import hashlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def fresh_tensor(skeleton: PreTrainedModel, name: str, seed: int) -> Tensor:
    """A newly initialised parameter or buffer of a skeleton, float32; the skeleton stays on meta.

    It depends on the seed and the name alone, so tensors can be made in any order.
    """
    path, _, own = name.rpartition(".")
    module = skeleton.get_submodule(path)
    kept = dict(module.named_parameters(recurse=False))
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    try:
        for key, parameter in kept.items():
            setattr(module, key, nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:8]))
            skeleton._init_weights(module)
        return getattr(module, own).detach().clone()
    finally:
        for key, parameter in kept.items():
            setattr(module, key, parameter)
