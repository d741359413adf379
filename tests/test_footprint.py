"""What a model takes to serve, by hand for the models whose numbers are known."""

import json
from pathlib import Path
from types import SimpleNamespace

import family_teachers
import pytest

from m2d.cli import main
from m2d.footprint import footprint, kv_cache_bytes, values_per_token
from m2d.inspect import inspect
from m2d.models.student import build_student_skeleton, stored_shapes
from m2d.models.teacher import open_teacher, read_config

SIZES = Path(__file__).parents[1] / "workflow" / "resources" / "sizes"


def plain(layers: int, keys: int, **config: object) -> int:
    """Bytes of a cache of 1,000 tokens whose layers' keys and values are each so wide."""
    shapes = {
        f"model.layers.{layer}.self_attn.{part}_proj.weight": (keys, 64)
        for layer in range(layers)
        for part in ("k", "v")
    }
    return kv_cache_bytes(shapes, SimpleNamespace(**config))


def test_keys_and_values_by_hand() -> None:
    # Qwen3-30B-A3B: 48 layers of 4 heads of 128: 98.3 MB per 1,000 tokens in 16 bits.
    assert plain(48, 4 * 128) == 48 * 2 * 512 * 2 * 1000 == 98_304_000
    # A window of 128 in every other layer; linear attention and Mamba keep nothing per token.
    alternating = ["sliding_attention", "full_attention"]
    assert plain(2, 10, layer_types=alternating, sliding_window=128) == 20 * 2 * (1000 + 128)
    assert plain(2, 10, layer_types=["linear_attention", "full_attention"]) == 20 * 2 * 1000
    assert plain(3, 10, sliding_window=64) == 3 * 20 * 2 * 64
    assert plain(3, 10, sliding_window=64, use_sliding_window=False) == 3 * 20 * 2 * 1000
    assert plain(3, 10, sliding_window=None) == 3 * 20 * 2 * 1000


def test_values_are_read_off_names() -> None:
    shapes = {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (512 + 64, 2048),  # DeepSeek-V2-Lite
        "model.layers.1.self_attn.qkv_proj.weight": (64 + 16 + 16, 64),
        "model.layers.1.self_attn.o_proj.weight": (64, 64),
        "model.visual.layers.1.attn.k_proj.weight": (999, 64),
        "model.layers.2.mlp.up_proj.weight": (999, 64),
    }
    assert values_per_token(shapes) == {0: 576, 1: 32}


def test_bytes_of_weights() -> None:
    found = footprint({"a": (320, 100), "b": (32,)}, SimpleNamespace(), 32)
    assert found["parameters"] == 32032
    assert found["active_parameters"] == 32
    # 16 bits; 34 bytes and 18 bytes for every 32 weights.
    assert found["weight_bytes"] == {"bf16": 64064, "8-bit": 1001 * 34, "4-bit": 1001 * 18}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2", "gpt_oss", "olmoe"])
def test_a_student_is_cached_as_its_teacher(name: str, tmp_path: Path) -> None:
    teacher = open_teacher(family_teachers.make(name, tmp_path / "t"))
    facts = inspect(teacher)
    _, skeleton = build_student_skeleton(teacher, teacher.top_k * teacher.expert_width)
    mine, theirs = facts["student_footprint"], facts["footprint"]
    assert mine["kv_cache_bytes"] == theirs["kv_cache_bytes"] > 0
    assert mine["parameters"] == sum(
        __import__("math").prod(shape) for shape in stored_shapes(skeleton).values()
    )
    assert theirs["active_parameters"] == facts["active_parameters"]


def test_inspect_tells_it_of_teachers_and_students(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny_teacher)]) == 0
    told = capsys.readouterr().out
    assert "to serve the teacher" in told
    assert "to serve the student" in told
    assert told.count("per 1,000 tokens") == 2
    config = json.loads((tiny_teacher / "config.json").read_text())
    dense = tmp_path / "dense"
    dense.mkdir()
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (dense / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(dense), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["footprint"]
    assert found["kv_cache_bytes"] == 2 * 2 * 2 * 8 * 2 * 1000
    assert read_config(dense)[1].num_hidden_layers == 2
