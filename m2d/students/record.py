"""A student's m2d.json: what it is and where it came from, as one typed record.

`write_record` (m2d/students/files.py) is the only writer, of m2d.json and of the model card that
follows from it; `read_record` the only reader. Sections hold what their stage says of itself: the
keys named here, which the card and the tables read, and others, such as digests, which are kept.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from m2d import __version__
from m2d.artifacts import read_json
from m2d.errors import UserError


class Part(BaseModel):
    """Some keys of m2d.json; further ones are kept."""

    model_config = ConfigDict(extra="allow")


class TeacherPart(Part):
    """The model that the student was made from."""

    name: str | None = None
    model_type: str | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    parameters: int | None = None


class ModelPart(Part):
    """The student as a model."""

    architecture: str | None = None
    parameters: int | None = None


class PlanPart(Part):
    """plan.json in short."""

    scoring: str = ""
    grouping: str = ""
    scaling: str = ""
    keep: int | None = None
    groups: int | None = None
    num_experts: int | None = None
    moe_layers: int | None = None


class BaselinePart(Part):
    """d2d, random_ffn or random_init; d2d with its sizes, and those that they are `of`."""

    kind: str
    of: dict[str, int] = Field(default={})


class TokensPart(Part):
    """Texts that a stage saw."""

    source: str | None = None
    name: str | None = None
    sequences: int | None = None
    length: int | None = None

    @property
    def called(self) -> str | None:
        """What the texts are."""
        return self.source or self.name


class FoldedLayer(Part):
    """How well a layer's folded neurons do without the router."""

    layer: int = 0
    choice: str
    r2_before: float
    r2_after: float
    shared: "FoldedLayer | None" = None
    """Of a shared expert with a gate of its own."""


class FoldPart(Part):
    """The router put into the gates."""

    layers: list[FoldedLayer] = Field(default=[])


class RefitPart(Part):
    """The down projections solved anew."""

    variant: str | None = None


class AlignedLayer(Part):
    """A layer's squared error before and after."""

    layer: int = 0
    before: float
    after: float


class AlignPart(Part):
    """The FFNs trained one by one."""

    steps: int = 0
    tokens: int = 0
    layers: list[AlignedLayer] = Field(default=[])


class DistillationPart(Part):
    """The training on the teacher's distributions."""

    source: str | None = None
    name: str | None = None
    loss: str | None = None
    optimizer: str | None = None
    tokens: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    teacher_top_k: int | None = None


def _named(value: Any) -> Any:
    """{"name": value} where an older file has the teacher's name alone."""
    return {"name": value} if isinstance(value, str) else value


class StudentRecord(Part):
    """m2d.json. A section is None where its stage was not run."""

    m2d_version: str = __version__
    teacher: Annotated[TeacherPart, BeforeValidator(_named)] = TeacherPart()
    student: ModelPart = ModelPart()
    plan: PlanPart | None = None
    baseline: BaselinePart | None = None
    calibration: TokensPart | None = None
    fold: FoldPart | None = None
    refit: RefitPart | None = None
    align: AlignPart | None = None
    distillation: DistillationPart | None = None
    dtype: str | None = None

    def having(self, **sections: Any) -> "StudentRecord":
        """A copy with these sections, of this version of m2d."""
        own = self.model_dump(exclude_unset=True)
        return StudentRecord(**{**own, "m2d_version": __version__, **sections})


def read_record(file: str | Path, *, absent: bool = False) -> StudentRecord:
    """The record in a student's m2d.json; an empty one for no file where it may be `absent`.

    Raises UserError, one line, where it is not such a record.
    """
    if absent and not Path(file).is_file():
        return StudentRecord()
    content = read_json(file)
    try:
        return StudentRecord(**content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: not a student's m2d.json ({key}: {first['msg'][:200]})") from None
