"""Tiny teachers of every family, written to disk in the layout that the hub uses.

Weights are larger than an initialisation's, so that experts and routing differ clearly between
tokens, and float32, so that exactness shows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from m2d.models.teacher import read_config
from tests.conftest import VOCABULARY, make_tokenizer

EXPERTS, TOP_K, WIDTH, HIDDEN = 8, 3, 32, 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# Family -> (class stem in transformers, config, config key of the top-k).
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "head_dim": 16,
         "norm_topk_prob": True, "mlp_only_layers": []},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**LATENT_ATTENTION, "n_routed_experts": EXPERTS, "n_shared_experts": 2,
         "moe_intermediate_size": WIDTH, "intermediate_size": 100, "first_k_dense_replace": 1,
         "norm_topk_prob": False, "routed_scaling_factor": 1.5, "num_hidden_layers": 3},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**LATENT_ATTENTION, "q_lora_rank": 24, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
         "moe_intermediate_size": WIDTH, "intermediate_size": 400, "first_k_dense_replace": 1,
         "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_hidden_layers": 3},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": WIDTH,
         "intermediate_size": 48, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
         "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    ),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "head_dim": 16,
         "sliding_window": 6, "swiglu_limit": 1.5},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}),
    "granitemoe": (
        "GraniteMoe",
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "attention_multiplier": 0.2,
         "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0,
         "tie_word_embeddings": True},
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": EXPERTS, "intermediate_size": WIDTH, "clip_qkv": 1.0,
         "norm_topk_prob": False},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "intermediate_size": 100,
         "shared_expert_intermediate_size": 40, "norm_topk_prob": False, "mlp_only_layers": [1],
         "num_hidden_layers": 3},
    ),
}  # fmt: skip


def randomise(model: torch.nn.Module) -> None:
    """Make everything matter: norms, biases, sinks, correction biases."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.dim() <= 1 or name.endswith("bias")):
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.add_(noise.to(tensor.dtype))
        elif name.endswith(("gate.weight", "router.weight")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def save_stock(folder: Path, stem: str, config: dict[str, Any]) -> Path:
    """Save a model of transformers' class `{stem}ForCausalLM` and a tokenizer."""
    torch.manual_seed(0)
    settings = {**COMMON, "num_experts_per_tok": TOP_K, **config}
    model = getattr(transformers, f"{stem}ForCausalLM")(
        getattr(transformers, f"{stem}Config")(**settings)
    )
    randomise(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


EMO_CONFIG: dict[str, Any] = {
    "architectures": ["EmoForCausalLM"],
    "model_type": "emo",
    "auto_map": {"AutoConfig": "config.EmoConfig", "AutoModelForCausalLM": "model.Emo"},
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "max_position_embeddings": 128,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K + 1,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def save_emo(folder: Path, **changes: Any) -> Path:
    """Write an EMO checkpoint by hand, under the hub's tensor names."""
    config = {**EMO_CONFIG, **changes}
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm() -> torch.Tensor:
        return 1 + normal(HIDDEN)

    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
        "model.norm.weight": norm(),
        "lm_head.weight": normal(VOCABULARY, HIDDEN),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}pre_attention_layernorm.weight"] = norm()
        tensors[f"{prefix}pre_feedforward_layernorm.weight"] = norm()
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(HIDDEN, HIDDEN)
        tensors[f"{prefix}mlp.gate.weight"] = normal(EXPERTS, HIDDEN, scale=0.3)
        for expert in range(EXPERTS):
            where = f"{prefix}mlp.experts.{expert}."
            tensors[f"{where}gate_proj.weight"] = normal(WIDTH, HIDDEN)
            tensors[f"{where}up_proj.weight"] = normal(WIDTH, HIDDEN)
            tensors[f"{where}down_proj.weight"] = normal(HIDDEN, WIDTH)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    return folder


# What `make` builds, by a name for the tests.
MAKERS: dict[str, Callable[..., Path]] = {
    **{
        name: lambda folder, stem=stem, config=config, **changes: save_stock(
            folder, stem, {**config, **changes}
        )
        for name, (stem, config) in STOCK.items()
    },
    "emo": lambda folder, **changes: save_emo(folder, num_shared_experts=1, **changes),
    "emo_always_active": lambda folder, **changes: save_emo(
        folder, always_active_experts=[2, 5], **changes
    ),
}


def make(name: str, folder: Path, **changes: Any) -> Path:
    """A teacher's folder."""
    return MAKERS[name](folder, **changes)


def make_uniform(
    name: str,
    folder: Path,
    zero: tuple[str, ...] = (".gate.weight", ".router.", "shared_expert_gate"),
    **changes: Any,
) -> Path:
    """A teacher that weighs all its experts alike: a router of zeros, top-k = E."""
    if name.startswith("deepseek_v3"):
        changes["topk_group"] = STOCK[name][1]["n_group"]
    make(name, folder, num_experts_per_tok=EXPERTS, **changes)
    tensors = load_file(folder / "model.safetensors")
    for key in tensors:
        if any(part in key for part in zero):
            tensors[key].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> Any:
    """The stock model of a folder."""
    read_config(folder)  # makes the Auto classes know EMO
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> folder of a teacher with random routing, made once; not to be written to."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("teachers") / name)
        return made[name]

    return get
