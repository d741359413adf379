"""Liger's chunked loss in the place of our own; an optional extra, imported only when asked for."""

import importlib.util

import torch
from torch import Tensor

from m2d.distill.heads import Head
from m2d.distill.loss import default_chunk
from m2d.errors import UserError

# Liger's generalised Jensen-Shannon divergence, by its beta.
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}


def require_liger() -> None:
    """Raise a UserError unless liger-kernel is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "--loss-implementation liger: liger-kernel is not installed; pip install 'm2d[liger]', "
            "or leave the option away"
        )


def liger_loss(
    student_TH: Tensor,
    student_head: Head,
    teacher_TH: Tensor,
    teacher_head: Head,
    *,
    divergence: str,
    temperature: float,
    compiled: bool,
) -> Tensor:
    """As `m2d.distill.loss.distillation_loss`, without a soft cap and without cross-entropy.

    A head's multiplier goes to the hidden states. Softmax and sums are float32 whatever the dtype
    of the products: Liger leaves that to autocast.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if divergence not in BETAS:
        raise UserError(
            f"--loss-implementation liger: knows no {divergence}; it has {', '.join(BETAS)}"
        )
    if student_head.softcap is not None or teacher_head.softcap is not None:
        raise UserError(
            "--loss-implementation liger: does not know this model's soft cap of logits"
        )
    measure = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETAS[divergence],
        temperature=temperature,
        compiled=compiled,
        chunk_size=default_chunk(len(student_head.weight_VH)),
    )
    device = student_TH.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else student_TH.dtype
    low = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device, dtype=dtype, enabled=low):
        mean = measure(
            student_TH * student_head.multiplier,
            student_head.weight_VH.float(),  # the gradients of all chunks are summed in its dtype
            teacher_TH * teacher_head.multiplier,
            teacher_head.weight_VH,
            torch.zeros(len(student_TH), dtype=torch.long, device=student_TH.device),
            _scaled_bias(student_head),
            _scaled_bias(teacher_head),
        )
    return mean.float() * len(student_TH) * temperature**2


def _scaled_bias(head: Head) -> Tensor | None:
    return None if head.bias_V is None else head.bias_V * head.multiplier
