"""What a pass through a teacher shows of every batch at a MoE layer.

Shapes: N tokens, E routed experts, k = top-k, H hidden size.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from m2d.models.experts import StackedExperts


@dataclass(frozen=True, eq=False)
class Visit:
    """A batch of tokens at the experts of a layer."""

    layer: int
    router: nn.Module
    """RouterRows, or a router of E rows."""
    experts: StackedExperts
    hidden: Tensor
    """What the experts are given [N, H]."""
    index: Tensor
    """The experts taken [N, k]."""
    weights: Tensor
    """Their weights [N, k]."""
    norms: Tensor
    """The norms of their outputs [N, k], float32."""
