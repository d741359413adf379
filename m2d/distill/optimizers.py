"""Optimizers of distillation.

A method takes the learning rate's peak and gives torch's class and its arguments; Trainer makes it,
with weight decay on matrices alone, and the schedule moves its learning rate. It is entered in
OPTIMIZERS where it is written; a card says "..., with" and then its words.
"""

from collections.abc import Callable
from typing import Any

from m2d.methods import Table

Optimizer = Callable[[float], tuple[Any, dict[str, Any]]]
OPTIMIZERS: Table[Optimizer] = Table("optimizer", default="adamw")


@OPTIMIZERS.method("AdamW", "AdamW")
def adamw(learning_rate: float) -> tuple[Any, dict[str, Any]]:
    """Adam with decoupled weight decay, torch's defaults: betas 0.9 and 0.999, epsilon 1e-8."""
    from torch.optim import AdamW  # here, so that listing the methods takes no torch

    return AdamW, {"lr": learning_rate, "betas": (0.9, 0.999), "eps": 1e-8}
