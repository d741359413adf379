"""A student's README.md: what it is and where it came from, as text."""

from collections.abc import Mapping
from typing import Any

import yaml

from m2d import __version__
from m2d.choose.grouping import GROUPINGS
from m2d.choose.neuron_statistics import CHOICES
from m2d.choose.scaling import SCALINGS
from m2d.choose.scoring import SCORINGS
from m2d.distill.divergences import DIVERGENCES
from m2d.distill.optimizers import OPTIMIZERS
from m2d.methods import Table

METHOD = "https://arxiv.org/abs/2605.28207"
BASELINES = {
    "d2d": "{teacher} by structured pruning: the layers, channels, attention heads and "
    "feed-forward neurons that matter most on calibration text were kept",
    "random_ffn": "the Mixture-of-Experts model {teacher} by keeping its attention, norms and "
    "embeddings beside newly initialised dense feed-forward networks",
    "random_init": "nothing: it has the architecture of a dense student of {teacher}, and newly "
    "initialised weights",
}


def model_card(provenance: Mapping[str, Any], scores: Mapping[str, Any] | None = None) -> str:
    """The README.md of a student's folder, as Markdown with the hub's YAML front matter.

    `provenance` is what m2d.json holds. Every key is optional, and others are ignored:

    - `teacher`: {`name`: hub id or folder name, `model_type`, `license`} or only the name
    - `student`: {`architecture`: class name, `parameters`: int}
    - `plan`: {`scoring`, `grouping`, `scaling`, `keep`, `groups`, `num_experts`, `moe_layers`}
    - `baseline`: {`kind`: d2d, random_ffn or random_init, and for d2d its sizes}; absent for a
      student that was made of experts
    - `calibration`: {`source`, `sequences`, `length`}
    - `refit`: {`variant`}; absent for a student whose down projections were not solved anew
    - `fold`: {`layers`: [{`choice`, `r2_before`, `r2_after`}]}; absent where nothing was folded
    - `align`: {`steps`, `tokens`, `layers`: [{`before`, `after`}]}; absent where it was not done
    - `distillation`: {`loss`, `optimizer`, `source`, `tokens`, `steps`, `learning_rate`,
      `teacher_top_k`}; absent for a student that was not distilled
    - `dtype`, `m2d_version`

    `scores` maps a label to a value, or to {`value`, `stderr`}; numbers as they should be shown.
    The same arguments always give the same text.
    """
    teacher = _section(provenance, "teacher")
    student = _section(provenance, "student")
    name = teacher.get("name")
    distillation = _section(provenance, "distillation")
    baseline = _section(provenance, "baseline")
    parts = [
        _front_matter(name, teacher),
        f"# A dense student of {name or 'a Mixture-of-Experts teacher'}\n",
        _introduction(name, teacher, student, bool(distillation), baseline.get("kind")),
        "## How it was made\n",
        _plan(_section(provenance, "plan"))
        + _sizes(baseline)
        + _calibration(_section(provenance, "calibration"))
        + _fold(_section(provenance, "fold"))
        + _refit(_section(provenance, "refit"))
        + _align(_section(provenance, "align"))
        + _distillation(distillation),
        _scores(scores),
        _loading(provenance.get("dtype")),
        _licence(teacher),
        f"Made with m2d {provenance.get('m2d_version', __version__)}, after "
        f"[Pruning and Distilling Mixture-of-Experts into Dense Language Models]({METHOD}). "
        + ("" if baseline else "`plan.json` names the experts of every layer; ")
        + "`m2d.json` holds the full settings and the digests of what the student was made from.\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(provenance: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = provenance.get(key) or {}
    return dict(value) if isinstance(value, Mapping) else {"name": str(value)}


def _front_matter(name: str | None, teacher: dict[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    for key in ("license", "license_name", "license_link"):
        if value := teacher.get(key):
            several = key == "license" and ", " in str(value)
            shown = str(value).split(", ") if several else str(value)
            lines.append(yaml.safe_dump({key: shown}, width=1000, allow_unicode=True).strip())
    # The hub checks base_model, so only something shaped like a hub id may stand there.
    if name and name.count("/") == 1 and name[0] not in "./~":
        lines += [f"base_model: {name}"]
    return "\n".join([*lines, "tags:", "- m2d", "- moe-to-dense", "---\n"])


def _introduction(
    name: str | None,
    teacher: dict[str, Any],
    student: dict[str, Any],
    distilled: bool,
    baseline: str | None,
) -> str:
    kind = f" ({teacher['model_type']})" if teacher.get("model_type") else ""
    called = f"{name or 'named in m2d.json'}{kind}"
    if baseline is None:
        text = (
            f"An ordinary dense language model, made from the Mixture-of-Experts model {called} by "
            "merging its experts into one feed-forward network a layer"
        )
    else:
        text = f"An ordinary dense language model, made from {BASELINES[baseline]}"
        text = text.format(teacher=called)
    text += ", then distilled from that teacher." if distilled else "; it was not trained further."
    if student.get("architecture"):
        text += f" It is a stock `{student['architecture']}`"
        if student.get("parameters"):
            text += f" with {student['parameters']:,} parameters"
        text += " and needs no custom code."
    return text + "\n"


def _sizes(baseline: dict[str, Any]) -> str:
    """What pruning left of each axis."""
    of = baseline.get("of") or {}
    kept = [f"{baseline[key]} of {of[key]} {key.replace('_', ' ')}" for key in of]
    return f"- Kept: {', '.join(kept)}.\n" if kept else ""


def _plan(plan: dict[str, Any]) -> str:
    if not plan:
        return ""
    scoring, grouping, scaling = (plan.get(k, "") for k in ("scoring", "grouping", "scaling"))
    keep, groups = plan.get("keep"), plan.get("groups")
    of_all = f" of {plan['num_experts']}" if plan.get("num_experts") else ""
    layers = f" in each of {plan['moe_layers']} layers" if plan.get("moe_layers") else ""
    lines = []
    if keep:
        lines.append(
            f"- Kept: {keep}{of_all} routed experts{layers}, chosen by "
            f"{_method(SCORINGS, scoring)}."
        )
    if keep and keep == groups:
        lines.append(f"- Merged: nothing; the {groups} experts are copied exactly (pure pruning).")
    elif grouping == "neurons":
        choice = _method(CHOICES, scoring.removeprefix("neuron_"))
        lines.append(
            f"- Kept: single intermediate neurons of all experts, chosen by {choice}; `plan.json` "
            "lists them."
        )
    elif groups:
        lines.append(
            f"- Merged: into {groups} groups by {_method(GROUPINGS, grouping)}. Each "
            "group is the average of its experts' weights, weighted by their importance."
        )
    if grouping == "neurons":
        lines.append("- Scaled: each expert's down projection by its mean routing weight.")
    elif scaling:
        lines.append(f"- Scaled: {_method(SCALINGS, scaling)}.")
    return "\n".join(lines) + "\n" if lines else ""


def _method(methods: Table[Any], identifier: str) -> str:
    """`gld_reap` (DO-ACP): what it does."""
    method = methods.methods.get(identifier)
    if method is None:
        return f"`{identifier}`"
    term = "" if method.term.replace("-", "_") == identifier else f" ({method.term})"
    return f"`{identifier}`{term}: {method.card}"


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration:
        return ""
    text = "- Calibration"
    if calibration.get("source") or calibration.get("name"):
        text += f" on {calibration.get('source') or calibration['name']}"
    sequences, length = calibration.get("sequences"), calibration.get("length")
    if sequences and length:
        text += (
            f": {int(sequences):,} sequences of {int(length):,} tokens "
            f"({int(sequences) * int(length):,} in all)"
        )
    return text + ".\n"


def _refit(refit: dict[str, Any]) -> str:
    if not refit:
        return ""
    inputs = "the student's" if refit.get("variant") == "sequential" else "the teacher's"
    return f"- Refit: the down projections by ridge regression, on {inputs} own activations.\n"


def _fold(fold: dict[str, Any]) -> str:
    layers = fold.get("layers") or []
    if not layers:
        return ""
    folded = sum(layer["choice"] != "none" for layer in layers)
    before, after = (sum(x[key] for x in layers) / len(layers) for key in ("r2_before", "r2_after"))
    return (
        f"- Folded: the router's rows into the gate projections of {folded} of {len(layers)} "
        "layers. On held-out tokens a neuron with a constant scale reproduces "
        f"{after:.0%} of what it gives under the router, {before:.0%} unfolded.\n"
    )


def _align(align: dict[str, Any]) -> str:
    layers = align.get("layers") or []
    if not layers:
        return ""
    return (
        "- Aligned: the feed-forward network of every layer was trained for "
        f"{align['steps']:,} steps of {align['tokens']:,} tokens to bring the student's residual "
        f"stream to the teacher's. After the last layer its squared error is "
        f"{layers[-1]['after']:.3f} of the stream's on held-out tokens "
        f"({layers[-1]['before']:.3f} untrained).\n"
    )


def _distillation(distillation: dict[str, Any]) -> str:
    if not distillation:
        return "- Distillation: none.\n"
    divergence = DIVERGENCES.methods[distillation.get("loss", DIVERGENCES.default)]
    optimizer = OPTIMIZERS.methods[distillation.get("optimizer", OPTIMIZERS.default)]
    text = f"- Distillation: {divergence.card}, with {optimizer.card}"
    if distillation.get("source") or distillation.get("name"):
        text += f", on {distillation.get('source') or distillation['name']}"
    if distillation.get("tokens"):
        text += f", {int(distillation['tokens']):,} tokens"
    if distillation.get("steps"):
        text += f", {int(distillation['steps']):,} steps"
    if distillation.get("learning_rate"):
        text += f", peak learning rate {distillation['learning_rate']:g}"
    if distillation.get("teacher_top_k"):
        text += f", the teacher routing to {distillation['teacher_top_k']} experts"
    return text + ".\n"


def _scores(scores: Mapping[str, Any] | None) -> str:
    if not scores:
        return ""
    rows = []
    for label, score in scores.items():
        if isinstance(score, Mapping):
            error = score.get("stderr")
            shown = f"{score['value']:.4g}" + (f" ± {error:.2g}" if error is not None else "")
        else:
            shown = f"{score:.4g}"
        rows.append(f"| {label} | {shown} |")
    return "\n".join(["## Scores\n", "| measure | score |", "|---|---|", *rows]) + "\n"


def _loading(dtype: str | None) -> str:
    extra = f', dtype="{dtype}"' if dtype else ""
    return (
        "## How to load it\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{extra})\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n'
    )


def _licence(teacher: dict[str, Any]) -> str:
    licence, link = teacher.get("license"), teacher.get("license_link")
    called = teacher.get("license_name") or licence
    stated = f"`{called}`, inherited" if called else "Inherited"
    return (
        f"## Licence\n\n{stated} from the teacher, whose terms apply to this student"
        + ("." if called else "; the teacher's folder did not state one.")
        + (f" See {link}." if called and link else "")
        + "\n"
    )
