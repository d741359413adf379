"""What jobs need: by hand for a small model, and the shipped sizes against `m2d inspect`."""

import json
from pathlib import Path

import pytest
from test_family_sizes import DEEPSEEK_V2_LITE, EMO_1B_14B, GPT_OSS_20B, QWEN3_30B_A3B
from workflow_project import REPOSITORY

from m2d.errors import UserError
from m2d.inspect import inspect, inspect_dense
from m2d.models.teacher import open_teacher
from m2d.pipeline.jobs import need_of, resources_of, with_student
from m2d.pipeline.resources import (
    Hardware,
    distillation,
    distinct_students,
    evaluation,
    gram,
    grid,
    merge,
    perplexity_of_student,
    read_sizes,
    statistics,
    teacher_logits,
)
from m2d.pipeline.settings import load_config

SIZES = REPOSITORY / "m2d" / "pipeline" / "sizes"
QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 25600,
    "max_position_embeddings": 40960, "num_attention_heads": 64, "num_hidden_layers": 64,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
# A made-up teacher: 2 layers of 4 experts of 100 parameters each, of which 2 are selected.
SMALL = {
    "num_layers": 2,
    "num_moe_layers": 2,
    "num_experts": 4,
    "top_k": 2,
    "hidden_size": 5,
    "teacher_parameters": 1000,
    "active_parameters": 600,
    "expert_parameters": 100,
    "layer_parameters": 450,
    "trunk_parameters": 100,
    "student_parameters": 590,
    "students": [{"intermediate_size": 14}],
}


def write_config(folder: Path, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen3-30b-a3b", QWEN3_30B_A3B),
        ("deepseek-v2-lite", DEEPSEEK_V2_LITE),
        ("gpt-oss-20b", GPT_OSS_20B),
        ("emo-1b14b", EMO_1B_14B),
    ],
)
def test_shipped_sizes_are_what_inspect_prints(name: str, config: dict, tmp_path: Path) -> None:
    teacher = open_teacher(write_config(tmp_path, config), config_only=True)
    assert json.loads((SIZES / f"{name}.json").read_text()) == inspect(teacher)


def test_shipped_sizes_of_the_dense_model(tmp_path: Path) -> None:
    facts = inspect_dense(write_config(tmp_path, QWEN3_32B))
    assert json.loads((SIZES / "qwen3-32b.json").read_text()) == facts
    # By hand: 64 layers of attention (q, o 8192; k, v 1024), FFN, norms; embeddings, head, norm.
    attention = 5120 * (2 * 8192 + 2 * 1024) + 2 * 128
    layer = attention + 3 * 5120 * 25600 + 2 * 5120
    assert facts["layer_parameters"] == layer
    assert facts["teacher_parameters"] == 64 * layer + 2 * 151936 * 5120 + 5120


def test_active_parameters_by_hand() -> None:
    """Qwen3-30B-A3B: 120 of 128 experts of 3 x 768 x 2048 stand idle in each of 48 layers."""
    sizes = read_sizes(str(SIZES / "qwen3-30b-a3b.json"))
    expert = 3 * 768 * 2048
    assert sizes["expert_parameters"] == expert
    assert sizes["active_parameters"] == 30_532_122_624 - 48 * 120 * expert


def test_students_of_other_widths(tmp_path: Path) -> None:
    sizes = read_sizes(str(SIZES / "qwen3-30b-a3b.json"))
    teacher = open_teacher(write_config(tmp_path, QWEN3_30B_A3B), config_only=True)
    row = inspect(teacher, width=1000)["students"][-1]
    made = with_student(sizes, {"width": 1000})
    assert made["student_parameters"] == row["parameters"]
    assert made["students"][0]["intermediate_size"] == row["intermediate_size"] == 1000
    assert with_student(sizes, {"params": row["parameters"]}) == made
    assert with_student(sizes, {"keep": 8}) == sizes


def test_the_published_pruned_student() -> None:
    shape = {"layers": 48, "hidden_size": 2048, "heads": 32, "kv_heads": 8}
    student = {"baseline": "d2d", **shape, "intermediate_size": 6144}
    sizes = with_student(read_sizes(str(SIZES / "qwen3-32b.json")), student)
    assert sizes["student_parameters"] == 3_441_113_088
    recipe = {"steps": 3, "batch": 8, "device_batch": 2}
    need = distillation(sizes, 2, recipe, 10, Hardware())
    assert need.flops == (2 * 32_762_123_264 + 6 * 3_441_113_088) * 240


def test_passes_over_the_calibration_tokens() -> None:
    need = statistics(SMALL, 2, 10)
    assert need.flops == 2 * 600 * 10
    assert (need.tokens, need.gpus, need.read) == (10, 1, 2000)
    # Two layers, the rest of the model and ten hidden states, of two bytes each.
    assert need.gpu_memory - statistics(SMALL, 2, 0).gpu_memory == 10 * 5 * 2
    # All four experts on every token, and the upper half of 4 x 4 inner products of 5 numbers.
    assert gram(SMALL, 2, 10).flops == (2 * 1000 + 2 * 4 * 4 * 5) * 10


def test_a_grid_measures_each_student_once() -> None:
    # K = 2 is the top-k: one student per scaling; K = 4: one per grouping and scaling.
    assert distinct_students(2, [2, 4], 5, 2) == 2 + 10
    need = grid(SMALL, 2, 10, [2, 4], 5, 2)
    assert need.flops == 12 * 2 * 590 * 10
    assert need.tokens == 12 * 10
    # 2 layers x (2 x 2 + 10 x 4) experts x 100 parameters x 2 bytes, at 5 GB/s.
    assert need.other_seconds == pytest.approx(2 * 44 * 100 * 2 / 5e9)


