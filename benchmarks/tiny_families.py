"""Tiny random teachers of every Mixture-of-Experts text generator that transformers has.

`model_types` lists them, `tiny_config` makes a config of a model type small, and `write_teacher`
saves a random model of it whose router is uniform and takes every expert.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

EXPERTS, LAYERS, VOCABULARY = 4, 4, 128
HAS_EXPERTS = re.compile(r"top_k_index|class \w*(Experts|SparseMoe|MoE|MoeBlock)\w*\(")
# Every key that says how many experts there are, or how many a token takes.
COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
    "top_k_experts",
)  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "moe_intermediate_size": 16, "expert_intermediate_size": 16, "dense_intermediate_size": 48,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "moe_shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16, "intermediate_size_mlp": 48,
    "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_hidden_size": 16,
    **dict.fromkeys(COUNTS, EXPERTS),
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "max_position_embeddings": 64,
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "qk_head_dim": 12, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_layer_start_index": 1, "sliding_window": 8, "tie_word_embeddings": False,
    "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
    "n_groups": 1, "mamba_dt_rank": 4, "mamba_chunk_size": 8, "chunk_size": 8,
    "global_head_dim": 8, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "num_nextn_predict_layers": 0,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "swa_v_head_dim": 8, "zero_expert_num": 0, "num_zero_experts": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "depth": 2, "num_hidden_layers": 2, "num_heads": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48,
    "out_hidden_size": 32, "image_size": 32, "patch_size": 8, "num_position_embeddings": 16,
    "head_dim": 8, "global_head_dim": 8, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0], "vision_output_dim": 32, "projector_input_dim": 32,
    "projector_output_dim": 32, "text_hidden_size": 32,
}  # fmt: skip
TOKENS = (
    "image_token_id", "video_token_id", "audio_token_id", "image_token_index",
    "video_token_index", "vision_start_token_id", "vision_end_token_id", "boi_token_id",
    "eoi_token_id", "image_start_token_id", "image_end_token_id", "video_start_token_id",
    "video_end_token_id",
)  # fmt: skip
# Layers that take the indices that the layer before has chosen.
HANDED_ON = {"indexer_types": ["full", "shared", "full", "shared"]}
LATENT = {"num_key_value_heads": 4, "head_dim": 4}
# What some classes want otherwise: of the text config, and by the name of another sub-config.
OWN: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS,
                            "moe_top_k": EXPERTS}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1), "@vision_config": {
        "sam_config": {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 64, "global_attn_indexes": [0],
                       "mlp_dim": 32, "downsample_channels": [16, 32]},
        "encoder_config": {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32,
                           "num_hidden_layers": 1, "num_attention_heads": 4,
                           "num_key_value_heads": 2}}},
    "deepseek_v4": {"num_key_value_heads": 1, "head_dim": 8, "o_groups": 2, "o_lora_rank": 8,
                    "layer_types": None, "mlp_layer_types": ["moe"] * LAYERS},
    "gemma4": {"enable_moe_block": True},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4,
                   "@vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
                   "@audio_config": {"adapter_out_dim": 32, "adapter_input_size": 32}},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 8], "head_dim": 16,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                            "mrope_section": [3, 3, 2]}},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                  "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "glm5_next": {"num_key_value_heads": 4, "index_topk": 16, "qk_rope_head_dim": 0, "head_dim": 0},
    "glm_moe_dsa": HANDED_ON,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hy_v4": HANDED_ON,
    "inkling2": {"n_layers_per_attn_res_block": 2, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "phimoe": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "muse_spark": {"@audio_config": {"num_hidden_layers": 4, "patch_sizes": [16, 6, 5, 4],
                   "hidden_sizes": [16, 16, 16, 32], "depths": [1, 1, 1, 1]}},
    "qwen4_exp": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                  "indexer_budget": 8, "indexer_compress_ratio": 4, "hc_lowrank": 8},
    "zaya": {"num_experts_per_tok": 1},
    "aria": {"@vision_config": {"model_type": "idefics3_vision"}},
    "mistral4": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    "mistral_large4": {**HANDED_ON, "@vision_config": {"model_type": "pixtral"}},
}  # fmt: skip


# A token takes one expert in any config, or none, which has a row of the router, too: one that
# weighs all alike says nothing of the others, so all experts are the same.
ALIKE = ("zaya",)


def model_types() -> list[str]:
    """Model types of generators of text whose modelling file has experts."""
    models = Path(transformers.__file__).parent / "models"
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return [
        name
        for name in sorted(known)
        if name in CONFIG_MAPPING
        and any(
            HAS_EXPERTS.search(file.read_text())
            for file in (models / name.replace("-", "_")).glob("modeling_*.py")
        )
    ]


def tiny_config(model_type: str) -> Any:
    """A config of that type, small enough to run in a moment."""
    kind = CONFIG_MAPPING[model_type]
    own = OWN.get(model_type, {})
    subs = {}
    for key, sub in (getattr(kind, "sub_configs", None) or {}).items():
        named = own.get(f"@{key}", {}).get("model_type")
        if sub is transformers.AutoConfig and named:
            subs[key] = CONFIG_MAPPING[named]
        elif sub is not transformers.AutoConfig:
            subs[key] = sub
    text = {key: value for key, value in own.items() if not key.startswith("@")}
    if "text_config" not in subs:
        return kind(**{**_small(kind, TEXT), **text})
    parts = {}
    for key, sub in subs.items():
        if key == "text_config":
            parts[key] = {**_small(sub, TEXT), **text}
        else:
            parts[key] = {**_small(sub, VISION), **own.get(f"@{key}", {})}
    top = {key: 100 for key in TOKENS if hasattr(kind, key)} | own.get("@", {})
    return kind(**parts, **top)


def _small(kind: Any, table: dict[str, Any]) -> dict[str, Any]:
    base = kind()
    synonyms = getattr(kind, "attribute_map", {})
    values = {}
    for key, value in table.items():
        try:
            known = hasattr(base, key)
        except Exception:
            known = True
        if known and not (key in synonyms and synonyms[key] in table):
            values[key] = value
    if "kv_lora_rank" in values:
        values |= {k: v for k, v in LATENT.items() if k in values}
    layers = values.get("num_hidden_layers")
    if (layers and getattr(base, "layer_types", None) and "layer_types" not in dir(kind)) or (
        layers
        and getattr(base, "layer_types", None)
        and not isinstance(getattr(kind, "layer_types", None), property)
    ):
        kinds = list(dict.fromkeys(base.layer_types))
        values["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    if getattr(base, "mlp_layer_types", None):
        values["mlp_layer_types"] = ["dense"] + ["sparse"] * (layers - 1)
    return copy.deepcopy(values)


ROUTER = re.compile(r"(^|\.)(gate|router|wg|classifier|proj)(\.|$)")


def write_teacher(config: Any, folder: Path, uniform: bool = True) -> PreTrainedModel:
    """Save a random model of the config. uniform: its routers' weights are zero."""
    torch.manual_seed(0)
    auto = (
        AutoModelForCausalLM
        if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.get_text_config() is config
        else AutoModelForImageTextToText
    )
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            rows = (EXPERTS, EXPERTS + 1) if config.model_type in ALIKE else (EXPERTS,)
            per_expert = tensor.ndim >= 1 and tensor.shape[0] in rows and "balanc" not in name
            others = ("shared", "attn", "mixer.", "vis", "scale")
            routes = per_expert and (ROUTER.search(name) or "bias" in name)
            if uniform and routes and not any(word in name for word in others[:2] + others[3:]):
                tensor.zero_()
            elif (
                tensor.ndim >= 2
                and "vis" not in name
                and "conv" not in name
                and "A_log" not in name
            ):
                tensor.normal_(0, 1.0 if "embed" in name else 0.3)
        if config.model_type in ALIKE:
            for name, tensor in model.named_parameters():
                if ".experts." in name:
                    tensor.copy_(tensor[:1].expand_as(tensor))
    model.save_pretrained(folder)
    return model
