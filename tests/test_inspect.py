"""Sizes from the config alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING

import m2d
from m2d.cli import main
from m2d.models.derive import REFUSED
from m2d.models.skeleton import make_skeleton
from m2d.models.teacher import read_config

# Qwen/Qwen3-30B-A3B's config.json, what matters of it.
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def facts_of(folder: Path, capsys: pytest.CaptureFixture) -> dict:
    assert main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_published_student(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    facts = facts_of(tmp_path, capsys)
    assert facts["student_parameters"] == 3_340_449_792
    assert facts["teacher_parameters"] == 30_532_122_624
    assert facts["student_architecture"] == "Qwen3ForCausalLM"
    assert facts["family"] == "qwen3_moe"
    assert (facts["num_layers"], facts["num_moe_layers"]) == (48, 48)
    assert (facts["num_experts"], facts["top_k"]) == (128, 8)
    assert [row["keep"] for row in facts["students"]] == [8, 16, 32, 64, 128]
    assert all(row["intermediate_size"] == 6144 for row in facts["students"])
    assert facts["conversion"]["write_bytes"] == 2 * 3_340_449_792
    assert main(["inspect", str(tmp_path)]) == 0
    assert "3,340,449,792" in capsys.readouterr().out


def test_a_written_student_has_the_promised_parameters(
    tmp_path: Path, tiny_teacher: Path, tiny_text: Path, capsys
) -> None:
    promised = facts_of(tiny_teacher, capsys)["student_parameters"]
    out = m2d.convert(tiny_teacher, tmp_path / "s", text=[tiny_text], sequences=2, length=8)
    tensors = load_file(out / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == promised
    assert json.loads((out / "m2d.json").read_text())["student"]["parameters"] == promised


def test_a_text_config_where_the_class_has_none_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_30B_A3B, "text_config": {}}))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "not a valid config (qwen3_moe has no text_config)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        (
            "doge",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "is_moe": True, "num_experts": 16},
        ),
        ("jetmoe", {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}),
    ],
)  # fmt: skip
def test_inspect_refuses_in_the_same_line_as_convert(
    model_type: str, config: dict, tmp_path: Path, tiny_text: Path, capsys
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "student"
    CONFIG_MAPPING[model_type](**config).save_pretrained(teacher)
    assert main(["inspect", str(teacher)]) == 2
    inspected = capsys.readouterr().err.removeprefix("m2d inspect: ")
    assert main(["convert", str(teacher), str(out), "--text", str(tiny_text)]) == 2
    assert capsys.readouterr().err.removeprefix("m2d convert: ") == inspected
    assert f"{model_type!r} {REFUSED[model_type]}" in inspected
    assert inspected.count("\n") == 1
    assert not out.exists()


def test_no_weight_is_drawn_for_a_skeleton(tiny_teacher: Path) -> None:
    """That would take most of the time, for nothing; buffers are as the class makes them."""
    filled: list[str] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name.endswith("_") and args[0].is_meta:
                filled.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    config = read_config(tiny_teacher)[1]
    with Note():
        model = make_skeleton(config, tiny_teacher)
    assert not filled
    assert all(parameter.is_meta for parameter in model.parameters())
    half = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 10_000**-half)