def test_students() -> None:
    # Of 4 experts in each of 2 layers, K = 3 are read.
    assert merge(SMALL, 2, 3).read == (1000 - 2 * 100) * 2
    assert merge(SMALL, 2, 3).write == 590 * 2
    assert perplexity_of_student(590, 2, 10).flops == 2 * 590 * 10


def test_evaluation_takes_gpus_that_hold_the_model() -> None:
    hardware = Hardware(gpu_memory_gb=80)
    assert evaluation(30_000_000_000, 3, 2, 10, hardware).gpus == 1  # 60 GB beside 6 of its own
    assert evaluation(40_000_000_000, 3, 2, 10, hardware).gpus == 2


def test_distillation_by_hand() -> None:
    recipe = {"steps": 3, "batch": 8, "device_batch": 2, "learning_rate": 1e-4}
    need = distillation(SMALL, 2, recipe, 10, Hardware())
    assert need.tokens == 3 * 8 * 10
    assert need.flops == (2 * 600 + 6 * 590) * 240
    assert need.gpus == 1
    assert need.write == 590 * 2
    again = distillation(SMALL, 2, {**recipe, "gradient_checkpointing": True}, 10, Hardware())
    assert again.flops == (2 * 600 + 8 * 590) * 240
    # Two tokens' share of the stored activations: 2 layers of 24 H + 8 W against 2 H and one layer.
    layer = 24 * 5 + 8 * 14
    assert need.gpu_memory - again.gpu_memory == 2 * 10 * (2 * layer - (2 * 2 * 5 + layer))
    expanded = distillation(SMALL, 2, {**recipe, "teacher_top_k": 4}, 10, Hardware())
    assert expanded.flops - need.flops == 2 * (2 * 2 * 100) * 240


def test_stored_outputs_take_the_teacher_out_of_distillation() -> None:
    recipe = {"steps": 3, "batch": 8, "device_batch": 2, "learning_rate": 1e-4}
    stored = {**recipe, "teacher_logits": {"kind": "top", "size": 7, "parts": 2}}
    live, student = (distillation(SMALL, 2, r, 10, Hardware()) for r in (recipe, stored))
    assert live.flops - student.flops == 2 * 600 * 240
    assert live.gpu_memory - student.gpu_memory == 1000 * 2
    need = teacher_logits({**SMALL, "vocab_size": 2**16}, 2, stored, 120, Hardware())
    assert need.flops == 2 * 600 * 120
    assert need.write == 120 * 7 * (2 + 2)
    large = teacher_logits({**SMALL, "vocab_size": 2**16 + 1}, 2, stored, 120, Hardware())
    assert large.write == 120 * 7 * (2 + 4)


def test_distillation_takes_gpus_until_it_fits_and_is_done() -> None:
    recipe = {"steps": 3, "batch": 8, "device_batch": 2, "learning_rate": 1e-4}

    def gpus(hours: float, memory: float = 80, nodes: int = 1) -> int:
        hardware = Hardware(
            flops=1, utilization=1, hours=hours, gpu_memory_gb=memory, gpus_per_node=2,
            max_nodes=nodes,
        )  # fmt: skip
        return distillation(SMALL, 2, recipe, 10, hardware).gpus

    total = (2 * 600 + 6 * 590) * 240 / 3600  # hours of one GPU
    assert gpus(total * 1.01) == 1
    assert gpus(total / 2 * 1.01) == 2
    assert gpus(total / 4 * 1.01) == 2  # one node has no more
    assert gpus(total / 4 * 1.01, nodes=4) == 4
    assert gpus(total / 9, nodes=4) == 4  # four shares of two sequences: 8 GPUs have no use
    assert gpus(total * 1.01, memory=1) == 2  # fits nowhere: the most there are
    stated = distillation(SMALL, 2, {**recipe, "gpus": 4}, 10, Hardware())
    assert stated.gpus == 4


def test_memory_and_time_grow_with_attempts_and_can_be_stated() -> None:
    config = load_config(REPOSITORY / "config.yaml")
    names = {"teacher": "qwen3-30b-a3b"}
    first, second = (resources_of(config, "compute_gram", names, i) for i in (1, 2))
    assert first["gpu"] == second["gpu"] == 1
    for key in ("mem_mb", "runtime"):
        assert second[key] == 2 * first[key]
    config["teachers"]["qwen3-30b-a3b"]["resources"] = {"mem_mb": 123}
    stated = resources_of(config, "compute_gram", names, 1)
    assert stated == {**first, "mem_mb": 123}


def test_a_share_takes_its_part_of_the_time() -> None:
    config = load_config(REPOSITORY / "config.yaml")
    names = {"teacher": "qwen3-30b-a3b", "kind": "gram", "shares": "4"}
    whole, share = (need_of(config, rule, names) for rule in ("compute_gram", "compute_share"))
    assert whole is not None
    assert share is not None
    assert share.flops == pytest.approx(whole.flops / 4)


def test_a_file_that_is_no_sizes(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    with pytest.raises(UserError, match=r"sizes\.json: cannot be read"):
        read_sizes(str(file))
    file.write_text("{}")
    with pytest.raises(UserError, match="not from m2d inspect"):
        read_sizes(str(file))
