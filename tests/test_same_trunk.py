"""A student is its teacher outside the FFNs, as stock transformers reads both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from family_quantized import edit_config
from family_teachers import MAKERS, make, make_uniform
from transformers import AutoModelForCausalLM

import m2d
from m2d.errors import UserError
from m2d.models.student import build_student_skeleton
from m2d.models.teacher import open_teacher
from m2d.students.same_trunk import check_trunk

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def student_config(folder: Path) -> tuple[Any, dict[str, Any]]:
    teacher = open_teacher(folder)
    return teacher, build_student_skeleton(teacher, teacher.top_k * teacher.expert_width)[0]


@pytest.mark.parametrize("name", MAKERS)
def test_every_family_s_student_passes(name: str, tmp_path: Path) -> None:
    check_trunk(*student_config(make(name, tmp_path / "teacher")))


@pytest.mark.parametrize("layers", [None, 0, 1, 2, 5])
@torch.no_grad()
def test_sliding_windows_of_a_class_that_has_them_in_every_layer(
    layers: int | None, tmp_path: Path, tiny_text: Path
) -> None:
    """Qwen3-MoE knows no max_window_layers, from which the student's class derives its layers."""
    folder = make_uniform("qwen3_moe", tmp_path / "teacher")
    edit_config(folder, use_sliding_window=True, sliding_window=4, max_window_layers=layers)
    out = m2d.convert(folder, tmp_path / "s", text=[tiny_text], sequences=2, length=12)
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    one, other = (
        AutoModelForCausalLM.from_pretrained(where)(ids).logits for where in (folder, out)
    )
    assert (one - other).abs().max() < 5e-6 * one.abs().max()


@pytest.mark.parametrize(
    ("name", "teacher", "student", "said"),
    [
        ("qwen3_moe", {}, {"tie_word_embeddings": True}, "output head"),
        ("qwen3_moe", {}, {"rms_norm_eps": 0.5}, "attention of layer 0"),
        ("qwen3_moe", {}, {"rope_theta": 1e6, "rope_parameters": None}, "attention of layer 0"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 4096},
            {"layer_types": ["sliding_attention", "full_attention"]},
            "attention of layer 1",
        ),
        (
            "mixtral",
            {"sliding_window": 4096},
            {"sliding_window": 2048},
            "attention of layer 0",
        ),
        ("granitemoe", {}, {"embedding_multiplier": 1.0}, "embeddings"),
        ("granitemoe", {}, {"logits_scaling": 4.0}, "output head"),
        ("deepseek_v3", {"rope_scaling": YARN}, {"rope_scaling": None}, "attention of layer 0"),
    ],
)
def test_a_config_that_makes_another_model_is_refused(
    name: str, teacher: dict, student: dict, said: str, tmp_path: Path
) -> None:
    folder = edit_config(make(name, tmp_path / "teacher"), **teacher)
    opened, raw = student_config(folder)
    check_trunk(opened, raw)
    changed = {key: value for key, value in {**raw, **student}.items() if value is not None}
    if "rope_theta" in student or "rope_scaling" in student:
        changed.pop("rope_parameters", None)
    with pytest.raises(UserError, match=f"the {said} of a"):
        check_trunk(opened, changed)


def test_a_config_that_the_student_s_class_cannot_run_is_one_line(
    tmp_path: Path, tiny_text: Path
) -> None:
    """Qwen3-MoE does not look at layer_types, and Qwen3 finds no window for them."""
    folder = make("qwen3_moe", tmp_path / "teacher")
    kinds = ["sliding_attention", "full_attention"]
    edit_config(folder, layer_types=kinds, use_sliding_window=False, sliding_window=8)
    with pytest.raises(UserError, match=r"cannot run .*sliding_window.* is not written"):
        m2d.convert(folder, tmp_path / "s", text=[tiny_text], sequences=2, length=12)


def test_nothing_is_written_then(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("qwen3_moe", tmp_path / "teacher")
    build = build_student_skeleton

    def other(*arguments: Any) -> Any:
        raw, skeleton = build(*arguments)
        return {**raw, "rms_norm_eps": 0.5}, skeleton

    monkeypatch.setattr("m2d.students.merge.build_student_skeleton", other)
    with pytest.raises(UserError, match="is not written"):
        m2d.convert(folder, tmp_path / "s", text=[tiny_text], sequences=2, length=12)
    seen = [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")]
    assert seen == ["teacher"]


def respell(folder: Path, scaling: dict | None, version: int) -> Path:
    """Write the rotary embeddings' keys as that version of transformers does."""
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    raw.pop("rope_parameters")
    if version == 5:
        own = scaling or {"rope_type": "default"}
        raw["rope_parameters"] = {**own, "rope_theta": 5e5}
    else:
        raw |= {"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": raw.pop("dtype")}
        if raw["model_type"] == "qwen3_moe":
            raw["num_experts"] = raw.pop("num_local_experts")
    file.write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2", "olmoe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("scaling", [None, YARN, {"rope_type": "linear", "factor": 2.0}])
@torch.no_grad()
def test_config_json_says_the_same_in_both_spellings(
    name: str, scaling: dict | None, tmp_path: Path, tiny_text: Path
) -> None:
    """As transformers 5 saved the teacher, and as version 4 did."""
    if (name, scaling) in (("gpt_oss", None), ("mixtral", YARN)):
        pytest.skip("transformers' class has YaRN for nothing, or cannot have it")
    found = []
    for version in (5, 4):
        folder = respell(make(name, tmp_path / f"{version}"), scaling, version)
        out = m2d.convert(
            folder, tmp_path / f"s-{version}", text=[tiny_text], sequences=2, length=12
        )
        config = json.loads((out / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
        assert config["dtype"] == config["torch_dtype"] == "float32"
        assert config["rope_parameters"]["rope_type"] == (scaling or {}).get("rope_type", "default")
        assert (config["rope_scaling"] or {}).get("factor") == (scaling or {}).get("factor")
        found.append(AutoModelForCausalLM.from_pretrained(out)(torch.arange(100)[None]).logits)
    assert torch.equal(*found)
