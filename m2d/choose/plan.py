"""The plan: per layer, which experts form which group, with which merge weights and scale.

A plan and the teacher determine the student; nothing else does. It is small, readable, and saved
beside the student as plan.json:

  {"format": 1, "scoring": "gld_reap", "grouping": "round_robin", "scaling": "uniform", "keep": 16,
   "layers": [{"layer": 0, "groups": [{"experts": [3, 9], "weights": [0.7, 0.3], "scale": 0.25}]}]}

The student's FFN is the concatenation of the groups, each the weighted average of its experts, with
its down projection times the scale. A group may also list "neurons": the intermediate columns that
are kept of it, all if absent. So layers may differ in width. A layer may have a "shared_scale", by
which a shared expert's down projection is multiplied. "keep" is null in a plan that was not
made by keeping K experts. scoring, grouping and scaling say where the plan comes from; they change
no student.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from m2d.choose.grouping import GROUPINGS, merge_weights
from m2d.choose.layer_statistics import LayerStatistics
from m2d.choose.ranking import Ranking, round_significant
from m2d.choose.scaling import SCALINGS
from m2d.choose.scoring import SCORINGS
from m2d.errors import UserError

FORMAT = 1
WEIGHT_SUM_TOLERANCE = 1e-6  # a plan may be written by hand


@dataclass(frozen=True)
class Group:
    """Experts merged into one: sum_e weights_e theta_e, its down projection times scale."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]
    scale: float
    neurons: tuple[int, ...] | None = None
    """Intermediate columns kept of the merged expert; None for all."""

    def width(self, expert_width: int) -> int:
        """Columns that it adds to the student's FFN, for experts of that intermediate size."""
        return expert_width if self.neurons is None else len(self.neurons)


@dataclass(frozen=True)
class LayerPlan:
    """The groups of one MoE layer, in the order of concatenation."""

    layer: int
    groups: tuple[Group, ...]
    shared_scale: float = 1.0
    """What a shared expert's down projection is multiplied by, in place of a gate of its own that
    depends on the token and that a dense student cannot hold."""

    def width(self, expert_width: int) -> int:
        """Intermediate size of the student's FFN, shared experts not counted."""
        return sum(group.width(expert_width) for group in self.groups)


@dataclass(frozen=True)
class Plan:
    """What to keep, merge and scale in every MoE layer; see the module's docstring."""

    scoring: str
    grouping: str
    scaling: str
    keep: int | None
    layers: tuple[LayerPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "format": FORMAT,
            "scoring": self.scoring,
            "grouping": self.grouping,
            "scaling": self.scaling,
            "keep": self.keep,
            "layers": [
                {"layer": layer.layer, "groups": [_group_to_dict(group) for group in layer.groups]}
                | ({} if layer.shared_scale == 1.0 else {"shared_scale": layer.shared_scale})
                for layer in self.layers
            ],
        }

    def digest(self) -> str:
        """16 hex digits that are equal for plans that give the same student function.

        The order of layers, groups, experts and neurons does not count, nor do experts of weight 0,
        the names of the methods, or differences beyond 12 significant digits.
        """
        content = sorted(
            [layer.layer, sorted(_canonical_group(group) for group in layer.groups)]
            + ([] if layer.shared_scale == 1.0 else [round_significant(layer.shared_scale)])
            for layer in self.layers
        )
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def make_plan(
    layers: Sequence[LayerStatistics],
    rankings: Sequence[Ranking],
    grouping: str,
    scaling: str,
    keep: int,
    *,
    scoring: str,
    groups: int | None = None,
) -> Plan:
    """Keep the first `keep` experts of each layer's ranking, group, weigh and scale them.

    layers and rankings go together. groups: how many there are, each as wide as one expert; the
    router's top-k if None. Raises UserError when an unknown method is named, or `keep` lies outside
    [groups, E].
    """
    scoring, grouping = SCORINGS.resolve(scoring), GROUPINGS.resolve(grouping)
    scaling = SCALINGS.resolve(scaling)
    return Plan(
        scoring,
        grouping,
        scaling,
        keep,
        tuple(
            _plan_layer(layer, ranking, grouping, scaling, keep, groups or layer.top_k)
            for layer, ranking in zip(layers, rankings, strict=True)
        ),
    )


