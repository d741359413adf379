"""Second moments of activations and of what they should give, added up over tokens.

Shapes: T tokens, W activations (plus one where a bias is fitted too), H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens, float64."""

    n_tokens: int
    hth: Tensor
    """[W, W]: sum_t h_t' h_t."""
    hty: Tensor
    """[W, H]: sum_t h_t' y_t."""
    yty: Tensor
    """[]: sum_t ||y_t||^2."""

    @classmethod
    def zero(cls, width: int, hidden: int, device: torch.device | str = "cpu") -> "Moments":
        """The moments of no token at all."""
        return cls(
            0,
            torch.zeros(width, width, dtype=torch.float64, device=device),
            torch.zeros(width, hidden, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def add(self, h: Tensor, y: Tensor) -> None:
        """Add a block of tokens, h [T, W] and y [T, H]; float64 if theirs, else in float32."""
        exact = torch.float64 if h.dtype == torch.float64 else torch.float32
        h, y = h.to(exact), y.to(exact)
        self.n_tokens += len(h)
        self.hth += h.T @ h
        self.hty += h.T @ y
        self.yty += y.double().square().sum()

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.n_tokens + other.n_tokens,
            self.hth + other.hth,
            self.hty + other.hty,
            self.yty + other.yty,
        )
