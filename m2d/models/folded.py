"""Folded experts: the routing weight's dependence on the token, put into the gate rows.

In the teacher a neuron counts times its expert's routing weight w_e(x), which depends on the token;
in a dense student it counts times a constant. Most of that dependence fits into the stock weights:
the gate row g_ej becomes g_ej + alpha_ej a_e, with a_e the direction in which the expert's router
logit rises above the others'. The gate of a shared expert, sigmoid(v x), goes into that expert's
own gate rows likewise, with v for a_e. Not of the paper; docs/beyond.md has the mathematics.

The file is safetensors, float32, per layer i: layers.{i}.alpha [E, I], .rows [E, H], .offset [E],
.shift [E, I] and .scale [E]; of a shared expert with a gate the same with E = 1, under the names
layers.{i}.shared.alpha and so on. Its metadata key "m2d" is as in the Gram statistics, with the
layers' R2. Shapes: N tokens, E routed experts, I an expert's intermediate size, H hidden size.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2d.artifacts import atomic_path, reading
from m2d.choose.plan import Plan
from m2d.errors import UserError
from m2d.models.experts import StackedExperts
from m2d.models.fingerprint import require_teacher
from m2d.models.teacher import Teacher
from m2d.models.visit import Visit
from m2d.sealed import digest_of, require_digest, require_finite_arrays

FORMAT = 1
PARTS = ("alpha", "rows", "offset", "shift", "scale")


@dataclass(frozen=True)
class FoldReport:
    """What folding does in a layer. R2: the share of the routed neurons' output w_e h_j d_j that
    one neuron with a constant scale reproduces, on held-out tokens.
    """

    layer: int
    choice: str
    """"none" where the layer is left as it is, else "fixed", "layer" or "neuron"."""
    centred: bool
    """Whether the rows are the router's less their mean."""
    alpha: float
    """Mean over the neurons, weighted by their routed energy."""
    r2_before: float
    r2_after: float


@dataclass(frozen=True, eq=False)
class LayerFold:
    """What is added to the gate rows of one layer's experts; float32, on the CPU."""

    report: FoldReport
    alpha: Tensor
    """[E, I]: how much of its expert's row a neuron takes; all 0 where the layer is left as it is.
    """
    rows: Tensor
    """[E, H]: a_e."""
    offset: Tensor
    """[E]: the same of the router's bias; goes to the gate's bias, where there is one."""
    shift: Tensor
    """[E, I]: also added to the gate's bias; 0 without one."""
    scale: Tensor
    """[E]: with which a folded expert's output best stands for its routed output."""
    shared: "LayerFold | None" = None
    """Of a shared expert with a gate: one expert, whose row is the gate's."""

    @property
    def folds_routed(self) -> bool:
        """Whether the routed experts change."""
        return self.report.choice != "none"

    @property
    def folds(self) -> bool:
        """Whether anything changes."""
        return self.folds_routed or (self.shared is not None and self.shared.folds)

    def gate(self, expert: int, gate_proj: Tensor) -> Tensor:
        """The folded gate projection [I, H], in its own dtype."""
        added = self.alpha[expert, :, None] * self.rows[expert]
        return (gate_proj.float() + added.to(gate_proj.device)).to(gate_proj.dtype)

    def gate_bias(self, expert: int, bias: Tensor) -> Tensor:
        """The folded gate's bias [I], in its own dtype."""
        added = self.alpha[expert] * self.offset[expert] + self.shift[expert]
        return (bias.float() + added.to(bias.device)).to(bias.dtype)

    def experts(self, experts: StackedExperts) -> StackedExperts:
        """The routed experts with folded gates; `experts` themselves where nothing changes."""
        if not self.folds_routed:
            return experts
        width = experts.down_proj.shape[2]
        gate_up = experts.gate_up_proj.detach().clone()
        own = experts.gate_up_bias
        bias = None if own is None else own.detach().clone()
        for expert in range(experts.num_experts):
            gate_up[expert, :width] = self.gate(expert, gate_up[expert, :width])
            if bias is not None:
                bias[expert, :width] = self.gate_bias(expert, bias[expert, :width])
        return StackedExperts(
            gate_up, experts.down_proj, experts.glu,
            bias, experts.down_bias, experts.shared,
        )  # fmt: skip


Folds = Mapping[int, LayerFold]
"""By layer."""


