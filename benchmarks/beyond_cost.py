"""Operations that the students of benchmarks/beyond.py take, counted from the sizes.

A product of [a, b] and [b, c] counts 2abc; what is done element by element is left out. Per token
of a forward pass that is 2 for every parameter that the token meets, and attention's own products
over half a sequence on average. A step of training takes three forward passes. What is counted is
what `m2d convert` and `m2d distill` do: the benchmark itself reads the teacher's hidden states from
disk.

Shapes: H hidden size, I width of an expert, E experts, k of them a token, W width of a student's
FFN, n calibration tokens, L MoE layers.
"""

from dataclasses import dataclass
from typing import Any

from beyond_students import CALIBRATION, STEPS, Student

from m2d.inspect import inspect
from m2d.models.teacher import Teacher
from m2d.refit.align import AlignSettings
from m2d.refit.ridge import RIDGES
from m2d.statistics.neurons import CANDIDATES_PER_NEURON

LENGTH = 256
NEWTON_SCHULZ = 5


@dataclass(frozen=True)
class Cost:
    """Operations of making a student, and for each token of its distillation."""

    choosing: float
    """Statistics, fold and the choice of experts or neurons."""
    refit: float
    align: float
    token: float

    @property
    def made(self) -> float:
        return self.choosing + self.refit + self.align

    def after(self, tokens: int) -> float:
        """All in all, after so many tokens of distillation."""
        return self.made + tokens * self.token


def count(teacher: Teacher, student: Student, parameters: int) -> Cost:
    """The operations of a student with so many parameters."""
    about = inspect(teacher)
    h, i, experts = about["hidden_size"], about["expert_width"], about["num_experts"]
    k, layers = about["top_k"], about["num_moe_layers"]
    w, n = student.widths * k * i, CALIBRATION * LENGTH
    scores = about["num_layers"] * 2 * LENGTH * attention_width(teacher)
    head = about["trunk_parameters"]  # one matrix for tokens in and out, the last norm aside
    theirs = 2 * (about["active_parameters"] - head) + scores  # a token through the layers
    ours = 2 * (parameters - head) + scores
    options = student.options

    choosing = n * theirs
    if options.get("granularity") == "neurons":
        candidates = min(CANDIDATES_PER_NEURON * w, experts * i)
        inner = 4 * h * i * experts * (2 if "fold" in options else 1)  # of every expert
        moments = 2 * candidates * (candidates + h)
        choosing += n * layers * 4 * h * i * k  # contributions
        choosing += n * (theirs + layers * (inner + moments))
        # Each pick: a row of the factor, and the inner products with what is left, over all.
        choosing += layers * sum(2 * candidates * (2 * s + 2 * h) for s in range(w))
    else:
        choosing += n * layers * (6 * h * i * experts + 2 * experts**2 * h)
        choosing += layers * 2 * experts**2 * (3 * h * i)
    if "fold" in options:
        choosing += n * (theirs + layers * 4 * h * i * experts)

    w += about["shared_width"]  # which is not chosen, but refitted and trained

    def refit(tokens: int) -> float:
        """A pass through both models, and the sums and solutions of every layer."""
        sums = tokens * layers * 2 * w * (w + h)
        solved = (len(RIDGES) + 1) * layers * (w**3 / 3 + 4 * w**2 * h)
        return tokens * (theirs + ours) + sums + solved

    aligned = student.aligned * LENGTH
    training = STEPS * layers * (AlignSettings().tokens * 3 * 6 * w * h + 3 * muon(h, w))
    return Cost(
        choosing,
        refit(n) if options.get("refit") else 0.0,
        refit(aligned) + training if aligned else 0.0,
        theirs + 2 * head + 3 * (ours + 2 * head),
    )


def muon(rows: int, columns: int) -> float:
    """Operations of orthogonalising a matrix."""
    least, most = sorted((rows, columns))
    return NEWTON_SCHULZ * (4 * least**2 * most + 2 * least**3)


def attention_width(teacher: Teacher) -> int:
    """Heads times the sizes of a query and of a value, over two: what a score and its use take."""
    config: Any = teacher.config
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if getattr(config, "kv_lora_rank", None):
        key = int(config.qk_nope_head_dim + config.qk_rope_head_dim)
        return heads * (key + int(config.v_head_dim)) // 2
    return heads * size
