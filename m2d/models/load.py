"""A whole model in memory, its weights given by the reader that also serves the streamed teacher.

transformers' own loading draws missing tensors at random, ignores what it does not know, and needs
a kernel for each quantisation; here a model is its stock class on the meta device, and every
parameter is filled from m2d/models/checkpoint.py, after the check that all are there.
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import _get_device_map, expand_device_map

from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint, require_finite
from m2d.models.digests import require_noted_weights
from m2d.models.names import names_of
from m2d.models.parameters import Fused, check_tensors, is_buffer, wanted_of
from m2d.models.skeleton import experts_modules, in_text, kept_in_float32, make_skeleton, text_key
from m2d.models.widen import held, widen
from m2d.options import SPREADS
from m2d.progress import progress

Where = str | torch.device | dict[str, Any]
"""A device, one of SPREADS, or a map of module paths to devices."""


def check_model(folder: Path, config: PretrainedConfig) -> None:
    """Raise a UserError where load_model would, as far as the files' headers tell."""
    model = make_skeleton(config, folder)
    _know_family(model, config, folder)
    check_tensors(Checkpoint(folder, names_of(model)), wanted_of(model))


def beside_text(folder: Path, config: PretrainedConfig) -> set[str]:
    """The tensors of a folder, by name on disk, that have no part in predicting text from text."""
    if text_key(config) is None:
        return set()
    model = make_skeleton(config, folder)
    of_text, files = in_text(model), Checkpoint(folder).files
    return {name for name, named in names_of(model).of(files).items() if not of_text(named.name)}


def load_model(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    where: Where,
    *,
    narrow: bool = False,
) -> PreTrainedModel:
    """A stock causal LM on a device, or spread over several. No code of the folder is run.

    dtype: of its products, and of its weights, but for `narrow`: on one device these then stay as
    they are on disk where that is narrower, and are widened product by product.
    config: as m2d.models.teacher.read_config gives it. Raises UserError where the folder's tensors
    are not just those of the class or of its m2d.json, of the text model are not finite, or do not
    fit in the devices.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype  # buffers that the class computes are of the default dtype
    model = make_skeleton(config, folder)
    _know_family(model, config, folder)
    checkpoint = Checkpoint(folder, names_of(model))
    wanted = wanted_of(model)
    check_tensors(checkpoint, wanted)
    require_noted_weights(folder)
    spread = _spread(model, where, dtype, folder)
    devices = expand_device_map(spread, [name for name, _ in _tensors_of(model)])
    in_float32 = kept_in_float32(model, dtype)
    narrow = narrow and len(set(spread.values())) == 1
    names = [name for name in (*wanted.plain, *wanted.fused) if name not in wanted.tied]
    of_text = in_text(model)
    first = os.environ.get("RANK", "0") == "0"
    for name in progress(names, f"{folder.name}, tensors") if first else names:
        one = wanted.fused.get(name)
        if one is None and name not in checkpoint:
            continue  # what the class computes itself
        own = torch.float32 if in_float32(name) else dtype
        if narrow:
            own = held(checkpoint.entry(one.names(0)[0] if one else name).dtype, own)
        tensor = _join(checkpoint, one, own) if one else checkpoint.read(name, of_text(name))
        if tensor.is_floating_point():
            tensor = tensor.to(own)
            if of_text(name):
                require_finite(tensor, f"{folder}: {name}")
        _assign(model, name, tensor.to(devices[name]))
    model.tie_weights()
    if narrow:
        widen(model, dtype)
    for name, buffer in list(model.named_buffers()):  # those that the class computed, too
        _assign(model, name, buffer.to(devices[name]))
    if len(set(spread.values())) > 1:
        dispatch_model(model, spread, skip_keys=model._skip_keys_device_placement)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{folder}: a parameter was left without a value")  # a class of new kind
    for name, parameter in model.named_parameters():
        if not of_text(name):
            parameter.requires_grad_(False)  # a vision tower sees no image here
    return model.eval()


def _know_family(model: PreTrainedModel, config: PretrainedConfig, folder: Path) -> None:
    """A family that is in no table is described, so that the checkpoint's layout is known."""
    from m2d.models.derive import describe
    from m2d.models.families import known_family

    if experts_modules(model) and known_family(config.model_type) is None:
        describe(config, model, str(folder / "config.json"))


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _spread(
    model: PreTrainedModel, where: Where, dtype: torch.dtype, folder: Path
) -> dict[str, Any]:
    """Module path -> device, for every part of the model."""
    if not isinstance(where, dict) and where not in SPREADS:
        return {"": torch.device(where)}
    if isinstance(where, str):  # sizes are those of the parameters, which are on meta
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    try:
        found = _get_device_map(model, where, None, None)
    except ValueError as error:
        raise UserError(f"the device map: {str(error).splitlines()[0]}") from None
    kinds = {str(device) for device in found.values()}
    if "disk" in kinds or ("cpu" in kinds and kinds != {"cpu"} and isinstance(where, str)):
        raise UserError(f"{folder}: does not fit in the devices of --teacher-device-map")
    return found


def _join(checkpoint: Checkpoint, fused: Fused, dtype: torch.dtype) -> Tensor:
    """The whole parameter of all experts."""
    whole = torch.empty(fused.shape, dtype=dtype)
    for expert in range(fused.shape[0]):
        whole[expert] = fused.join([checkpoint.read(name) for name in fused.names(expert)])
    return whole.flatten(0, 1) if fused.rows else whole


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if is_buffer(model, name):
        module._buffers[last] = tensor
    else:
        setattr(module, last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