def paper_keeps(top_k: int, num_experts: int) -> list[int]:
    """The paper's five values of K where they exist: top-k times 1, 2, 4, 8, 16, at most E."""
    return sorted({min(top_k * factor, num_experts) for factor in (1, 2, 4, 8, 16)})


def check_keep(keep: int, top_k: int, num_experts: int, groups: int | None = None) -> None:
    """Raises UserError unless groups (top_k if None) <= keep <= num_experts, groups >= 1."""
    least = top_k if groups is None else groups
    what = "the router's top-k" if groups is None else "the groups"
    if least < 1:
        raise UserError(f"groups is {groups}; it must be at least 1")
    if not least <= keep <= num_experts:
        raise UserError(
            f"keep is {keep}; it must lie between {least} ({what}) and {num_experts} "
            "(the routed experts)"
        )


def distinct_plans(plans: Iterable[Plan]) -> dict[str, Plan]:
    """Digest -> the first plan that has it, in the order given."""
    distinct: dict[str, Plan] = {}
    for plan in plans:
        distinct.setdefault(plan.digest(), plan)
    return distinct


def _plan_layer(
    layer: LayerStatistics, ranking: Ranking, grouping: str, scaling: str, keep: int, count: int
) -> LayerPlan:
    # The groups are the caller's choice; K that is too small for the router's are refused as ever.
    check_keep(keep, layer.top_k, layer.num_experts, None if count == layer.top_k else count)
    importance = ranking.importance
    groups = GROUPINGS[grouping](ranking.order[:keep], importance, layer, count)
    scales = SCALINGS[scaling](groups, importance, layer)
    return LayerPlan(
        layer.layer,
        tuple(
            Group(tuple(group), tuple(merge_weights(group, importance)), float(scale))
            for group, scale in zip(groups, scales, strict=True)
        ),
        layer.routing.shared_weight,
    )


def _group_to_dict(group: Group) -> dict[str, Any]:
    data: dict[str, Any] = {
        "experts": list(group.experts),
        "weights": list(group.weights),
        "scale": group.scale,
    }
    if group.neurons is not None:
        data["neurons"] = list(group.neurons)
    return data


def _canonical_group(group: Group) -> list[Any]:
    members = sorted(
        [expert, round_significant(weight)]
        for expert, weight in zip(group.experts, group.weights, strict=True)
        if weight != 0.0
    )
    neurons = [-1] if group.neurons is None else sorted(group.neurons)
    return [members, round_significant(group.scale), neurons]


def plan_from_dict(
    data: Any,
    *,
    num_experts: int,
    expert_width: int | None = None,
    layers: Sequence[int] | None = None,
) -> Plan:
    """The plan in `data` (plan.json's content), wholly checked.

    num_experts: E of the teacher; expert_width: its experts' intermediate size, and layers: the
    indices of its MoE layers, where at hand.
    Raises UserError: keys missing or unknown, an expert or neuron out of range or used twice,
    weights that do not sum to 1, a keep that is not the number of experts, a layer given twice or
    one that the teacher lacks.
    """
    if isinstance(data, Mapping):  # which the reader of a plan's file compares
        data = {key: value for key, value in data.items() if key != "teacher_fingerprint"}
    _keys(data, {"format", "scoring", "grouping", "scaling", "keep", "layers"}, "plan")
    if data["format"] != FORMAT:
        raise UserError(f"plan of format {data['format']!r}; this version reads {FORMAT}")
    for key in ("scoring", "grouping", "scaling"):
        if not isinstance(data[key], str) or not data[key]:
            raise UserError(f"plan: {key} is {data[key]!r}; it must be a name")
    keep = data["keep"]
    if keep is not None:
        _integer(keep, 1, num_experts, "plan: keep")
    if not isinstance(data["layers"], list) or not data["layers"]:
        raise UserError("plan: layers must be a list of at least one layer")
    plans = tuple(_layer(layer, keep, num_experts, expert_width) for layer in data["layers"])
    given = [plan.layer for plan in plans]
    if len(set(given)) != len(given):
        raise UserError("plan: a layer is given twice")
    if layers is not None and sorted(given) != sorted(layers):
        raise UserError(
            f"plan: for layers {sorted(given)}; the teacher's MoE layers are {sorted(layers)}"
        )
    return Plan(data["scoring"], data["grouping"], data["scaling"], keep, plans)