class FoldedInTurn:
    """The folded experts of the layer that a pass has come to."""

    def __init__(self, folds: Folds | None):
        self.folds = folds or {}
        self.layer: int | None = None

    def at(self, seen: Visit) -> StackedExperts:
        """The experts of that layer, folded; themselves where nothing changes."""
        if self.layer != seen.layer:
            fold = self.folds.get(seen.layer)
            self.layer = seen.layer
            self.experts = seen.experts if fold is None else fold.experts(seen.experts)
        return self.experts


def write_folds(path: str | Path, folds: Folds, metadata: dict[str, Any]) -> None:
    """Write the file; see the module's docstring."""
    tensors = {
        f"layers.{i}.{part}": tensor.float().contiguous()
        for i, fold in folds.items()
        for part, tensor in tensors_of(fold).items()
    }
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    require_finite_arrays(path, arrays)
    about = {"format": FORMAT, "sha256": digest_of(arrays), "layers": reports(folds), **metadata}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"m2d": json.dumps(about)})


def read_folds(path: str | Path) -> tuple[dict[int, LayerFold], dict[str, Any]]:
    """What `write_folds` wrote: the folds, and the metadata.

    Raises UserError where the file is unreadable or not of this format.
    """
    with reading(path, "a fold file; make one with m2d fold"), safe_open(path, "pt") as file:
        metadata = json.loads((file.metadata() or {})["m2d"])
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: format {metadata.get('format')!r}; {FORMAT} is read")
        arrays = {n: file.get_tensor(n).numpy() for n in file.keys()}  # noqa: SIM118
        require_digest(path, arrays, metadata)
        folds = {}
        for report in metadata["layers"]:
            before = f"layers.{report['layer']}."
            own = {
                n.removeprefix(before): file.get_tensor(n) for n in arrays if n.startswith(before)
            }
            folds[report["layer"]] = fold_of(report, own)
    return folds, metadata


def folds_of(teacher: Teacher, path: str | Path) -> tuple[dict[int, LayerFold], dict[str, Any]]:
    """The folds in a file for this teacher, and what m2d.json says of them.

    Raises UserError where the file is unreadable, or was made from another teacher.
    """
    folds, about = read_folds(path)
    found = about.get("teacher_fingerprint")
    require_teacher([(str(path), found)], teacher.fingerprint, teacher.name)
    shape = (teacher.num_experts, teacher.expert_width)
    fits = all(
        fold.alpha.shape == shape
        and fold.rows.shape[1] == teacher.config.hidden_size
        and (fold.shared is not None) == bool(teacher.family.shared_gate)
        for fold in folds.values()
    )
    if sorted(folds) != sorted(teacher.moe_layers) or not fits:
        raise UserError(f"{path}: not made from this teacher; run m2d fold again")
    return folds, {key: about[key] for key in ("mode", "sequences", "length", "layers")}


def reports(folds: Folds) -> list[dict[str, Any]]:
    """What m2d.json says of each layer."""
    return [report_of(fold) for fold in folds.values()]


def report_of(fold: LayerFold) -> dict[str, Any]:
    """What m2d.json says of a layer, with what it says of the shared expert."""
    shared = {} if fold.shared is None else {"shared": asdict(fold.shared.report)}
    return asdict(fold.report) | shared


def tensors_of(fold: LayerFold) -> dict[str, Tensor]:
    """A layer's tensors by the names that they have in a file."""
    found = {part: getattr(fold, part) for part in PARTS}
    if fold.shared is not None:
        found |= {f"shared.{part}": getattr(fold.shared, part) for part in PARTS}
    return found


def fold_of(report: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerFold:
    """The layer of which `report_of` and `tensors_of` have told."""
    own = {key: value for key, value in report.items() if key != "shared"}
    shared = None
    parts: dict[str, Any]
    if "shared" in report:
        parts = {part: tensors[f"shared.{part}"] for part in PARTS}
        shared = LayerFold(FoldReport(**report["shared"]), **parts)
    parts = {part: tensors[part] for part in PARTS}
    return LayerFold(FoldReport(**own), **parts, shared=shared)


def with_shared_scales(plan: Plan, folds: Folds) -> Plan:
    """The plan with the constants that suit folded shared experts, in place of their mean gates."""
    layers = []
    for layer in plan.layers:
        fold = folds.get(layer.layer)
        if fold is not None and fold.shared is not None and fold.shared.folds:
            layer = replace(layer, shared_scale=float(fold.shared.scale))
        layers.append(layer)
    return replace(plan, layers=tuple(layers))
