"""Teachers with particularities of their own: Nemotron-H, Llama 4, Zaya."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, make_tokenizer
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Llama4Config,
    NemotronHConfig,
    ZayaConfig,
)

import m2d
from m2d.artifacts import parsed_json
from m2d.cli import main
from m2d.models.teacher import open_teacher
from m2d.statistics.routing import routing_sums

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 0,
    "bos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
    "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(3))


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tiny_text: Path) -> dict[str, Any]:
    return {"text": [tiny_text], "sequences": 4, "length": 12, "dtype": "float32"}


def distil(student: Path, teacher: Path, out: Path, *more: Any) -> None:
    """Two steps."""
    tokens = out.with_suffix(".safetensors")
    save_file({"input_ids": IDS}, tokens, {"sequences": "4", "length": "12"})
    command: list[Any] = ["distill", student, teacher, out, "--tokens", tokens, "--steps", 2]
    command += ["--batch", 2, "--device-batch", 2, *more]
    assert main([str(part) for part in command]) in (0, None)


def test_a_config_with_infinities_stays_json(settings: dict[str, Any], tmp_path: Path) -> None:
    """Nemotron-H's time_step_limit: in the student, and in what is made of the student."""
    config = NemotronHConfig(
        **COMMON, layers_block_type=["mamba", "moe", "attention", "moe"], num_hidden_layers=4,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=48,
        moe_shared_expert_intermediate_size=16, n_group=1, topk_group=1, mamba_num_heads=4,
        mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = save(AutoModelForCausalLM.from_config(config), tmp_path / "teacher")
    out = m2d.convert(teacher, tmp_path / "out", refit="layer", align=1, **settings)
    distil(out, teacher, tmp_path / "distilled")
    for folder in (out, tmp_path / "distilled"):
        found = parsed_json(folder / "config.json", constants=False)
        assert {"__float__": "Infinity"} in found["time_step_limit"]
        student = AutoModelForCausalLM.from_pretrained(folder)
        assert list(student.config.time_step_limit) == list(config.time_step_limit)


def test_llama_4_is_refitted_aligned_and_distilled(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its block flattens the tokens, and its composite class has no base model."""
    text = {
        **COMMON, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 1,
        "intermediate_size": 16, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "intermediate_size": 64, "patch_size": 8, "vision_output_dim": 16,
        "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    config = Llama4Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    teacher = save(AutoModelForImageTextToText.from_config(config), tmp_path / "teacher")
    out = m2d.convert(teacher, tmp_path / "out", refit="sequential", align=1, **settings)
    record = json.loads((out / "m2d.json").read_text())
    for layer in record["refit"]["layers"]:
        assert layer["after"] <= layer["before"]
    distil(out, teacher, tmp_path / "distilled")
    student = AutoModelForImageTextToText.from_pretrained(tmp_path / "distilled")
    assert type(student).__name__ == "Llama4ForConditionalGeneration"
    distil(out, teacher, tmp_path / "hidden", "--hidden-loss-weight", 1)


@torch.no_grad()
def test_a_router_with_a_row_for_no_expert(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zaya: a token takes one expert or none. All experts alike, the student is exact."""
    config = ZayaConfig(
        **COMMON, num_hidden_layers=2, num_experts=4, num_experts_per_tok=1,
        moe_intermediate_size=16, router_hidden_size=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.named_parameters():
        if ".experts." in name:
            tensor.copy_(tensor[:1].expand_as(tensor))
        if name.endswith("router_mlp.out_proj.weight"):
            tensor.zero_()
    folder = save(model, tmp_path / "teacher")
    assert open_teacher(folder).family.router == "mlp.gate.router_mlp.out_proj"
    out = m2d.convert(folder, tmp_path / "student", **settings)
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.config.num_experts == 1
    expected = model.eval()(input_ids=IDS).logits
    error = (student.eval()(input_ids=IDS).logits - expected).norm() / expected.norm()
    assert float(error) < 5e-6
    # Its router reads another space than the experts, so that its rows are none of their gates'.
    arguments = [
        "convert",
        str(folder),
        str(tmp_path / "other"),
        "--text",
        str(settings["text"][0]),
    ]
    assert main([*arguments, "--sequences", "4", "--length", "12", "--fold", "fixed"]) == 2
    assert "leave out fold" in capsys.readouterr().err
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": IDS}, tokens)
    assert main(["fold-report", str(folder), "--tokens", str(tokens)]) == 2
    assert "cannot be folded" in capsys.readouterr().err


def test_who_takes_no_expert_is_not_counted() -> None:
    """By hand: three tokens of two experts; the second one's weight of 0 stands for none."""
    probabilities = torch.tensor([[0.5, 0.3], [0.4, 0.1], [0.2, 0.6]])
    index = torch.tensor([[0], [0], [1]])
    weights = torch.tensor([[0.5], [0.0], [0.6]])
    sums = routing_sums(probabilities, index, weights, torch.tensor([[2.0], [7.0], [3.0]]))
    assert sums["n_selected"].tolist() == [1, 1]
    assert float(sums["n_tokens"]) == 3
    torch.testing.assert_close(sums["prob_sum_selected"], torch.tensor([0.5, 0.6]).double())
    assert sums["out_norm_sum_selected"].tolist() == [2, 3]
    assert sums["out_sq_norm_sum_selected"].tolist() == [4, 9]
    torch.testing.assert_close(sums["weight_sum"], torch.tensor([0.5, 0.6]).double())
