"""The chunked loss against the direct formula in float64."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m2d.distill.divergences import DIVERGENCES
from m2d.distill.heads import Head
from m2d.distill.liger import liger_loss, require_liger
from m2d.distill.loss import default_chunk, distillation_loss
from m2d.errors import UserError

TOKENS, STUDENT_HIDDEN, TEACHER_HIDDEN, VOCABULARY = 23, 12, 20, 51


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student hidden and head, teacher hidden and head; logits of a trained model's size."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(TOKENS, STUDENT_HIDDEN).requires_grad_(),
        draw(VOCABULARY, STUDENT_HIDDEN).requires_grad_(),
        draw(TOKENS, TEACHER_HIDDEN),
        draw(VOCABULARY, TEACHER_HIDDEN),
    )


def direct_divergence(name: str, z: Tensor, t: Tensor) -> Tensor:
    """The textbook formula on full logits, [T, V] -> scalar sum."""
    log_q, log_p = z.log_softmax(-1), t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum()
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum()
    log_m = ((p + q) / 2).log()
    return 0.5 * (p * (log_p - log_m)).sum() + 0.5 * (q * (log_q - log_m)).sum()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("variant", ["plain", "temperature", "softcap", "scaled", "cross_entropy"])
def test_value_and_gradients_match_float64(divergence: str, chunk: int, variant: str) -> None:
    temperature = 2.5 if variant == "temperature" else 1.0
    softcap = 3.0 if variant == "softcap" else None
    multiplier = 0.25 if variant == "scaled" else 1.0
    weight = 0.3 if variant == "cross_entropy" else 0.0
    labels = torch.arange(TOKENS) * 7 % VOCABULARY
    labels[::5] = -100
    bias = torch.linspace(-1, 1, VOCABULARY)

    student, head, teacher, teacher_head = case()
    own_bias = bias.clone().requires_grad_()
    loss = distillation_loss(
        student,
        Head(head, own_bias, multiplier, softcap),
        teacher,
        Head(teacher_head, bias.flip(0), 1 / 3, softcap),
        divergence=divergence,
        temperature=temperature,
        labels_T=labels,
        cross_entropy_weight=weight,
        chunk=chunk,
    )
    (loss / TOKENS).backward()

    exact = [x.detach().double().requires_grad_() for x in (student, head, bias)]
    z = (exact[0] @ exact[1].t() + exact[2]) * multiplier
    t = (teacher.double() @ teacher_head.double().t() + bias.double().flip(0)) / 3
    if softcap:
        z, t = softcap * torch.tanh(z / softcap), softcap * torch.tanh(t / softcap)
    expected = direct_divergence(divergence, z / temperature, t / temperature) * temperature**2
    labelled = int((labels >= 0).sum())
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="sum") * TOKENS / labelled
    expected = (1 - weight) * expected + weight * ce
    (expected / TOKENS).backward()

    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)
    for ours, theirs in zip((student, head, own_bias), exact, strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_comes_with_its_gradient(name: str) -> None:
    """Against finite differences in float64; 0 between equals, positive otherwise."""
    generator = torch.Generator().manual_seed(1)
    z, t = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in "zt")
    loss, gradient = DIVERGENCES[name](z.clone(), t.clone())
    assert loss > 0
    step = 1e-6
    for place in [(0, 0), (1, 3), (2, 6)]:
        sides = []
        for sign in (1, -1):
            moved = z.clone()
            moved[place] += sign * step
            sides.append(float(DIVERGENCES[name](moved, t.clone())[0]))
        expected = (sides[0] - sides[1]) / (2 * step)
        assert float(gradient[place]) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    loss, gradient = DIVERGENCES[name](z.clone(), z.clone())
    assert abs(float(loss)) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_student_equal_to_teacher_has_no_loss(divergence: str) -> None:
    student, head, _, _ = case()
    loss = distillation_loss(
        student, Head(head), student.detach(), Head(head.detach()), divergence=divergence, chunk=5
    )
    loss.backward()
    # forward KL: exactly 0, since p - q is a difference of equal numbers; the others to rounding
    bound = 0.0 if divergence == "forward_kl" else 1e-6
    assert abs(loss.item()) <= bound * TOKENS
    assert float(student.grad.abs().max()) <= bound
    assert float(head.grad.abs().max()) <= bound


def test_full_logits_never_exist() -> None:
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    student, head, teacher, teacher_head = case()
    with Largest():
        distillation_loss(student, Head(head), teacher, Head(teacher_head), chunk=4).backward()
    assert largest == max(4 * VOCABULARY, VOCABULARY * TEACHER_HIDDEN, TOKENS * TEACHER_HIDDEN)
    assert largest < TOKENS * VOCABULARY


def test_bf16_autocast_is_near_float64_and_deterministic() -> None:
    student, head, teacher, teacher_head = case()
    gradients = []
    for _ in range(2):
        student.grad = head.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = distillation_loss(
                student, Head(head), teacher.bfloat16(), Head(teacher_head.bfloat16()), chunk=6
            )
        loss.backward()
        gradients.append((student.grad.clone(), head.grad.clone()))
    assert student.grad.dtype == head.grad.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (student, head)]
    z, t = exact[0] @ exact[1].t(), teacher.double() @ teacher_head.double().t()
    expected = direct_divergence("forward_kl", z, t)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    for ours, theirs in zip(gradients[0], exact, strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.double(), theirs.grad, rtol=0, atol=2e-2 * scale)
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_gradient_is_scaled_and_frozen_parts_get_none() -> None:
    student, head, teacher, teacher_head = case()
    distillation_loss(student, Head(head), teacher, Head(teacher_head)).backward()
    once = student.grad.clone()
    student.grad = None
    frozen = Head(head.detach())
    (3 * distillation_loss(student, frozen, teacher, Head(teacher_head))).backward()
    torch.testing.assert_close(student.grad, 3 * once)
    with torch.no_grad():
        assert not distillation_loss(student, Head(head), teacher, Head(teacher_head)).requires_grad


def test_chunks_shrink_with_the_vocabulary() -> None:
    assert default_chunk(4096) > default_chunk(151_936) > default_chunk(10**6) == 256
    with pytest.raises(ValueError, match="needs labels"):
        distillation_loss(*sum_args(), cross_entropy_weight=0.5)


def sum_args() -> tuple[Tensor, Head, Tensor, Head]:
    student, head, teacher, teacher_head = case()
    return student, Head(head), teacher, Head(teacher_head)


# --- Liger's ----------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="the extra m2d[liger]")
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_liger_agrees_with_our_loss(divergence: str, temperature: float) -> None:
    bias = torch.linspace(-1, 1, VOCABULARY)
    results = []
    for measure in (distillation_loss, partial(liger_loss, compiled=False)):
        student, head, teacher, teacher_head = case()
        own_bias = bias.clone().requires_grad_()
        loss = measure(
            student,
            Head(head, own_bias, 0.5),
            teacher,
            Head(teacher_head, bias.flip(0), 1 / 3),
            divergence=divergence,
            temperature=temperature,
        )
        (loss * 0.7).backward()
        results.append((loss.detach(), student.grad, head.grad, own_bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=2e-6)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="the extra m2d[liger]")
def test_liger_takes_bfloat16_without_autocast() -> None:
    """As DeepSpeed has it; the products' rounding is all that differs."""
    student, head, teacher, teacher_head = (x.detach().bfloat16() for x in case())
    heads = (Head(head), Head(teacher_head))
    options = {"divergence": "forward_kl", "temperature": 1.0}
    ours = distillation_loss(student, heads[0], teacher, heads[1], **options)
    theirs = liger_loss(student, heads[0], teacher, heads[1], compiled=False, **options)
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs, ours, rtol=5e-4, atol=0)


def test_liger_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"liger-kernel is not installed; pip install 'm2d\[liger\]'"
    ):
        require_liger()


def test_liger_refuses_a_soft_cap() -> None:
    pytest.importorskip("liger_kernel")
    student, head, teacher, teacher_head = case()
    heads = (Head(head, softcap=3.0), Head(teacher_head))
    with pytest.raises(UserError, match="soft cap"):
        liger_loss(
            student, heads[0], teacher, heads[1],
            divergence="forward_kl", temperature=1.0, compiled=False,
        )  # fmt: skip
