"""Names on disk to names of the stock class, by transformers' own conversion table."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
)

HALVES = ("gate_proj", "up_proj")
# What a quantised tensor's name ends in, after the plain tensor's.
QUANTIZED = re.compile(r"(?P<plain>.+?(?:weight|_proj))(?P<suffix>_[a-z_]+)")


@dataclass(frozen=True)
class Named:
    """A tensor on disk, by its name in the class."""

    name: str
    """Canonical name, of the whole that it is a part of if `part` is given."""
    part: tuple[int, int] | None = None
    """Place among the parts that are concatenated: of its pattern, and of its number in it."""
    axis: int = 0
    """Along which parts are concatenated, or the tensor is cut."""
    others: tuple[str, ...] = ()
    """Canonical names of the tensors that it is cut into, in equal parts, after `name`."""
    turned: tuple[int, int] | None = None
    """Axes that are exchanged."""
    interleaved: int | None = None
    """The axis, from the last, along which gate and up alternate; the class has all gate first."""


@dataclass(frozen=True)
class Names:
    """transformers' renaming of one class's tensors."""

    transforms: tuple[WeightTransform, ...]
    known: frozenset[str]
    """The class's own names."""
    prefix: str
    """What the class's names begin with and some files' do not, or the other way round."""
    experts: Mapping[str, int] = field(default_factory=dict)
    """Number of experts in each stacked tensor of the class, by its name."""

    @property
    def transposes_experts(self) -> bool:
        """Whether fused experts are transposed while loading, where their shape says so."""
        return any(
            isinstance(transform, WeightConverter)
            and any("experts" in target for target in transform.target_patterns)
            and any(isinstance(operation, Transpose) for operation in transform.operations)
            for transform in self.transforms
        )

    def of(self, names: Iterable[str]) -> dict[str, Named]:
        """Name on disk -> what it is called in the class."""
        fresh = copy.deepcopy(self.transforms)  # some remember what they have seen
        renamings = [t for t in fresh if isinstance(t, WeightRenaming)]
        converters = [t for t in fresh if isinstance(t, WeightConverter)]
        return {name: self._one(name, renamings, converters) for name in sorted(names)}

    def _one(
        self, name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> Named:
        found = self._rename(name, renamings, converters)
        if found.name in self.known:
            return found
        if name in self.known:  # a pattern that is meant for the repository's names has met its own
            return Named(name)
        if found.name != name:
            return found
        if match := QUANTIZED.fullmatch(name):
            plain = self._rename(match["plain"], renamings, converters)
            return Named(plain.name + match["suffix"], plain.part, plain.axis)
        return found

    def _rename(
        self, name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> Named:
        renamed = apply_renamings(name, renamings)
        target, pattern = apply_converters(renamed, converters)
        if pattern is None:
            return Named(self._with_prefix(renamed))
        converter = next(c for c in converters if pattern in c.source_patterns)
        place = converter.source_patterns.index(pattern)
        first = converter.target_patterns[0]
        targets = [
            self._with_prefix(target.replace(first, one)) for one in converter.target_patterns
        ]
        target = targets[0]
        stem, _, fused = target.rpartition(".")
        number = re.search(pattern.replace("*.", r"(\d+)\."), renamed) if "*." in pattern else None
        if stem.endswith("experts"):
            half = HALVES[place] if len(converter.source_patterns) == len(HALVES) else fused
            if number is None:
                mixed = [op for op in converter.operations if isinstance(op, Interleave)]
                return Named(f"{stem}.{half}", interleaved=mixed[0].dim - 3 if mixed else None)
            expert, target = self._place_of(int(number.groups()[-1]), targets)
            return Named(f"{target.rpartition('.')[0]}.{expert}.{half}.weight")
        operation = converter.operations[0]
        if len(converter.operations) > 1 or not self.known.issuperset(targets):
            return Named(self._with_prefix(renamed))
        if isinstance(operation, Concatenate):
            order = re.search(re.sub(r"\*\.", r"(\\d+)\.", pattern), renamed) if number else None
            return Named(target, (place, int(order[1]) if order else 0), operation.dim)
        if isinstance(operation, Chunk):
            return Named(target, axis=operation.dim, others=tuple(targets[1:]))
        if isinstance(operation, Transpose) and not operation.check_dims:
            return Named(target, turned=(operation.dim0, operation.dim1))
        return Named(self._with_prefix(renamed))

    def _place_of(self, number: int, targets: list[str]) -> tuple[int, str]:
        """The place of an expert in the stacked tensors, and that in which it is."""
        for target in targets[:-1]:
            if number < self.experts.get(target, number + 1):
                return number, target
            number -= self.experts[target]
        return number, targets[-1]

    def _with_prefix(self, name: str) -> str:
        if name not in self.known and self.prefix:
            if f"{self.prefix}.{name}" in self.known:
                return f"{self.prefix}.{name}"
            if name.removeprefix(f"{self.prefix}.") in self.known:
                return name.removeprefix(f"{self.prefix}.")
        return name


def names_of(skeleton: PreTrainedModel) -> Names:
    """What transformers makes of the names in a checkpoint of this model."""
    transforms = get_model_conversion_mapping(skeleton, add_legacy=False)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    experts = {name: shape[0] for name, shape in shapes.items() if ".experts." in name}
    return Names(tuple(transforms), frozenset(shapes), str(skeleton.base_model_prefix), experts)
