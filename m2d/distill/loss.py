"""Divergence between teacher and student, from hidden states, without full logits.

The output head is applied to a chunk of tokens at a time, and the gradients are computed in the
same pass, so that no [T, V] tensor of the teacher or of the student ever exists: only [C, V], in
the dtype of the products. What needs float32 is done for a few rows R of a chunk at a time, which
on a CPU stay in its cache.

Shape suffixes: T tokens (batch and sequence flattened), C tokens of one chunk, R of some of its
rows, H hidden size (the student's and the teacher's may differ), V vocabulary. z are logits, p the
teacher's probabilities, q the student's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m2d.distill.divergences import DIVERGENCES
from m2d.distill.heads import Head

# Logits of one chunk: enough tokens for the matrix products to run at full speed.
CHUNK_ELEMENTS = 2**26
SMALLEST_CHUNK, LARGEST_CHUNK = 256, 2048
# Logits that are widened to float32 at a time: on a CPU what its cache holds, elsewhere a chunk.
# Both are measured by benchmarks/loss_memory.py.
CPU_CACHE_ELEMENTS = 2**18
# Rows of the output head whose gradient is summed at a time, for the same reason.
HEAD_ROWS = {"cpu": 2**13, "other": 2**17}


# Takes float32 logits [R, V] and which rows of the chunk they are; gives their summed loss and its
# gradient by the logits.
LossOfRows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def cross_entropy(z_student_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """-log q(label), summed over the tokens whose label is not negative; gradient q - onehot."""
    counted_C1 = (labels_C >= 0).unsqueeze(-1)
    labels_C1 = labels_C.clamp(min=0).unsqueeze(-1)
    log_q = torch.log_softmax(z_student_CV, -1)
    loss = -(log_q.gather(-1, labels_C1) * counted_C1).sum()
    gradient = log_q.exp_()
    gradient.scatter_add_(-1, labels_C1, torch.full_like(labels_C1, -1.0, dtype=gradient.dtype))
    return loss, gradient.mul_(counted_C1)


def default_chunk(vocabulary: int) -> int:
    """Tokens of one chunk."""
    return min(max(SMALLEST_CHUNK, CHUNK_ELEMENTS // vocabulary), LARGEST_CHUNK)


def distillation_loss(
    student_TH: Tensor,
    student_head: Head,
    teacher_TH: Tensor,
    teacher_head: Head,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    labels_T: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of the divergence between the teacher's and the student's distributions.

    Equal to the direct formula on full logits to float32 rounding. With identical student and
    teacher (same hidden states and heads, to the bit) the loss and its gradient are exactly 0.
    Divide by the number of tokens of the whole batch for the mean.

    Args:
        student_TH, teacher_TH: final hidden states, after the last norm. The teacher's logits are
            computed in the dtype of `teacher_TH`; the student's in the autocast dtype, or else in
            that of `student_TH`; everything after them is float32.
        divergence: a name in DIVERGENCES.
        temperature: both logits are divided by it, and the divergence multiplied by its square,
            which keeps the gradient's size (Hinton et al. 2015).
        labels_T: next tokens, int64, negative where there is none; for the cross-entropy.
        cross_entropy_weight: w in (1 - w) * divergence + w * cross-entropy. The cross-entropy is
            averaged over the labelled tokens alone, then counted for every token.
        chunk: tokens at a time (default: `default_chunk`).

    Returns:
        float32 scalar; differentiable once, by `student_TH` and the student's head.
    """
    if not 0 <= cross_entropy_weight <= 1 or (cross_entropy_weight and labels_T is None):
        raise ValueError("cross_entropy_weight is between 0 and 1, and needs labels")
    measure = DIVERGENCES[divergence]
    label_weight = 0.0
    if labels_T is not None and cross_entropy_weight:
        labelled = int((labels_T >= 0).sum())
        label_weight = cross_entropy_weight * len(labels_T) / max(labelled, 1)

    def loss_of_chunk(tokens: slice) -> LossOfRows:
        t_CV = teacher_head.products(teacher_TH[tokens])
        labels_C = labels_T[tokens] if labels_T is not None and label_weight else None

        def loss_of_rows(z_RV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            ce = None if labels_C is None else cross_entropy(z_RV, labels_C[rows])
            t_RV = teacher_head.finish(t_CV[rows])
            if temperature != 1.0:
                z_RV, t_RV = z_RV / temperature, t_RV / temperature
            loss, gradient = measure(z_RV, t_RV)
            if temperature != 1.0:
                loss, gradient = loss * temperature**2, gradient.mul_(temperature)
            if ce is not None:
                rest = 1 - cross_entropy_weight
                loss = loss * rest + ce[0] * label_weight
                gradient = gradient.mul_(rest).add_(ce[1], alpha=label_weight)
            return loss, gradient

        return loss_of_rows

    return apply_head(student_TH, student_head, loss_of_chunk, chunk)


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over tokens of |s - t|^2 / |t|^2, mean over the layers; float32 scalar, differentiable.

    student, teacher: hidden states [T, H] after each layer, as many of both and of the same shapes.
    """
    total = torch.zeros((), device=student[0].device)
    for s_TH, t_TH in zip(student, teacher, strict=True):
        t_TH = t_TH.float()
        size_T = t_TH.square().sum(-1).clamp_(min=torch.finfo(torch.float32).tiny)
        total = total + ((s_TH.float() - t_TH).square().sum(-1) / size_T).sum()
    return total / len(student)


def partial_forward_kl(z_RV: Tensor, ids_Rn: Tensor, p_Rn: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL where the teacher is known on n tokens and by the mass r of all the others.

    sum_i p_i (log p_i - log q_i) + r (log r - log q_rest), with q_rest the student's mass on the
    others; gradient q - p on the n tokens, q (1 - r / q_rest) on the others. With r = 0 that is
    q - p everywhere, which is what an unbiased sample of the teacher asks for. At most the full
    forward KL, and equal to it when n is the vocabulary. Tokens of p = 0 only fill up the n.
    """
    log_q = torch.log_softmax(z_RV, -1)
    log_q_Rn = log_q.gather(-1, ids_Rn)
    known = p_Rn > 0
    r_R1 = (1 - p_Rn.sum(-1, keepdim=True)).clamp_(min=0)
    q_Rn = log_q_Rn.exp() * known
    # Never below the resolution of 1 - sum; where r is 0 it does not matter.
    q_rest_R1 = (1 - q_Rn.sum(-1, keepdim=True)).clamp_(min=1e-7)
    loss = torch.xlogy(p_Rn, p_Rn).sub_(p_Rn * log_q_Rn).sum()
    loss += torch.xlogy(r_R1, r_R1).sub_(torch.xlogy(r_R1, q_rest_R1)).sum()
    gradient = log_q.exp_()
    factor_R1 = 1 - r_R1 / q_rest_R1
    gradient *= factor_R1
    # On the known tokens q (1 - r / q_rest) becomes q - p.
    return loss, gradient.scatter_add_(-1, ids_Rn, q_Rn * (1 - factor_R1) - p_Rn)


def stored_loss(student_TH: Tensor, student_head: Head, ids_Tn: Tensor, p_Tn: Tensor) -> Tensor:
    """Sum over tokens of `partial_forward_kl` against stored teacher outputs.

    Args:
        ids_Tn: int64, the tokens on which the teacher is known.
        p_Tn: their float32 probabilities; 0 fills up.
    """

    def loss_of_chunk(tokens: slice) -> LossOfRows:
        ids_Cn, p_Cn = ids_Tn[tokens], p_Tn[tokens]
        return lambda z_RV, rows: partial_forward_kl(z_RV, ids_Cn[rows], p_Cn[rows])

    return apply_head(student_TH, student_head, loss_of_chunk)


def apply_head(
    hidden_TH: Tensor,
    head: Head,
    loss_of_chunk: Callable[[slice], LossOfRows],
    chunk: int | None = None,
) -> Tensor:
    """The summed loss of a head's logits, by chunks, in the autocast dtype where there is one."""
    device = hidden_TH.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_TH.dtype
    chunk = chunk or default_chunk(len(head.weight_VH))
    return ChunkedHead.apply(
        hidden_TH, head.weight_VH, head.bias_V, head, loss_of_chunk, dtype, chunk
    )


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`, covering range(total)."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class ChunkedHead(torch.autograd.Function):
    """Applies a head and a loss of its logits by chunks of tokens, with gradients on the way.

    The gradients of the summed loss are computed in forward and only multiplied in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        loss_of_chunk: Callable[[slice], LossOfRows],
        dtype: torch.dtype,
        chunk: int,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_grad_TH = torch.empty_like(hidden_TH) if needs_hidden else None
        # float32 whatever the weights' dtype: many chunks are summed.
        weight_grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        bias_grad_V = None
        if bias_V is not None and needs_bias:
            bias_grad_V = torch.zeros_like(bias_V, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        on_cpu = hidden_TH.device.type == "cpu"
        vocabulary = len(weight_VH)
        rows_at_once = max(1, CPU_CACHE_ELEMENTS // vocabulary) if on_cpu else chunk
        with torch.autocast(hidden_TH.device.type, enabled=False):
            cast_VH = weight_VH.to(dtype)
            head = head._replace(weight_VH=cast_VH)
            for tokens in slices(len(hidden_TH), chunk):
                hidden_CH = hidden_TH[tokens].to(dtype)
                loss_of_rows = loss_of_chunk(tokens)
                # First the products, then, row by row in their place, the gradients by them.
                d_CV = head.products(hidden_CH)
                for rows in slices(len(hidden_CH), rows_at_once):
                    z_RV = head.finish(d_CV[rows])
                    slope_RV = None if head.softcap is None else 1 - (z_RV / head.softcap).square()
                    loss, gradient_RV = loss_of_rows(z_RV, rows)
                    total += loss
                    if slope_RV is not None:
                        gradient_RV.mul_(slope_RV)
                    if head.multiplier != 1.0:
                        gradient_RV.mul_(head.multiplier)
                    if bias_grad_V is not None:
                        bias_grad_V += gradient_RV.sum(0)
                    d_CV[rows] = gradient_RV
                if hidden_grad_TH is not None:
                    hidden_grad_TH[tokens] = d_CV @ cast_VH
                if weight_grad_VH is not None and dtype == torch.float32:
                    weight_grad_VH.addmm_(d_CV.t(), hidden_CH)
                elif weight_grad_VH is not None:
                    for part in slices(vocabulary, HEAD_ROWS["cpu" if on_cpu else "other"]):
                        weight_grad_VH[part] += d_CV[:, part].t() @ hidden_CH
        if weight_grad_VH is not None:
            weight_grad_VH = weight_grad_VH.to(weight_VH.dtype)
        ctx.save_for_backward(hidden_grad_TH, weight_grad_VH, bias_grad_V)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the saved tensors are this node's own, and are used once.
        gradients = (None if g is None else g.mul_(grad_output) for g in ctx.saved_tensors)
        return (*gradients, None, None, None, None)
