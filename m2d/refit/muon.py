"""Muon: momentum, orthogonalised; an optimiser for matrices.

Source: Jordan et al. 2024, Muon (the quintic Newton-Schulz iteration and its coefficients). torch's
own orthogonalises in bfloat16, which is unusably slow on a CPU without units for it, and takes no
stacks of matrices.
"""

from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices, by 5 Newton-Schulz steps: [..., rows, columns].

    dtype: of the products, and of what is returned.
    """
    x = matrices.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for matrices and stacks of them.

    An update's root mean square is `scale` times the learning rate; 0.2 is that of an Adam step
    (Liu et al. 2025), so that both optimisers share the learning rate and weight decay. `halves` in
    a group says that two matrices lie one above the other (gate and up). dtype: of the
    orthogonalisation.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "halves": 1, "scale": 0.2}
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                direction = p.grad.lerp(momentum, MOMENTUM)  # Nesterov
                rows = p.shape[-2] // group["halves"]
                stack = direction.view(-1, rows, p.shape[-1])
                update = orthogonalise(stack, self.dtype).view(p.shape)
                update = update * group["scale"] * max(stack.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
