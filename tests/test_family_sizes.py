"""Exact sizes: of the published students, and of what a merge would write for real shapes."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from m2d.choose.plan import Group, LayerPlan, Plan
from m2d.cli import main
from m2d.inspect import inspect
from m2d.models.checkpoint import Checkpoint
from m2d.models.entries import CODES
from m2d.models.skeleton import experts_modules, layers_of
from m2d.models.student import build_student_skeleton, stored_shapes
from m2d.models.teacher import open_teacher
from m2d.students.merge import plan_width
from m2d.students.tensors import StudentTensors

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "attention_bias": False, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
                     "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
    "vocab_size": 102400,
}  # fmt: skip
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880,
    "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                     "original_max_position_embeddings": 4096, "rope_type": "yarn",
                     "truncate": False},
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
EMO_1B_14B: dict[str, Any] = {
    "architectures": ["EmoForCausalLM"], "model_type": "emo", "attention_bias": False,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
    "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 128, "num_shared_experts": 1,
    "num_experts_per_tok": 8, "num_hidden_layers": 16, "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip
# By hand: 2 * vocabulary * 2048 + 2048 + 16 * (4 * 2048**2 + 3 * 8192 * 2048 + 2 * 2048).
EMO_STUDENT = 1_484_851_200
# As its config.json has it, the vision tower's sizes aside.
QWEN3_5_35B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_moe_text", "vocab_size": 248320, "hidden_size": 2048,
        "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "mtp_num_hidden_layers": 1,
        "tie_word_embeddings": False,
    },
    "vision_config": {"model_type": "qwen3_5_moe", "depth": 27, "hidden_size": 1152,
                      "out_hidden_size": 2048},
}  # fmt: skip
# By hand, H 2048, 8 x 512 + 512 = 4608 wide. In linear attention: q, k, v and z; b and a; the
# convolution; A and dt; a norm; the output. In full attention q is twice as wide, for its gate.
LINEAR = 2048 * (8192 + 4096) + 2 * 2048 * 32 + 4 * 8192 + 2 * 32 + 128 + 4096 * 2048
FULL = 2048 * 8192 + 2 * 2048 * 512 + 4096 * 2048 + 2 * 256
QWEN3_5_STUDENT = (
    2 * 248320 * 2048 + 30 * LINEAR + 10 * FULL + 40 * (3 * 4608 * 2048 + 2 * 2048) + 2048
)
PUBLISHED = {
    "qwen3": (QWEN3_30B_A3B, 3_340_449_792, 6144),
    "deepseek": (DEEPSEEK_V2_LITE, 2_659_708_416, 11264),
    "gpt_oss": (GPT_OSS_20B, 4_185_089_880, 11520),
    "emo": (EMO_1B_14B, EMO_STUDENT, 8192),
}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_inspect_gives_the_published_students_sizes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, parameters, width = PUBLISHED[name]
    assert main(["inspect", str(write_config(tmp_path, config)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["student_parameters"] == parameters
    assert {row["parameters"] for row in facts["students"]} == {parameters}
    assert {row["intermediate_size"] for row in facts["students"]} == {width}


def test_inspect_gives_the_text_student_of_qwen3_5(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_config(tmp_path, QWEN3_5_35B_A3B))
    assert QWEN3_5_STUDENT == 3_433_935_488
    assert main(["inspect", folder, "--text-only", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["student_architecture"] == "Qwen3_5ForCausalLM"
    assert {row["parameters"] for row in facts["students"]} == {3_433_935_488}
    assert {row["intermediate_size"] for row in facts["students"]} == {4608}
    assert main(["inspect", folder]) == 0
    printed = capsys.readouterr().out
    assert "--text-only   Qwen3_5ForCausalLM, 3,433,935,488 parameters" in printed


def write_holes(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of the config's shapes in the hub's layout, all zeros: a sparse file."""
    teacher = open_teacher(write_config(folder, config))
    paths = experts_modules(teacher.skeleton)
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in stored_shapes(teacher.skeleton).items():
        stem, _, part = name.rpartition(".")
        experts = any(stem.endswith(f"layers.{i}.{path}") for i, path in paths.items())
        if experts and part in ("gate_up_proj", "down_proj"):
            specs |= on_disk(name, shape, teacher.family.transposed)
        elif config["model_type"] == "emo":
            hub = name.replace(".input_layernorm.", ".pre_attention_layernorm.")
            hub = hub.replace(".post_attention_layernorm.", ".pre_feedforward_layernorm.")
            specs[hub] = (torch.bfloat16, shape)
        else:
            specs[name] = (torch.bfloat16, shape)
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def on_disk(
    name: str, shape: tuple[int, ...], mxfp4: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What the hub has for a fused parameter: MXFP4, or one tensor per expert."""
    count, rows, columns = shape
    if mxfp4:
        blocks = (count, columns, rows // 32)
        return {
            f"{name}_blocks": (torch.uint8, (*blocks, 16)),
            f"{name}_scales": (torch.uint8, blocks),
        }
    stem, _, part = name.rpartition(".")
    halves = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    own = (torch.bfloat16, (rows // len(halves), columns))
    return {f"{stem}.{e}.{half}.weight": own for e in range(count) for half in halves}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_real_layers_tensors_add_up_to_what_inspect_promises(name: str, tmp_path: Path) -> None:
    config, _, width = PUBLISHED[name]
    small = {**config, "num_hidden_layers": 2, "vocab_size": 96, "torch_dtype": "bfloat16"}
    teacher = open_teacher(write_holes(tmp_path, small))
    groups = tuple(Group((e,), (1.0,), 0.25) for e in range(teacher.top_k))
    plan = Plan("x", "x", "x", None, tuple(LayerPlan(i, groups) for i in teacher.moe_layers))
    promised = inspect(teacher)["student_parameters"]
    _, skeleton = build_student_skeleton(teacher, plan_width(teacher, plan))
    tensors = StudentTensors(teacher.family, Checkpoint(tmp_path), skeleton, hub_names=True)
    specs = tensors.specs(plan)
    assert sum(math.prod(shape) for _, shape in specs.values()) == promised
    assert {dtype for dtype, _ in specs.values()} == {torch.bfloat16}
    layer = teacher.moe_layers[-1]
    assert len(layers_of(teacher.skeleton)) == 2
    for made in tensors.feed_forward_names(layer):
        tensor = tensors.make(made, plan)
        assert (tensor.dtype, tuple(tensor.shape)) == specs[made]
        assert tensor.dim() < 3 or width in tensor.shape or 2 * width in tensor.shape