def _layer(data: Any, keep: int | None, num_experts: int, expert_width: int | None) -> LayerPlan:
    _keys(data, {"layer", "groups"}, "plan: layer", {"shared_scale"})
    index = _integer(data["layer"], 0, None, "plan: layer")
    where = f"plan: layer {index}"
    if not isinstance(data["groups"], list) or not data["groups"]:
        raise UserError(f"{where}: groups must be a list of at least one group")
    groups = tuple(_group(group, num_experts, expert_width, where) for group in data["groups"])
    used = [expert for group in groups for expert in group.experts]
    if len(set(used)) != len(used):
        raise UserError(f"{where}: an expert is in two groups, or twice in one")
    if keep is not None and len(used) != keep:
        raise UserError(f"{where}: {len(used)} experts in its groups, where keep is {keep}")
    shared = data.get("shared_scale", 1.0)
    if not _finite(shared):
        raise UserError(f"{where}: shared_scale is {shared!r}; it must be a finite number")
    return LayerPlan(index, groups, float(shared))


def _group(data: Any, num_experts: int, expert_width: int | None, where: str) -> Group:
    _keys(data, {"experts", "weights", "scale"}, f"{where}: group", {"neurons"})
    experts = _integers(data["experts"], num_experts - 1, f"{where}: expert")
    weights, scale = data["weights"], data["scale"]
    if not isinstance(weights, list) or len(weights) != len(experts):
        raise UserError(f"{where}: a group has {len(experts)} experts and not as many weights")
    if not all(_finite(weight) and weight >= 0 for weight in weights):
        raise UserError(f"{where}: weights must be numbers, none negative; they are {weights!r}")
    if abs(math.fsum(weights) - 1.0) > WEIGHT_SUM_TOLERANCE:
        raise UserError(
            f"{where}: a group's weights sum to {math.fsum(weights)!r}; they must sum to 1"
        )
    if not _finite(scale):
        raise UserError(f"{where}: scale is {scale!r}; it must be a finite number")
    neurons = None
    if "neurons" in data:
        last = None if expert_width is None else expert_width - 1
        neurons = _integers(data["neurons"], last, f"{where}: neuron")
        if len(set(neurons)) != len(neurons):
            raise UserError(f"{where}: a group lists a neuron twice")
    return Group(experts, tuple(float(weight) for weight in weights), float(scale), neurons)


def _keys(
    data: Any, required: set[str], where: str, optional: AbstractSet[str] = frozenset()
) -> None:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: an object with {', '.join(sorted(required))} is expected")
    missing, unknown = required - set(data), set(data) - required - optional
    if missing:
        raise UserError(f"{where}: lacks {', '.join(sorted(missing))}")
    if unknown:
        raise UserError(
            f"{where}: unknown {', '.join(sorted(map(str, unknown)))}; "
            f"known: {', '.join(sorted(required | optional))}"
        )


def _integers(value: Any, highest: int | None, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}s must be a list of at least one number")
    return tuple(_integer(item, 0, highest, where) for item in value)


def _integer(value: Any, lowest: int, highest: int | None, where: str) -> int:
    within = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
    if not within or (highest is not None and value > highest):
        bound = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f"{where} is {value!r}; it must be a whole number {bound}")
    return int(value)


def _finite(value: Any) -> bool:
    """Whether a value of JSON is a number that float64 holds; a whole one may be of any length."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max
