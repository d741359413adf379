"""The keys of a student in the workflow's config: what it is made of, and how."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from m2d.settings import Count, MethodOf, Section, unknown


def unique(items: list[Any]) -> list[Any]:
    """The same list, for pydantic. Raises ValueError where something stands in it twice."""
    twice = [item for i, item in enumerate(items) if item in items[:i]]
    if twice:
        raise ValueError(f"{twice[0]} may stand there once")
    return items


Scoring = Annotated[str, MethodOf("scoring")]
Grouping = Annotated[str, MethodOf("grouping")]
Scaling = Annotated[str, MethodOf("scaling")]


class RepairSettings(Section):
    """What can be done to students made of experts, beyond the paper (docs/beyond.md)."""

    fold: Literal["fixed", "layer", "neuron"] | None = None
    """The router put into the experts' gates, before the student is chosen and merged."""
    refit: Literal["layer", "sequential"] | None = None
    """Down projections solved anew on the calibration tokens; distillation starts from that."""
    weighting: Literal["equal", "relative"] | None = None
    """Of the tokens of a refit; equal if left out."""
    align: Count | None = None
    """Steps in which every layer's FFN is then trained on the teacher's residual stream."""

    @model_validator(mode="after")
    def _weighting(self) -> "RepairSettings":
        if self.weighting and not self.refit:
            raise ValueError("weighting is of use with refit alone; add refit: sequential")
        return self


class ExpertsStudent(RepairSettings):
    """A student of whole experts, kept, grouped and merged."""

    scoring: Scoring
    """Scoring method; identifier or the paper's term."""
    grouping: Grouping
    """Grouping method; identifier or the paper's term."""
    scaling: Scaling
    """Scaling of the down projections."""
    keep: Count
    """K, the number of experts kept in a layer."""
    groups: Count | None = None
    """The student's width in experts: the kept ones are merged into so many; the router's top-k if
    left out."""


class ChosenStudent(Section):
    """The student of the lowest perplexity in several grids."""

    best_of: Annotated[list[Scoring], Field(min_length=1), AfterValidator(unique)]
    """Scoring methods whose grids are searched. One more or less makes the student again."""
    keep: Count
    """K, the number of experts kept in a layer."""


class NeuronsStudent(RepairSettings):
    """A student of single neurons from all experts."""

    neurons: Annotated[str, MethodOf("neurons")]
    """How they are chosen (docs/beyond.md)."""
    width: Count | None = None
    """Neurons of a layer; the width of the router's top-k experts if left out."""
    params: Count | None = None
    """In place of the width, the student's parameters at most."""
    multiple: Count | None = None
    """What the width of the student's FFN is a multiple of; 256 if left out."""

    @model_validator(mode="after")
    def _width(self) -> "NeuronsStudent":
        if self.width and self.params:
            raise ValueError("width and params exclude each other; leave one out")
        return self


class PrunedStudent(Section):
    """A dense teacher pruned to five sizes (docs/baselines.md)."""

    baseline: Literal["d2d"]
    """Structured pruning."""
    layers: Count
    """Layers."""
    hidden_size: Count
    """Width of the residual stream."""
    heads: Count
    """Query heads."""
    kv_heads: Count
    """Key and value heads."""
    intermediate_size: Count
    """FFN width."""


BASELINES = ("d2d", "random_ffn", "random_init")


def known_baseline(value: Any) -> Any:
    """The same value, for pydantic; ValueError where it names no baseline, of any kind."""
    if value not in BASELINES:
        raise ValueError(unknown(str(value)[:100], "value", BASELINES))
    return value


class NewStudent(Section):
    """New weights in the FFNs beside a teacher's attention, or everywhere (docs/baselines.md)."""

    baseline: Annotated[Literal["random_ffn", "random_init"], BeforeValidator(known_baseline)]
    """Which of the two."""


def student_kind(student: Any) -> str:
    """What a student is made of: d2d, random_ffn, random_init, neurons, chosen or experts."""
    if isinstance(student, BaseModel):
        student = student.model_dump(exclude_none=True)
    if not isinstance(student, dict):
        return "experts"
    if "baseline" in student:
        # Of an unknown one, the closest keys; the value is then refused.
        return str(student["baseline"]) if student["baseline"] in BASELINES else "random_ffn"
    return "neurons" if "neurons" in student else "chosen" if "best_of" in student else "experts"


def _tag(student: Any) -> str:
    return f"student of {student_kind(student)}"


StudentSettings = Annotated[
    Annotated[PrunedStudent, Tag("student of d2d")]
    | Annotated[NewStudent, Tag("student of random_ffn")]
    | Annotated[NewStudent, Tag("student of random_init")]
    | Annotated[NeuronsStudent, Tag("student of neurons")]
    | Annotated[ChosenStudent, Tag("student of chosen")]
    | Annotated[ExpertsStudent, Tag("student of experts")],
    Discriminator(_tag),
]
