"""A teacher run one decoder layer at a time: load it, push every batch through, drop it.

The stock model class does everything but hold the layers: its own forward makes the embeddings,
masks and positions (recorded once), and its own head makes the logits. Only the routed experts are
replaced, by StackedExperts, which computes the same and can be observed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn

from m2d.errors import UserError
from m2d.memory import release_freed_memory
from m2d.models.checkpoint import Checkpoint
from m2d.models.experts import GLU, Glu, StackedExperts, read_stacked
from m2d.models.families import expert_pattern
from m2d.models.routers import routed_rows
from m2d.models.skeleton import kept_in_float32
from m2d.models.teacher import Teacher, layers_of
from m2d.progress import progress

# Called with every batch of a MoE layer: (layer index, router module, experts module, hidden
# [N, H], top-k index [N, k], top-k weights [N, k], norms of the selected outputs [N, k]).
Visitor = Callable[[int, nn.Module, StackedExperts, Tensor, Tensor, Tensor, Tensor], None]


class _Tap(nn.Module):
    """Stands where a decoder layer stood: notes its call and passes `replay` or the input on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        # Some models ask the layer itself, such as for the kind of its attention.
        self.__dict__["stood_here"] = layer
        self.hidden: Tensor | None = None
        self.call: dict[str, Any] = {}
        self.replay: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stood_here"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden, kwargs
        return hidden if self.replay is None else self.replay


class StreamedTeacher:
    """Runs a teacher's layers in turn over fixed tokens.

    Memory: two layers' weights (the next is read while one computes), one hidden state per token,
    and the embeddings and head.
    """

    def __init__(self, teacher: Teacher, dtype: torch.dtype, device: torch.device):
        self.teacher, self.dtype, self.device = teacher, dtype, device
        self.checkpoint = Checkpoint(teacher.folder)
        self.is_expert = expert_pattern(teacher.family).fullmatch
        self.model = teacher.skeleton
        self.layers = [
            layer.__dict__["stood_here"] if isinstance(layer, _Tap) else layer
            for layer in layers_of(self.model)
        ]
        self.prefixes = [f"{_layers_path(self.model)}.{i}." for i in range(len(self.layers))]
        self.taps = [_Tap(layer) for layer in self.layers]
        self.model.base_model.layers = nn.ModuleList(self.taps)
        glus = {i: _glu_of(teacher, self.layers[i]) for i in teacher.moe_layers}
        self.glus: dict[int, str | Glu] = glus
        self.in_float32 = kept_in_float32(self.model, dtype)
        self._load_trunk()

    def _load_trunk(self) -> None:
        """Embeddings, final norm and head."""
        inside = f"{_layers_path(self.model)}."
        names = [n for n in self.checkpoint.entries if not n.startswith(inside)]
        state = {name: self._read(name) for name in names}
        _check_state(self.model, state, self.checkpoint, "")
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        _require_loaded(self.model, self.checkpoint, "")
        cast(nn.Module, self.model).to(self.device)

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.read(name)
        if not tensor.is_floating_point():
            return tensor
        return tensor.float() if self.in_float32(name) else tensor.to(self.dtype)

    def _load_layer(self, index: int) -> nn.Module:
        """The stock decoder layer with its weights, its experts stacked."""
        teacher, prefix = self.teacher, self.prefixes[index]
        layer = self.layers[index]
        if index in teacher.moe_layers:
            shared = teacher.shared_in_experts
            count = teacher.num_experts + shared
            shape = (count, teacher.expert_width, teacher.config.hidden_size)
            stacked = read_stacked(
                self.checkpoint, teacher.family, index, shape, self.glus[index], self.dtype, shared
            )
            layer.set_submodule(teacher.family.experts, stacked)
        names = [n for n in self.checkpoint.entries if n.startswith(prefix)]
        state = {n[len(prefix) :]: self._read(n) for n in names if not self.is_expert(n)}
        _check_state(layer, state, self.checkpoint, prefix)
        layer.load_state_dict(state, strict=False, assign=True)
        _require_loaded(layer, self.checkpoint, prefix)
        return layer.to(self.device)

    @torch.no_grad()
    def run(
        self, input_ids: Tensor, batch: int, visit: Visitor | None = None, title: str = "layers"
    ) -> list[Tensor]:
        """Push input_ids [sequences, length] through every layer.

        Returns the hidden states after the last layer, one [<= batch, length, H] tensor per
        batch, before the final norm; `logits` turns them into logits.
        """
        batches = input_ids.split(batch)
        hidden: list[Tensor] = []
        calls: dict[int, list[dict[str, Any]]] = {}  # by batch size, one per layer
        for ids in batches:
            self.model(ids.to(self.device), use_cache=False, logits_to_keep=1)
            first = self.taps[0].hidden
            assert first is not None
            hidden.append(first)
            calls.setdefault(len(ids), [tap.call for tap in self.taps])
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._load_layer, 0)
            for index in progress(range(len(self.layers)), title):
                layer = coming.result()
                if index + 1 < len(self.layers):
                    coming = reader.submit(self._load_layer, index + 1)
                self._observe(layer, index, visit)
                for i, ids in enumerate(batches):
                    output = layer(hidden[i], **calls[len(ids)][index])
                    hidden[i] = output[0] if isinstance(output, tuple) else output
                _drop(layer)
                release_freed_memory()
        return hidden

    def _observe(self, layer: nn.Module, index: int, visit: Visitor | None) -> None:
        if visit is None or index not in self.teacher.moe_layers:
            return
        family = self.teacher.family
        experts = layer.get_submodule(family.experts)
        router = routed_rows(layer.get_submodule(family.router), self.teacher.num_experts)
        assert isinstance(experts, StackedExperts)
        experts.observer = lambda *batch: visit(index, router, experts, *batch)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, hidden: Tensor, rows: slice) -> Tensor:
        """The stock model's logits [B, rows, V] at positions `rows` of the last hidden states."""
        self.taps[-1].replay = hidden
        positions = torch.arange(hidden.shape[1], device=self.device)[rows]
        output = self.model(input_ids.to(self.device), use_cache=False, logits_to_keep=positions)
        self.taps[-1].replay = None
        return output.logits


def _layers_path(model: nn.Module) -> str:
    return f"{model.base_model_prefix}.layers"


def _glu_of(teacher: Teacher, layer: nn.Module) -> str | Glu:
    """What experts compute between their projections, of gate and up one after the other."""
    family = teacher.family
    if family.glu == "glu":
        return str(teacher.config.hidden_act)
    if family.glu in GLU:
        return GLU[family.glu](teacher.config)
    stock: Any = layer.get_submodule(family.experts)
    if isinstance(stock, StackedExperts):  # this skeleton was streamed before
        return cast(Glu, stock.custom_glu)
    if not family.interleaved:
        return cast(Glu, stock._apply_gate)
    return lambda gate_up: stock._apply_gate(
        torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
    )


def _drop(layer: nn.Module) -> None:
    """Free a layer's parameters. Buffers are small, and not all are in the checkpoint."""
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _check_state(
    module: nn.Module, state: dict[str, Tensor], checkpoint: Checkpoint, prefix: str
) -> None:
    """Raise a UserError where a tensor's shape differs from the config's."""
    expected = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in state.items():
        if name in expected and expected[name].shape != tensor.shape:
            raise UserError(
                f"{checkpoint.folder}: {prefix}{name} is {list(tensor.shape)} on disk, but the "
                f"config implies {list(expected[name].shape)}"
            )


def _require_loaded(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Raise a UserError where a parameter was not in the checkpoint."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{checkpoint.folder}: the checkpoint has no tensor {prefix + name!r}")
