"""Folded experts: the routing weight's dependence on the token, put into the gate rows.

In the teacher a neuron counts times its expert's routing weight w_e(x), which depends on the token;
in a dense student it counts times a constant. Most of that dependence fits into the stock weights:
the gate row g_ej becomes g_ej + alpha_ej a_e, with a_e the direction in which the expert's router
logit rises above the others'. Not of the paper; docs/beyond.md has the mathematics.

The file is safetensors, float32, per layer i: layers.{i}.alpha [E, I], .rows [E, H], .offset [E],
.shift [E, I] and .scale [E]; its metadata key "m2d" is as in the Gram statistics, with the layers'
R2. Shapes: N tokens, E routed experts, I an expert's intermediate size, H hidden size.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2d.artifacts import atomic_path, reading
from m2d.errors import UserError
from m2d.models.experts import StackedExperts
from m2d.models.fingerprint import require_teacher
from m2d.models.teacher import Teacher
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

    @property
    def folds(self) -> bool:
        """Whether anything changes."""
        return self.report.choice != "none"

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
        if not self.folds:
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


def write_folds(path: str | Path, folds: Folds, metadata: dict[str, Any]) -> None:
    """Write the file; see the module's docstring."""
    tensors = {
        f"layers.{i}.{part}": getattr(fold, part).float().contiguous()
        for i, fold in folds.items()
        for part in PARTS
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
        found = [FoldReport(**report) for report in metadata["layers"]]
        folds = {
            report.layer: LayerFold(
                report, *(file.get_tensor(f"layers.{report.layer}.{part}") for part in PARTS)
            )
            for report in found
        }
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
        fold.alpha.shape == shape and fold.rows.shape[1] == teacher.config.hidden_size
        for fold in folds.values()
    )
    if sorted(folds) != sorted(teacher.moe_layers) or not fits:
        raise UserError(f"{path}: not made from this teacher; run m2d fold again")
    return folds, {key: about[key] for key in ("mode", "sequences", "length", "layers")}


def reports(folds: Folds) -> list[dict[str, Any]]:
    """What m2d.json says of each layer."""
    return [asdict(fold.report) for fold in folds.values()]
