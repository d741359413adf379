"""A teacher on disk: its config, its family, and its module tree without weights."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.models.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, tensors_of
from m2d.models.derive import describe
from m2d.models.digests import require_noted_weights
from m2d.models.families import EMO, FAMILIES, Family
from m2d.models.fingerprint import fingerprint
from m2d.models.hub import locate, name_of
from m2d.models.parameters import check_tensors, text_part, wanted_of
from m2d.models.schemes import QUANTISATION_KEYS, read_scheme
from m2d.models.skeleton import (
    Stack,
    count_parameters,
    experts_modules,
    has_module,
    layers_of,
    make_skeleton,
    stack_of,
    text_key,
)
from m2d.models.student_config import number
from m2d.options import STUDENT_CLASSES

__all__ = [
    "CONFIG_MAPPING",
    "STUDENT_CLASSES",
    "Teacher",
    "count_parameters",
    "dtype_of",
    "has_experts",
    "layers_of",
    "locate",
    "make_skeleton",
    "open_teacher",
    "quiet",
    "read_config",
]

# Of config.json, what does not make the model: how its weights are packed, a classifier's labels.
NOT_OF_THE_MODEL = {*QUANTISATION_KEYS, "num_labels", "id2label", "label2id"}
# What a model returns beside its logits is not for the file to choose.
RETURNS = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
# The name of a module's class that routes to experts, of whatever form.
EXPERTS = re.compile(r"Experts$|MoE$")
# Beyond these, config.json is damaged, and making the model would take for ever.
MOST = {
    "num_hidden_layers": 10_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
    "hidden_size": 1_000_000,
}
AT_LEAST_1 = ("num_hidden_layers", "hidden_size")


@dataclass
class Teacher:
    """What is known of a teacher before any weight is read."""

    folder: Path
    name: str  # what the user called it: the hub id, or the folder's name
    raw_config: dict[str, Any]  # config.json as it stands on disk
    config: PretrainedConfig  # of the text model, where there are other parts
    family: Family
    skeleton: PreTrainedModel  # every parameter on the meta device
    moe_layers: list[int]

    @property
    def fingerprint(self) -> str | None:
        """Of its weights; None where only a config is at hand."""
        return fingerprint(self.folder)

    @property
    def shared_in_experts(self) -> int:
        """S: how many of the experts on disk, the last ones, are shared."""
        key = self.family.shared_in_experts
        return int(getattr(self.config, key) or 0) if key else 0

    @property
    def num_experts(self) -> int:
        """E, the routed experts."""
        return number(self.config, self.family.num_experts) - self.shared_in_experts

    @property
    def top_k(self) -> int:
        """k, the routed experts that a token takes."""
        return number(self.config, self.family.top_k) - self.shared_in_experts

    @property
    def expert_width(self) -> int:
        """I, the intermediate size of one expert."""
        widths = {stack.width for stack in self._stacks()}
        if len(widths) != 1:
            raise UserError(
                f"{self.family.expert_width} differs between layers ({sorted(widths)}); m2d needs "
                "one number"
            )
        return widths.pop()

    @property
    def expert_size(self) -> int:
        """H of the experts: the hidden size, but where they work in a smaller space."""
        return self._stacks()[0].size

    def _stacks(self) -> list[Stack]:
        """How each MoE layer keeps its experts."""
        layers = layers_of(self.skeleton)
        return [stack_of(layers[i].get_submodule(self.family.experts)) for i in self.moe_layers]

    @property
    def dense_width(self) -> int:
        """The largest intermediate size of a layer without experts; 0 where there is none."""
        path = f"{self.family.dense}.down_proj"
        sizes = [
            layer.get_submodule(path).get_parameter("weight").shape[1]
            for i, layer in enumerate(layers_of(self.skeleton))
            if i not in self.moe_layers and has_module(layer, path)
        ]
        return int(max(sizes, default=0))

    @property
    def shared_width(self) -> int:
        """Intermediate size of what is appended to a dense student's FFN unscaled."""
        if self.family.student_experts:
            return 0
        if self.family.shared is None:
            return self.shared_in_experts * self.expert_width
        layer = layers_of(self.skeleton)[self.moe_layers[0]]
        shared = layer.get_submodule(self.family.shared)
        return int(shared.get_parameter("up_proj.weight").shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's own dtype: the config's, else that of the embeddings on disk."""
        return dtype_of(self.config, self.folder)


def read_config(folder: Path) -> tuple[dict[str, Any], PretrainedConfig]:
    """config.json as on disk and as transformers reads it. No code of the checkpoint is run."""
    file = folder / "config.json"
    raw = _decoded(read_json(file))
    if not isinstance(raw.get("model_type"), str):
        raise UserError(f"{file}: has no model_type; is {folder} a model folder?")
    if raw["model_type"] == EMO.model_type:
        register_emo()
    if raw["model_type"] not in CONFIG_MAPPING:
        raise UserError(f"{file}: model_type {raw['model_type']!r} is not known to transformers")
    raw = _with_theta(file, raw)
    read_scheme(folder, raw)  # refuses a quantisation that is not known
    _check_counts(folder, raw)
    # How the weights are packed is for m2d.models.layouts, not for the model.
    plain = {key: value for key, value in raw.items() if key not in NOT_OF_THE_MODEL}
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(plain)
        if not isinstance(config.get_text_config(), PretrainedConfig):
            raise TypeError(f"{raw['model_type']} has no text_config")
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{file}: not a valid config ({reason[-1] if reason else error})") from None
    for key, value in RETURNS.items():
        setattr(config, key, value)
    return raw, config


def _with_theta(file: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the base of its rotation where transformers looks for it, at the top.

    DBRX's published one has it in attn_config alone, and transformers would take 10000 for it.
    Raises UserError where both have one and they differ.
    """
    inner = raw.get("attn_config")
    theta = inner.get("rope_theta") if isinstance(inner, dict) else None
    if theta is None or not hasattr(CONFIG_MAPPING[raw["model_type"]], "rope_parameters"):
        return raw
    own = raw.get("rope_parameters")
    top = (own if isinstance(own, dict) else {}).get("rope_theta", raw.get("rope_theta"))
    if top is None:
        return {**raw, "rope_theta": theta}
    if top != theta:
        raise UserError(
            f"{file}: rope_theta is {theta} in attn_config but {top} in rope_parameters, by which "
            "transformers rotates; make them the same"
        )
    return raw


def _check_counts(folder: Path, raw: dict[str, Any]) -> None:
    """Raise a UserError for counts that no model has, or more layers than the folder's tensors."""
    file = folder / "config.json"
    synonyms = getattr(CONFIG_MAPPING[raw["model_type"]], "attribute_map", {})
    for key, most in MOST.items():
        own = synonyms.get(key, key)
        for name, value in (
            (key, raw.get(key)),
            (own, raw.get(own)),
            (key, text_part(raw).get(key)),
        ):
            if isinstance(value, int) and value > most:
                raise UserError(f"{file}: {name} is {value}; no model has more than {most}")
            if key in AT_LEAST_1 and isinstance(value, int) and value < 1:
                raise UserError(f"{file}: {name} is {value}; every model has at least 1")
    layers = text_part(raw).get("num_hidden_layers")
    if not isinstance(layers, int) or not has_weights(folder):
        return
    names = (re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in tensors_of(folder))
    found = {int(name[1]) for name in names if name}
    if found and layers > max(found) + 1:
        raise UserError(
            f"{file}: num_hidden_layers is {layers}, but the tensors are of {max(found) + 1} layers"
        )


def has_weights(folder: Path) -> bool:
    """Whether there are weights in a folder, and not its config.json alone."""
    return (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()


def _decoded(value: Any) -> Any:
    """JSON as transformers writes it, with infinities as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def register_emo() -> None:
    """Make the Auto classes know EMO; its module is only imported for that."""
    from m2d.models.emo import register

    register()


def open_teacher(
    model: str | Path,
    config_only: bool = False,
    student_class: str = STUDENT_CLASSES[0],
    text_only: bool = False,
    student: str | Path | None = None,
) -> Teacher:
    """Read a teacher's config and build its skeleton; no weight is read.

    student_class and text_only settle the students that are made of it: m2d.models.derive.describe.
    So does the folder of a student that was made before.
    Raises UserError for a missing folder, an unknown or dense architecture, or a config that
    makes no sense.
    """
    folder = locate(model, config_only)
    raw, config = read_config(folder)
    skeleton = make_skeleton(config, folder)
    where = str(folder / "config.json")
    if student is not None:
        student_class, text_only = _kind_of(locate(student, config_only=True), config)
    family = describe(config, skeleton, where, student_class, text_only)
    moe_layers = [
        i for i, layer in enumerate(layers_of(skeleton)) if has_module(layer, family.experts)
    ]
    text = config.get_text_config()
    teacher = Teacher(folder, name_of(model), raw, text, family, skeleton, moe_layers)
    if not moe_layers:
        raise UserError(f"{folder}: no layer has experts; this model is dense already")
    check_weights(teacher)
    if not 1 <= teacher.top_k <= teacher.num_experts:
        raise UserError(
            f"{folder / 'config.json'}: {family.top_k} is {teacher.top_k}; it must lie between 1 "
            f"and the {teacher.num_experts} experts"
        )
    return teacher


def _kind_of(student: Path, teacher: PretrainedConfig) -> tuple[str, bool]:
    """The student_class and text_only that a student of this teacher was made with."""
    _, config = read_config(student)
    text_only = text_key(teacher) is not None and text_key(config) is None
    has = bool(experts_modules(make_skeleton(config, student)))
    return STUDENT_CLASSES[1 if has else 0], text_only


def check_weights(teacher: Teacher) -> None:
    """Raise a UserError where weights lie in the folder that are not those of the class.

    Or, of a student that serves as teacher, not those of its m2d.json.
    """
    if has_weights(teacher.folder):
        require_noted_weights(teacher.folder)
        check_tensors(Checkpoint(teacher.folder), wanted_of(teacher.skeleton, text_only=True))


def has_experts(model: str | Path) -> bool:
    """Whether a folder or hub id holds a model that `open_teacher` would open."""
    _, config = read_config(locate(model, config_only=True))
    skeleton = make_skeleton(config, model)
    family = FAMILIES.get(config.model_type)
    if family is None:
        # A module of experts of another form is for `open_teacher` to refuse by name.
        kinds = {type(module).__name__ for module in skeleton.modules()}
        return bool(experts_modules(skeleton)) or any(map(EXPERTS.search, kinds))
    return any(has_module(layer, family.experts) for layer in layers_of(skeleton))


def dtype_of(config: PretrainedConfig, folder: Path) -> torch.dtype:
    """The dtype of a model on disk; float32, as transformers has it, where nothing says."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    with contextlib.suppress(UserError):
        entries = Checkpoint(folder).entries.values()
        return next(e.dtype for e in entries if e.dtype.is_floating_point and e.dtype.itemsize > 1)
    return torch.float32


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress and advice, which is not for our users."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
