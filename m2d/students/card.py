"""A student's README.md: what it is and where it came from, as text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from m2d.choose.grouping import GROUPINGS
from m2d.choose.neuron_statistics import CHOICES
from m2d.choose.scaling import SCALINGS
from m2d.choose.scoring import SCORINGS
from m2d.distill.divergences import DIVERGENCES
from m2d.distill.optimizers import OPTIMIZERS
from m2d.methods import Table
from m2d.students.record import (
    AlignPart,
    BaselinePart,
    DistillationPart,
    FoldedLayer,
    FoldPart,
    PlanPart,
    RefitPart,
    StudentRecord,
    TeacherPart,
    TokensPart,
)

METHOD = "https://arxiv.org/abs/2605.28207"
BASELINES = {
    "d2d": "{teacher} by structured pruning: the layers, channels, attention heads and "
    "feed-forward neurons that matter most on calibration text were kept",
    "random_ffn": "the Mixture-of-Experts model {teacher} by keeping its attention, norms and "
    "embeddings beside newly initialised dense feed-forward networks",
    "random_init": "nothing: it has the architecture of a dense student of {teacher}, and newly "
    "initialised weights",
}


@dataclass(frozen=True)
class Score:
    """A number as a card shows it."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ± {self.stderr:.2g}" if self.stderr is not None else "")


def model_card(record: StudentRecord, scores: Mapping[str, Score] | None = None) -> str:
    """The README.md of a student's folder, as Markdown with the hub's YAML front matter.

    scores: by label. The same arguments always give the same text.
    """
    name, baseline = record.teacher.name, record.baseline
    parts = [
        f"# A dense student of {name or 'a Mixture-of-Experts teacher'}\n",
        _introduction(record),
        "## How it was made\n",
        _plan(record.plan)
        + _sizes(baseline)
        + _calibration(record.calibration)
        + _fold(record.fold)
        + _refit(record.refit)
        + _align(record.align)
        + _distillation(record.distillation),
        _scores(scores),
        _loading(record.dtype),
        _licence(record.teacher),
        f"Made with m2d {record.m2d_version}, after "
        f"[Pruning and Distilling Mixture-of-Experts into Dense Language Models]({METHOD}). "
        + ("" if baseline else "`plan.json` names the experts of every layer; ")
        + "`m2d.json` holds the full settings and the digests of what the student was made from.\n",
    ]
    text = "\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_front_matter(record.teacher).to_yaml()}\n---\n\n{text}"))


def _front_matter(teacher: TeacherPart) -> ModelCardData:
    licence = teacher.license
    if isinstance(licence, str) and ", " in licence:
        licence = licence.split(", ")
    name = teacher.name or ""
    # The hub checks base_model, so only something shaped like a hub id may stand there.
    on_hub = name.count("/") == 1 and name[0] not in "./~"
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licence,  # type: ignore[arg-type]  # the hub takes a list too
        license_name=teacher.license_name,
        license_link=teacher.license_link,
        base_model=name if on_hub else None,
        tags=["m2d", "moe-to-dense"],
    )


def _introduction(record: StudentRecord) -> str:
    teacher, student = record.teacher, record.student
    kind = f" ({teacher.model_type})" if teacher.model_type else ""
    called = f"{teacher.name or 'named in m2d.json'}{kind}"
    if record.baseline is None:
        text = (
            f"An ordinary dense language model, made from the Mixture-of-Experts model {called} by "
            "merging its experts into one feed-forward network a layer"
        )
    else:
        text = f"An ordinary dense language model, made from {BASELINES[record.baseline.kind]}"
        text = text.format(teacher=called)
    text += (
        ", then distilled from that teacher."
        if record.distillation
        else "; it was not trained further."
    )
    if student.architecture:
        text += f" It is a stock `{student.architecture}`"
        if student.parameters:
            text += f" with {student.parameters:,} parameters"
        text += " and needs no custom code."
    return text + "\n"


def _sizes(baseline: BaselinePart | None) -> str:
    """What pruning left of each axis."""
    of = baseline.of if baseline else {}
    kept = [f"{getattr(baseline, key)} of {of[key]} {key.replace('_', ' ')}" for key in of]
    return f"- Kept: {', '.join(kept)}.\n" if kept else ""


