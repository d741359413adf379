"""A teacher run one decoder layer at a time: load it, push every batch through, drop it.

The stock model class does everything but hold the layers: its own forward makes the embeddings,
masks and positions (recorded once), and its own head makes the logits. Only the routed experts are
replaced, by StackedExperts, which computes the same and can be observed.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn

from m2d.devices import announce, free_memory, release_freed_memory
from m2d.errors import UserError
from m2d.models.calls import Calls, Tap, replay, with_room
from m2d.models.checkpoint import Checkpoint, require_finite
from m2d.models.experts import (
    GLU,
    Glu,
    InputScalingBlock,
    StackedExperts,
    read_stacked,
    stock_glu,
)
from m2d.models.hidden import IN_MEMORY_BYTES, HiddenStates
from m2d.models.resume import Kept, Totals
from m2d.models.routers import routed_rows
from m2d.models.skeleton import (
    in_text,
    kept_in_float32,
    layers_path,
    move_text,
    reached_by_text,
    replace_layers,
    text_paths,
)
from m2d.models.teacher import Teacher, layers_of
from m2d.models.visit import Visit
from m2d.models.widen import held, widen
from m2d.progress import progress


class StreamedTeacher:
    """Runs a teacher's layers in turn over fixed tokens.

    Memory: two layers' weights (the next is read while one computes), one hidden state per token,
    and the embeddings and head; weights in the dtype on disk where `dtype`, that of the products,
    is wider.
    """

    def __init__(self, teacher: Teacher, dtype: torch.dtype, device: torch.device):
        self.teacher, self.dtype, self.device = teacher, dtype, device
        announce(teacher.name, teacher.dtype, dtype, device)
        self.checkpoint = Checkpoint(teacher.folder)
        # A copy, still without weights: the caller's teacher stays whole.
        self.model = copy.deepcopy(reached_by_text(teacher.skeleton))
        self.layers = list(layers_of(self.model))
        path = layers_path(self.model)
        self.prefixes = [f"{path}.{i}." for i in range(len(self.layers))]
        self.taps = [Tap(layer) for layer in self.layers]
        replace_layers(self.model, self.taps)
        glus = {i: _glu_of(teacher, self.layers[i]) for i in teacher.moe_layers}
        self.glus: dict[int, str | Glu] = glus
        self.in_float32 = kept_in_float32(self.model, dtype)
        self.trunk = False  # whether embeddings, final norm and head are in memory
        self._load_trunk()

    def _load_trunk(self) -> None:
        """Embeddings, final norm and head of the text model, unless they are there."""
        if self.trunk:
            return
        self.trunk = True
        inside = f"{layers_path(self.model)}."
        of_text = in_text(self.model)
        names = [n for n in self.checkpoint.entries if of_text(n) and not n.startswith(inside)]
        state = {name: self._read(name) for name in names}
        _check_state(self.model, state, self.checkpoint, "")
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        for path in text_paths(self.model):
            part = self.model.get_submodule(path)
            _require_loaded(part, self.checkpoint, f"{path}." if path else "")
            widen(part, self.dtype)
        move_text(self.model, self.device)

    def _drop_trunk(self) -> None:
        """Free what no layer needs."""
        drop_weights(self.model)
        self.trunk = False

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.read(name)
        if not tensor.is_floating_point():
            return tensor
        if self.in_float32(name):
            return tensor.float()
        narrowed = tensor.to(held(tensor.dtype, self.dtype))
        require_finite(narrowed, f"{self.teacher.folder}: {name}")
        return narrowed

    def _load_layer(self, index: int) -> nn.Module:
        """The stock decoder layer with its weights, its experts stacked."""
        teacher, prefix = self.teacher, self.prefixes[index]
        layer = self.layers[index]
        if index in teacher.moe_layers:
            shared = teacher.shared_in_experts
            count = teacher.num_experts + shared
            shape = (count, teacher.expert_width, teacher.expert_size)
            family = teacher.family
            stacked = read_stacked(
                self.checkpoint, family, index, shape, self.glus[index], self.dtype, shared
            )
            layer.set_submodule(family.experts, stacked)
            if family.scales_input:
                path, _, name = family.experts.rpartition(".")
                block = layer.get_submodule(path)
                if not isinstance(block, InputScalingBlock):
                    router = family.router.removeprefix(f"{path}.")
                    layer.set_submodule(path, InputScalingBlock(block, name, router))
        names = [n for n in layer.state_dict() if prefix + n in self.checkpoint.entries]
        state = {n: self._read(prefix + n) for n in names}
        _check_state(layer, state, self.checkpoint, prefix)
        layer.load_state_dict(state, strict=False, assign=True)
        _require_loaded(layer, self.checkpoint, prefix)
        return widen(layer, self.dtype).to(self.device)

    @torch.no_grad()
    def run(
        self,
        input_ids: Tensor,
        batch: int,
        visit: Callable[[Visit], None] | None = None,
        title: str = "layers",
        kept: Kept[Totals] | None = None,
    ) -> HiddenStates:
        """Push input_ids [sequences, length] through every layer.

        kept: to go on with after a kill; its totals are visited in place of `visit`.
        Returns the hidden states after the last layer, one [<= batch, length, H] tensor per
        batch, before the final norm; `logits` turns them into logits. Of a pass that is kept there
        are none.
        """
        batches = input_ids.split(batch)
        if kept is not None:
            kept.open(self.teacher.moe_layers)
            visit = kept.totals.visit
        start = 0 if kept is None else kept.finished
        hidden = HiddenStates(len(batches), self.device)
        if start == len(self.layers):
            return hidden
        self._load_trunk()
        calls = self._begin(batches, hidden, kept)
        if kept is not None:
            self._drop_trunk()
        last = len(self.layers) - 1
        units = range(start * len(batches), len(self.layers) * len(batches))
        with ThreadPoolExecutor(1) as reader:
            coming: Future[nn.Module] | None = reader.submit(self._load_layer, start)
            for unit in progress(units, f"{title} x batches", len(self.layers) * len(batches)):
                index, i = divmod(unit, len(batches))
                if i == 0:
                    assert coming is not None
                    layer = coming.result()
                    coming = reader.submit(self._load_layer, index + 1) if index < last else None
                    self._observe(layer, index, visit)
                    hidden.next_layer()
                moved = calls.run(layer, index, i, hidden[i])
                if i == 0 or index == last:  # what is not finite stays so, to the last layer
                    require_finite(moved, f"{self.teacher.name}: what layer {index} gives")
                hidden[i] = moved
                if i == len(batches) - 1:
                    drop_weights(layer)
                    release_freed_memory()
                    # What layers hand on beside hidden states is not kept.
                    if kept is not None and (index == last or not calls.between_layers):
                        kept.done(index, hidden, index == last)
        if kept is not None:
            hidden.close()
        return hidden

    def _begin(
        self, batches: Sequence[Tensor], hidden: HiddenStates, kept: Kept[Totals] | None = None
    ) -> Calls:
        """Fill `hidden` with embeddings, or with what was kept; gives the layers' calls."""
        calls = Calls(self.taps)
        for i, ids in enumerate(batches):
            self.model(ids.to(self.device), use_cache=False, logits_to_keep=1)
            calls.record()
            assert self.taps[0].hidden is not None
            first = with_room(self.taps, self.taps[0].hidden)
            if not i:
                shapes = [(len(b), *first.shape[1:]) for b in batches]
                hidden.plan(shapes, first.dtype)
                if kept is not None:
                    hidden.keep_in(kept.folder, "hidden", self._in_memory())
            if kept is None or not kept.finished:
                hidden[i] = first
        if kept is not None and kept.finished:
            hidden.restore(kept.file)
        return calls

    def _in_memory(self) -> int:
        """Bytes of hidden states up to which they stay on the device."""
        return free_memory(self.device) // 4 if self.device.type == "cuda" else IN_MEMORY_BYTES

    def _observe(self, layer: nn.Module, index: int, visit: Callable[[Visit], None] | None) -> None:
        if visit is None or index not in self.teacher.moe_layers:
            return
        family = self.teacher.family
        experts = layer.get_submodule(family.experts)
        module = layer.get_submodule(family.router)
        router = routed_rows(module, self.teacher.num_experts)
        assert isinstance(experts, StackedExperts)
        if family.shared_gate and family.shared:
            router.shared_expert = layer.get_submodule(family.shared)
            router.shared_gate = cast(Tensor, layer.get_submodule(family.shared_gate).weight)

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            router.seen = args[0].reshape(-1, args[0].shape[-1])

        if not family.scales_input:
            module.register_forward_pre_hook(note)
        experts.observer = lambda *batch: visit(Visit(index, router, experts, *batch))

    @torch.no_grad()
    def logits(self, input_ids: Tensor, hidden: Tensor, rows: slice) -> Tensor:
        """The stock model's logits [B, rows, V] at positions `rows` of the last hidden states."""
        replay(self.taps, hidden)
        positions = torch.arange(hidden.shape[1], device=self.device)[rows]
        output = self.model(input_ids.to(self.device), use_cache=False, logits_to_keep=positions)
        replay(self.taps, None)
        return output.logits


def _glu_of(teacher: Teacher, layer: nn.Module) -> str | Glu:
    """What experts compute between their projections, of gate and up one after the other."""
    family = teacher.family
    if family.glu in GLU:
        return GLU[family.glu](teacher.config)
    stock: Any = layer.get_submodule(family.experts)
    return stock_glu(stock, family)


def drop_weights(module: nn.Module) -> None:
    """Free the parameters in a module. Buffers are small, and not all are in the checkpoint."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


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
