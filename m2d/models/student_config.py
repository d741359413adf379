"""The student's config.json, from the teacher's and what its family says of the student."""

import copy
from operator import attrgetter
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from m2d.errors import UserError
from m2d.models.families import SIBLINGS, Family, Of
from m2d.models.skeleton import make_skeleton, text_key

# What differs between any two config classes.
NOT_COMPARED = {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}

ROPE = ("rope_parameters", "rope_scaling")


def number(config: PretrainedConfig, key: str) -> int:
    """A whole number in a config, or the one that a list repeats; dots lead into configs."""
    value = attrgetter(key)(config)
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise UserError(f"{key} differs between layers ({value}); m2d needs one number")
        value = value[0]
    return int(value)


def student_raw(
    family: Family, config: PretrainedConfig, raw: dict[str, Any], widths: dict[str, Any]
) -> dict[str, Any]:
    """The student's config.json of a teacher's, `raw`: without what only experts need.

    widths: keys that hold the width (and number of experts). Composite configs keep their other
    parts, or lose them for a student that is the text model alone.
    """
    key = text_key(config)
    text = config.get_text_config()
    inner = dict(raw if key is None else raw.get(key) or {})
    changes = {
        name: getattr(text, value.key) if isinstance(value, Of) else value
        for name, value in family.student_config.items()
    } | widths
    inner = _text_raw(family, text, inner, changes)
    if key is None:
        return inner
    # A composite model's own key says whether its head is tied, whatever its text config has.
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if family.text_only:
        for name in ("dtype", "torch_dtype"):
            if name in raw and name not in inner:
                inner[name] = raw[name]
        return inner | {"tie_word_embeddings": tied}
    outer = {**raw, key: inner, "tie_word_embeddings": tied}
    sibling = _outer_type(family, config)
    if sibling != config.model_type:
        outer["model_type"] = sibling
        subs = CONFIG_MAPPING[sibling].sub_configs
        for name, part in raw.items():
            kind = getattr(subs.get(name), "model_type", "")
            if name != key and isinstance(part, dict) and kind and "model_type" in part:
                outer[name] = {**part, "model_type": kind}
    return outer


def _outer_type(family: Family, config: PretrainedConfig) -> str:
    """The model_type of a composite student."""
    same = family.student_model_type == config.get_text_config().model_type
    return config.model_type if same or holds_any_text(config) else SIBLINGS[config.model_type]


def holds_any_text(config: PretrainedConfig) -> bool:
    """Whether it is a composite config whose text model may be of any class, as InternVL's is."""
    key = text_key(config)
    return key is not None and config.sub_configs[key] is AutoConfig


def _text_raw(
    family: Family, text: PretrainedConfig, raw: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    student = CONFIG_MAPPING[family.student_model_type]
    dropped = set(family.dropped_config_keys)
    if family.student_model_type != text.model_type:
        dropped |= _keys(type(text)) - _keys(student)
    inner = {key: value for key, value in raw.items() if key not in dropped}
    for key, value in changes.items():
        set_key(inner, type(text), key, value)
    inner["model_type"] = family.student_model_type
    if family.student_model_type == text.model_type:
        return inner
    rope = {key: inner[key] for key in ROPE if isinstance(inner.get(key), dict)}
    own = _rope_keys(type(text)) - _rope_keys(student)
    inner |= {key: {k: v for k, v in old.items() if k not in own} for key, old in rope.items()}
    inner |= _unlike_defaults(inner, text, {*dropped, *changes})
    if "head_dim" in _keys(student) and getattr(text, "head_dim", None) is None:
        inner.setdefault("head_dim", text.hidden_size // text.num_attention_heads)
    return inner | _layer_kinds(inner, text)


def _rope_keys(kind: type[PretrainedConfig]) -> set[str]:
    """What a class has in its rope parameters beside what all have, such as an image's axes."""
    return set(getattr(kind, "ignore_keys_at_rope_validation", None) or ())


def _layer_kinds(raw: dict[str, Any], teacher: PretrainedConfig) -> dict[str, Any]:
    """`layer_types`, where the student's class derives them and the teacher's class has none.

    In such a class every layer's attention has the config's sliding window, or none.
    """
    found = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    own = getattr(found, "layer_types", None)
    if own is None or getattr(teacher, "layer_types", None) is not None:
        return {}
    window = getattr(teacher, "sliding_window", None)
    meant = ["sliding_attention" if window else "full_attention"] * len(own)
    return {} if meant == list(own) else {"layer_types": meant}


def _keys(kind: type[PretrainedConfig]) -> set[str]:
    """Every key that a config class gives a meaning to."""
    return set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))


def _unlike_defaults(
    raw: dict[str, Any], config: PretrainedConfig, own: set[str]
) -> dict[str, Any]:
    """What the teacher's class means by keys that `raw` lacks, where the student's differs."""
    found = CONFIG_MAPPING[raw["model_type"]].from_dict(raw).to_dict()
    meant = config.to_dict()
    return {
        key: meant[key]
        for key in found.keys() & meant.keys() - own - NOT_COMPARED - raw.keys()
        if found[key] != meant[key]
    }


def set_key(raw: dict[str, Any], kind: type[PretrainedConfig], key: str, value: Any) -> None:
    """Set a config key under the name that `raw` has for it; config classes have synonyms.

    Dots in the key lead into configs of their own.
    """
    outer, _, inner = key.partition(".")
    if inner:
        raw[outer] = dict(raw.get(outer) or {})
        set_key(raw[outer], kind.sub_configs[outer], inner, value)
        return
    synonyms = dict(getattr(kind, "attribute_map", {}))
    real = synonyms.get(key, key)
    names = [key, *(n for n in (real, *synonyms) if n != key and synonyms.get(n, n) == real)]
    present = [name for name in names if name in raw]
    for name in present[1:]:
        del raw[name]
    raw[present[0] if present else key] = value


def student_skeleton(raw: dict[str, Any], where: Any) -> PreTrainedModel:
    """The student's stock class on the meta device."""
    return make_skeleton(CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw)), where)