def _plan(plan: PlanPart | None) -> str:
    if plan is None:
        return ""
    of_all = f" of {plan.num_experts}" if plan.num_experts else ""
    layers = f" in each of {plan.moe_layers} layers" if plan.moe_layers else ""
    lines = []
    if plan.keep:
        lines.append(
            f"- Kept: {plan.keep}{of_all} routed experts{layers}, chosen by "
            f"{_method(SCORINGS, plan.scoring)}."
        )
    if plan.keep and plan.keep == plan.groups:
        lines.append(
            f"- Merged: nothing; the {plan.groups} experts are copied exactly (pure pruning)."
        )
    elif plan.grouping == "neurons":
        choice = _method(CHOICES, plan.scoring.removeprefix("neuron_"))
        lines.append(
            f"- Kept: single intermediate neurons of all experts, chosen by {choice}; `plan.json` "
            "lists them."
        )
    elif plan.groups:
        lines.append(
            f"- Merged: into {plan.groups} groups by {_method(GROUPINGS, plan.grouping)}. Each "
            "group is the average of its experts' weights, weighted by their importance."
        )
    if plan.grouping == "neurons":
        lines.append("- Scaled: each expert's down projection by its mean routing weight.")
    elif plan.scaling:
        lines.append(f"- Scaled: {_method(SCALINGS, plan.scaling)}.")
    return "\n".join(lines) + "\n" if lines else ""


def _method(methods: Table[Any], identifier: str) -> str:
    """`gld_reap` (DO-ACP): what it does."""
    method = methods.methods.get(identifier)
    if method is None:
        return f"`{identifier}`"
    term = "" if method.term.replace("-", "_") == identifier else f" ({method.term})"
    return f"`{identifier}`{term}: {method.card}"


def _calibration(tokens: TokensPart | None) -> str:
    if tokens is None:
        return ""
    text = "- Calibration" + (f" on {tokens.called}" if tokens.called else "")
    if tokens.sequences and tokens.length:
        text += (
            f": {tokens.sequences:,} sequences of {tokens.length:,} tokens "
            f"({tokens.sequences * tokens.length:,} in all)"
        )
    return text + ".\n"


def _refit(refit: RefitPart | None) -> str:
    if refit is None:
        return ""
    inputs = "the student's" if refit.variant == "sequential" else "the teacher's"
    return f"- Refit: the down projections by ridge regression, on {inputs} own activations.\n"


def _fold(fold: FoldPart | None) -> str:
    if fold is None or not fold.layers:
        return ""
    told = _folded("the router's rows into the gate projections", "under the router", fold.layers)
    shared = [layer.shared for layer in fold.layers if layer.shared is not None]
    if shared:
        told += _folded("the shared expert's gate into its gate projection", "under it", shared)
    return told


def _folded(what: str, under: str, layers: list[FoldedLayer]) -> str:
    count = len(layers)
    folded = sum(layer.choice != "none" for layer in layers)
    before = sum(layer.r2_before for layer in layers) / count
    after = sum(layer.r2_after for layer in layers) / count
    return (
        f"- Folded: {what} of {folded} of {count} layers. On held-out tokens a neuron with a "
        f"constant scale reproduces {after:.0%} of what it gives {under}, {before:.0%} unfolded.\n"
    )


def _align(align: AlignPart | None) -> str:
    if align is None or not align.layers:
        return ""
    last = align.layers[-1]
    return (
        "- Aligned: the feed-forward network of every layer was trained for "
        f"{align.steps:,} steps of {align.tokens:,} tokens to bring the student's residual "
        f"stream to the teacher's. After the last layer its squared error is "
        f"{last.after:.3f} of the stream's on held-out tokens ({last.before:.3f} untrained).\n"
    )


def _distillation(part: DistillationPart | None) -> str:
    if part is None:
        return "- Distillation: none.\n"
    divergence = DIVERGENCES.methods[part.loss or DIVERGENCES.default]
    optimizer = OPTIMIZERS.methods[part.optimizer or OPTIMIZERS.default]
    text = f"- Distillation: {divergence.card}, with {optimizer.card}"
    if source := part.source or part.name:
        text += f", on {source}"
    if part.tokens:
        text += f", {part.tokens:,} tokens"
    if part.steps:
        text += f", {part.steps:,} steps"
    if part.learning_rate:
        text += f", peak learning rate {part.learning_rate:g}"
    if part.teacher_top_k:
        text += f", the teacher routing to {part.teacher_top_k} experts"
    return text + ".\n"


def _scores(scores: Mapping[str, Score] | None) -> str:
    if not scores:
        return ""
    rows = [f"| {label} | {score} |" for label, score in scores.items()]
    return "\n".join(["## Scores\n", "| measure | score |", "|---|---|", *rows]) + "\n"


def _loading(dtype: str | None) -> str:
    extra = f', dtype="{dtype}"' if dtype else ""
    return (
        "## How to load it\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{extra})\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n'
    )


def _licence(teacher: TeacherPart) -> str:
    called = teacher.license_name or teacher.license
    called = ", ".join(called) if isinstance(called, list) else called
    stated = f"`{called}`, inherited" if called else "Inherited"
    return (
        f"## Licence\n\n{stated} from the teacher, whose terms apply to this student"
        + ("." if called else "; the teacher's folder did not state one.")
        + (f" See {teacher.license_link}." if called and teacher.license_link else "")
        + "\n"
    )
