"""Every quantised format, against what its numbers stand for, written out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_teacher
from family_formats import FORMATS, quantise
from family_quantized import edit_config
from safetensors.torch import load_file, save_file

import m2d
from m2d.cli import main
from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint
from m2d.models.load import load_model
from m2d.models.teacher import read_config


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_a_format_is_read_as_what_it_stands_for(name: str, tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    plain = quantise(folder, name)
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.entries) == set(plain)
    changed = 0
    for key, tensor in plain.items():
        found = checkpoint.read(key)
        assert found.shape == tensor.shape == torch.Size(checkpoint.entry(key).shape)
        # Products of a number and a scale, rounded to float32 in one order or another.
        assert torch.allclose(found, tensor, rtol=3e-7, atol=0), key
        changed += found.unique().numel() < tensor.numel() / 2
    assert changed or "8" in name  # few values: it is 4 bits indeed


@pytest.mark.parametrize("name", ["compressed w4a16 with zeros", "awq", "modelopt fp8"])
@torch.no_grad()
def test_every_way_to_a_student_sees_the_dequantised_teacher(
    name: str, tmp_path: Path, tiny_text: Path
) -> None:
    folder, plain = make_teacher(tmp_path / "t"), make_teacher(tmp_path / "plain")
    save_file(quantise(folder, name), plain / "model.safetensors", {"format": "pt"})
    settings: Any = {"text": [tiny_text], "sequences": 2, "length": 12, "keep": 5}
    one = load_file(m2d.convert(folder, tmp_path / "one", **settings) / "model.safetensors")
    other = load_file(m2d.convert(plain, tmp_path / "two", **settings) / "model.safetensors")
    assert set(one) == set(other)
    assert all(torch.allclose(one[key], other[key], rtol=1e-5, atol=1e-7) for key in one)
    ids = torch.arange(40)[None]
    models = [
        load_model(where, read_config(where)[1], torch.float32, torch.device("cpu"))
        for where in (folder, plain)
    ]
    logits = [model(ids).logits for model in models]
    assert torch.allclose(*logits, rtol=0, atol=1e-5 * float(logits[0].abs().max()))


def broken(folder: Path, what: str) -> str:
    """Spoil a quantised teacher; gives what the error must say."""
    file = folder / "model.safetensors"
    key = "model.layers.0.self_attn.q_proj."
    if what.startswith("awq"):
        quantise(folder, "awq")
        tensors = load_file(file)
        if what == "awq, no zeros":
            del tensors[key + "qzeros"]
            said = f"has no {key}qzeros"
        elif what == "awq, another group":
            tensors[key + "scales"] = tensors[key + "scales"][:1].clone()
            said = "do not fit together in groups of 16"
        else:
            edit_config(folder, quantization_config=None)
            said = "names neither awq nor gptq"
    elif what.startswith("packed"):
        quantise(folder, "compressed w4a16")
        tensors = load_file(file)
        if what == "packed, no scale":
            del tensors[key + "weight_scale"]
            said = f"has no {key}weight_scale"
        else:
            tensors[key + "weight_shape"] = torch.tensor([32, 64])
            said = r"but a weight of \[32, 64\]"
    else:
        quantise(folder, "fp8, one scale")
        tensors = load_file(file)
        scale = tensors.pop(key + "weight_scale")
        said = "without its scale it is no weight"
        if what == "fp8, scales of another weight":
            tensors[key + "weight_scale"] = scale.expand(7, 1).clone()
            said = r"weight_scale is \[7, 1\]"
        elif what == "fp8, an orphaned scale":
            tensors[key + "weight"] = tensors[key + "weight"].float()
            tensors[key + "weight_scale"] = scale
            said = "has no quantised weight beside it"
    save_file(tensors, file, {"format": "pt"})
    return said


SPOILED = (
    "awq, no zeros",
    "awq, another group",
    "awq, not declared",
    "packed, no scale",
    "packed, another shape",
    "fp8, no scale",
    "fp8, scales of another weight",
    "fp8, an orphaned scale",
)


@pytest.mark.parametrize("what", SPOILED)
def test_a_part_that_is_missing_or_does_not_fit_is_named(what: str, tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    said = broken(folder, what)
    with pytest.raises(UserError, match=said):
        Checkpoint(folder)


UNKNOWN: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "'bitsandbytes'": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
    "'auto-round'": ({"quant_method": "auto-round", "bits": 4}, None),
    "ModelOpt's W4A8_AWQ": (None, {"quantization": {"quant_algo": "W4A8_AWQ"}}),
    "compressed-tensors' marlin-24": (
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        None,
    ),
    "compressed-tensors' sparse-24-bitmask": (
        {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
        None,
    ),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3}, None),
    "awq of 4 bits in the layout 'gemv'": (
        {"quant_method": "awq", "bits": 4, "version": "GEMV"},
        None,
    ),
}


@pytest.mark.parametrize("said", UNKNOWN)
def test_a_format_that_is_not_read_is_refused_by_name_before_any_weight(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_teacher(tmp_path / "teacher")
    settings, modelopt = UNKNOWN[said]
    edit_config(folder, quantization_config=settings)
    if modelopt:
        (folder / "hf_quant_config.json").write_text(json.dumps(modelopt))
    (folder / "model.safetensors").unlink()
    assert main(["inspect", str(folder)]) == 2
    assert f"quantised with {said}" in capsys.readouterr().err
