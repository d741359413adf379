"""A config.json that says the same to transformers 4 and 5, to vLLM and to llama.cpp.

transformers 5 writes `rope_parameters`, `dtype` and `num_local_experts`; version 4, and programs
made for its files, know `rope_theta` with `rope_scaling`, `torch_dtype` and `num_experts`, and take
their own defaults where these are missing. So both are written, from one reading of the config.
"""

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# In rope_parameters; in transformers 4's files they stand elsewhere.
OUTSIDE_SCALING = ("rope_theta", "partial_rotary_factor")


def both_spellings(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with what the two versions spell differently in both ways."""
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    found = dict(raw)
    if (dtype := raw.get("dtype", raw.get("torch_dtype"))) is not None:
        found |= {"dtype": dtype, "torch_dtype": dtype}
    for name, real in dict(getattr(config, "attribute_map", {})).items():
        if name == "num_experts" and real in raw:
            found[name] = raw[real]
    return found | _rope(raw, config)


def _rope(raw: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The keys of the rotary embeddings; none where each kind of layer has its own."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        return {}
    kind = rope.get("rope_type", "default")
    own = {key: value for key, value in rope.items() if value is not None}
    found: dict[str, Any] = {"rope_parameters": own, "rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in own:
        found["partial_rotary_factor"] = own["partial_rotary_factor"]
    scaling = {key: value for key, value in own.items() if key not in OUTSIDE_SCALING}
    # transformers 5 fills in the longest position; version 4 takes it for a ratio of 1.
    if scaling.get("original_max_position_embeddings") == config.max_position_embeddings:
        del scaling["original_max_position_embeddings"]
    if kind == "default":
        found["rope_scaling"] = None
    elif not raw.get("rope_scaling"):
        found["rope_scaling"] = {**scaling, "type": kind}
    return found
