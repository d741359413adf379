"""Quantised checkpoints as the hub keeps them: MXFP4 experts, block-wise FP8."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from family_quantized import edit_config, slow_fp8, slow_mxfp4, to_fp8, to_mxfp4
from family_teachers import EXPERTS, make, make_uniform
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import m2d
from m2d.choose.plan import plan_from_dict
from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint
from m2d.models.entries import Derived
from m2d.models.quantized import dequantize_mxfp4, dequantize_scaled
from m2d.models.schemes import read_scheme
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.students.merge import write_student

CPU = torch.device("cpu")
KEPT = ("gate.weight", "embed_tokens", "lm_head", "norm")  # as the hub leaves them


def load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32
    )
    return model.float().eval()


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_mxfp4_number_by_number() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (3, 5, 2), dtype=torch.uint8, generator=generator)
    found = dequantize_mxfp4(blocks, scales, torch.bfloat16)
    assert found.shape == (3, 5, 64)
    assert torch.equal(found.float(), slow_mxfp4(blocks, scales))  # exact in bfloat16


@pytest.mark.parametrize(("rows", "columns"), [(32, 48), (30, 17), (5, 100)])
def test_fp8_number_by_number(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 16), -(-columns // 8), generator=generator)
    found = dequantize_scaled(weight, scale, dtype=torch.float32, block=(16, 8))
    for i in range(rows):
        for j in range(columns):
            assert found[i, j] == weight[i, j].float() * scale[i // 16, j // 8]


@torch.no_grad()
def test_mxfp4_experts_are_those_that_transformers_unpacks(tmp_path: Path) -> None:
    folder = to_mxfp4(make("gpt_oss", tmp_path / "teacher"))
    open_teacher(folder)  # the layout is read off the class
    checkpoint, stock = Checkpoint(folder), load(folder)
    for layer in range(2):
        experts = stock.model.layers[layer].mlp.experts
        for e in range(EXPERTS):
            at = f"model.layers.{layer}.mlp.experts.{e}."
            expected = {
                "gate_proj.weight": experts.gate_up_proj[e, :, 0::2].T,
                "up_proj.weight": experts.gate_up_proj[e, :, 1::2].T,
                "down_proj.weight": experts.down_proj[e].T,
                "gate_proj.bias": experts.gate_up_proj_bias[e, 0::2],
                "up_proj.bias": experts.gate_up_proj_bias[e, 1::2],
                "down_proj.bias": experts.down_proj_bias[e],
            }
            for name, tensor in expected.items():
                found = checkpoint.read(at + name)
                assert found.dtype == torch.bfloat16
                assert torch.equal(found.float(), tensor), at + name


@torch.no_grad()
def test_an_mxfp4_teacher_converts_exactly(tmp_path: Path, tiny_text: Path) -> None:
    folder = to_mxfp4(make_uniform("gpt_oss", tmp_path / "teacher"))
    kept = m2d.convert(folder, tmp_path / "bf16", text=[tiny_text], sequences=2, length=12)
    plan = plan_from_dict(json.loads((kept / "plan.json").read_text()), num_experts=EXPERTS)
    out = write_student(open_teacher(folder), plan, tmp_path / "s", torch.float32)
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = load(folder)(ids).logits
    assert (load(out)(ids).logits - expected).abs().max() < 5e-6 * expected.abs().max()
    names = load_file(out / "model.safetensors")
    assert not [name for name in names if name.endswith(("_blocks", "_scales"))]
    assert {t.dtype for t in load_file(kept / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_an_fp8_teacher_converts_as_its_dequantised_twin(
    name: str, tmp_path: Path, tiny_text: Path
) -> None:
    block = (24, 16)  # divides few of the shapes
    folder = to_fp8(make(name, tmp_path / "teacher"), block, KEPT)
    plain = make(name, tmp_path / "plain")
    save_tensors(plain, slow_fp8(folder, block))
    settings: Any = {"text": [tiny_text], "sequences": 2, "length": 12, "keep": 5}
    one = load_file(m2d.convert(folder, tmp_path / "one", **settings) / "model.safetensors")
    other = load_file(m2d.convert(plain, tmp_path / "two", **settings) / "model.safetensors")
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


@torch.no_grad()
def test_fused_fp8_experts(tmp_path: Path) -> None:
    block = (16, 16)
    folder = to_fp8(make("qwen3_moe", tmp_path / "teacher"), block, KEPT)
    open_teacher(folder)  # its family is known from then on
    apart = Checkpoint(folder)
    parts = [f"model.layers.0.mlp.experts.{e}" for e in range(EXPERTS)]
    expected = {
        f"{at}.{half}_proj.weight": apart.read(f"{at}.{half}_proj.weight")
        for at in parts
        for half in ("gate", "up", "down")
    }
    tensors = load_file(folder / "model.safetensors")
    for suffix, end in (("", ""), ("_scale_inv", "_scale_inv")):
        gate, up, down = (
            torch.stack([tensors.pop(f"{at}.{half}_proj.weight{suffix}") for at in parts])
            for half in ("gate", "up", "down")
        )
        fused = "model.layers.0.mlp.experts"
        tensors[f"{fused}.gate_up_proj{end}"] = torch.cat([gate, up], 1)
        tensors[f"{fused}.down_proj{end}"] = down
    together = Checkpoint(save_tensors(folder, tensors))
    assert together.fused
    for name, tensor in expected.items():
        assert torch.equal(together.read(name), tensor), name


def test_no_more_than_one_expert_is_dequantised_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    compute = dequantize_mxfp4

    def watched(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(2 * blocks.numel())
        return compute(blocks, scales, dtype)

    monkeypatch.setattr("m2d.models.layouts.dequantize_mxfp4", watched)
    folder = to_mxfp4(make("gpt_oss", tmp_path / "teacher"))
    open_teacher(folder)  # its family is known from then on
    entries = Checkpoint(folder).entries
    derived = [name for name, entry in entries.items() if isinstance(entry, Derived)]
    assert len([name for name in derived if name.endswith("_proj.weight")]) == 2 * EXPERTS * 3
    assert not sizes  # opening reads nothing
    stream = StreamedTeacher(open_teacher(folder), torch.float32, CPU)
    stream.run(torch.zeros(1, 4, dtype=torch.long), 1)
    assert len(sizes) == 2 * EXPERTS * 3
    assert max(sizes) == 32 * 64


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    folder = to_fp8(make("qwen3_moe", tmp_path / "fp8"), (16, 16), KEPT)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    with pytest.raises(UserError, match=r"scale_inv is .* but blocks of \[8, 8\]"):
        Checkpoint(folder)
    folder = to_mxfp4(make("gpt_oss", tmp_path / "mxfp4"))
    open_teacher(folder)  # its family is known from then on
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    with pytest.raises(UserError, match="down_proj_blocks has no fitting scales"):
        Checkpoint(save_tensors(folder, tensors))
    folder = to_mxfp4(make("gpt_oss", tmp_path / "e8m0"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name].view(torch.float8_e8m0fnu)
    with pytest.raises(UserError, match="scales are not both of bytes"):
        Checkpoint(save_tensors(folder, tensors))


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
# quantization_config, compression_config, ModelOpt's algorithm, and what is said; None: they agree.
TWICE: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, str | None, str | None]] = {
    "fp8 twice": (FP8, None, "FP8_PB_WO", None),
    "modelopt's twice": (MODELOPT, None, "FP8", None),
    "compressed-tensors' twice": (COMPRESSED, COMPRESSED, None, None),
    "fp8 and nvfp4": (FP8, None, "NVFP4", "are nvfp4, and .*config.json that they are fp8"),
    "nvfp4 and fp8": (
        {**COMPRESSED, "format": "nvfp4-pack-quantized"},
        None,
        "FP8",
        "hf_quant_config.json: says that the weights are fp8",
    ),
    "awq and fp8": ({"quant_method": "awq", "bits": 4}, None, "FP8", "that they are awq"),
    "two blocks": (
        COMPRESSED,
        {**COMPRESSED, "config_groups": {"a": {"weights": {"block_structure": [16, 16]}}}},
        None,
        "are fp8 of other sizes",
    ),
    "what is not read": (FP8, None, "W4A8_AWQ", "quantised with ModelOpt's W4A8_AWQ"),
}


@pytest.mark.parametrize("case", TWICE)
def test_two_descriptions_of_the_quantisation_must_agree(case: str, tmp_path: Path) -> None:
    first, second, algorithm, said = TWICE[case]
    config = {"quantization_config": first, "compression_config": second}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if algorithm:
        content = {"quantization": {"quant_algo": algorithm}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    if said is None:
        assert read_scheme(tmp_path, config).method == (first or {})["quant_method"]
        return
    with pytest.raises(UserError, match=said):
        read_scheme(tmp_path, config)
