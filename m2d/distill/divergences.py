"""Divergences between a teacher's and a student's distributions, as losses with their gradients.

A method takes float32 logits of student and teacher, [C, V], already divided by the temperature,
and gives its sum over the C tokens and its gradient by the student's logits. It may overwrite its
arguments. It is entered in DIVERGENCES where it is written; a card says "Distillation:" and then
its words. Liger's implementation takes those that have a `beta` of its generalised Jensen-Shannon
divergence in m2d/distill/liger.py.

C tokens, V vocabulary; z logits, p the teacher's probabilities, q the student's, m = (p + q) / 2.
"""

from collections.abc import Callable
from math import log
from typing import TYPE_CHECKING

from m2d.methods import Table

if TYPE_CHECKING:  # listing the methods must not take torch's seconds
    from torch import Tensor

Divergence = Callable[["Tensor", "Tensor"], tuple["Tensor", "Tensor"]]
DIVERGENCES: Table[Divergence] = Table("divergence", default="forward_kl")


@DIVERGENCES.method("forward KL", "forward KL on the teacher's logits")
def forward_kl(z_student_CV: "Tensor", z_teacher_CV: "Tensor") -> tuple["Tensor", "Tensor"]:
    """KL(p || q) = sum_v p (log p - log q); gradient q - p. The paper's loss."""
    log_q = z_student_CV.log_softmax(-1)
    log_p = z_teacher_CV.log_softmax(-1)
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum()
    return loss, log_q.exp_().sub_(p)


@DIVERGENCES.method("reverse KL", "reverse KL on the teacher's logits", paper=False)
def reverse_kl(z_student_CV: "Tensor", z_teacher_CV: "Tensor") -> tuple["Tensor", "Tensor"]:
    """KL(q || p) = sum_v q (log q - log p); gradient q (log q - log p - KL)."""
    log_q = z_student_CV.log_softmax(-1)
    difference = log_q - z_teacher_CV.log_softmax(-1)
    q = log_q.exp_()
    kl_C1 = (q * difference).sum(-1, keepdim=True)
    return kl_C1.sum(), difference.sub_(kl_C1).mul_(q)


@DIVERGENCES.method(
    "Jensen-Shannon", "Jensen-Shannon divergence on the teacher's logits", paper=False
)
def jensen_shannon(z_student_CV: "Tensor", z_teacher_CV: "Tensor") -> tuple["Tensor", "Tensor"]:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; gradient q (log q/m - KL(q || m)) / 2."""
    log_q = z_student_CV.log_softmax(-1)
    log_p = z_teacher_CV.log_softmax(-1)
    log_m = log_p.logaddexp(log_q).sub_(log(2.0))
    p, q = log_p.exp(), log_q.exp()
    log_q_over_m = log_q.sub_(log_m)
    kl_q_C1 = (q * log_q_over_m).sum(-1, keepdim=True)
    loss = 0.5 * (log_p.sub_(log_m).mul_(p).sum() + kl_q_C1.sum())
    return loss, log_q_over_m.sub_(kl_q_C1).mul_(q).mul_(0.5)
