"""Every quantised format, against what its numbers stand for, written out by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_teacher
from family_formats import FORMATS, quantise
from family_quantized import edit_config
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def with_first(number: float) -> Callable[[Tensor], Tensor]:
    """A copy whose first number is this one."""

    def change(tensor: Tensor) -> Tensor:
        wide = tensor.float().flatten()
        wide[0] = number
        return wide.reshape(tensor.shape).to(tensor.dtype)

    return change


Q_PROJ = "model.layers.0.self_attn.q_proj."
# What is wrong -> format, the end of a tensor's name, the tensor in its place, what the error says.
NOT_FITTING: dict[str, tuple[str, str, Callable[[Tensor], Tensor], str]] = {
    "two scales": ("fp8, one scale", "weight_scale_inv", lambda _: torch.ones(()), "two scales"),
    "float8 scales": ("compressed fp8, channels", "weight_scale",
                      lambda t: t.to(torch.float8_e4m3fn), "weight_scale is float8_e4m3fn"),
    "zero points of another shape": ("compressed int8 with zeros", "weight_zero_point",
                                     lambda t: t[:3].clone(), r"weight_zero_point is \[3, 1\]"),
    "a shape of nothing": ("compressed w4a16", "weight_shape", lambda t: t * 0, "the two sizes"),
    "a shape in floats": ("compressed w4a16", "weight_shape", lambda t: t / 0, "the two sizes"),
    "packed in int64": ("compressed w4a16", "weight_packed", lambda t: t.long(), "int64; packed"),
    "zero points in int64": ("awq", "qzeros", lambda t: t.long(), "qzeros is int64; packed"),
    "whole scales": ("awq", "scales", lambda t: t.int(), "scales is int32; m2d reads"),
    "a number for a matrix": ("gptq", "qweight", lambda t: t[0, 0].clone(), r"qweight is \[\]"),
    "groups of other columns": ("gptq", "g_idx", lambda t: t[:7].clone(), r"g_idx is \[7\]"),
    "groups in floats": ("gptq", "g_idx", lambda t: t.float(), "g_idx is float32"),
    "columns of another weight": ("compressed w4a16, columns in any order", "weight_g_idx",
                                  lambda t: t[:7].clone(), r"weight_g_idx is \[7\]"),
}  # fmt: skip
# The same of numbers that no quantiser writes, which are seen when they are read.
IMPLAUSIBLE: dict[str, tuple[str, str, Callable[[Tensor], Tensor], str]] = {
    "a negative scale": ("fp8, one scale", "weight_scale", lambda t: -t, "1 of 1 scales"),
    "a scale of 0": ("fp8, one scale", "weight_scale", lambda t: t * 0, "a scale is 0"),
    "a NaN scale": ("compressed fp8, blocks", "weight_scale", with_first(math.nan), "1 of 4 sc"),
    "an infinite scale": ("compressed int8", "weight_scale", with_first(math.inf), "such as inf"),
    "a negative int8 scale": ("compressed int8", "weight_scale", lambda t: -t, "32 of 32 scales"),
    "an int8 scale of 0": ("compressed int8", "weight_scale", with_first(0), "a scale is 0"),
    "a zero point of 300": ("compressed int8 with zeros", "weight_zero_point",
                            lambda t: t.int() * 0 + 300, "zero point lies outside"),
    "a NaN zero point": ("compressed int8 with zeros", "weight_zero_point",
                         lambda t: t.float() * math.nan, "zero point lies outside"),
    "a packed NaN scale": ("compressed w4a16", "weight_scale", with_first(math.nan), "such as nan"),
    "a packed scale of 0": ("compressed w4a16", "weight_scale", with_first(0), "a scale is 0"),
    "an awq scale that is infinite": ("awq", "scales", with_first(math.inf), "such as inf"),
    "an awq scale of 0": ("awq", "scales", with_first(0), "a scale is 0"),
    "a gptq NaN scale": ("gptq", "scales", with_first(math.nan), "such as nan"),
    "a gptq zero point of 16": ("gptq", "qzeros", lambda t: t * 0 - 1, "a zero point is 16"),
    "a group that is not there": ("gptq", "g_idx", with_first(99), "outside 0 to 1"),
    "a negative group": ("gptq", "g_idx", with_first(-1), "outside 0 to 1"),
    "a packed group that is not there": ("compressed w4a16, columns in any order", "weight_g_idx",
                                         with_first(-1), "outside 0 to 1"),
    "nvfp4 over 0": ("compressed nvfp4", "weight_global_scale", lambda t: t * 0, "whole weight"),
    "nvfp4 times NaN": ("modelopt nvfp4", "weight_scale_2", lambda t: t * math.nan, "such as nan"),
    "a negative nvfp4 scale": ("modelopt nvfp4", "weight_scale", with_first(-1), "such as -1"),
}  # fmt: skip


def spoil(folder: Path, case: tuple[str, str, Callable[[Tensor], Tensor], str]) -> None:
    name, end, change, _ = case
    quantise(folder, name)
    tensors = load_file(folder / "model.safetensors")
    tensors[Q_PROJ + end] = change(tensors.get(Q_PROJ + end, torch.empty(0)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("what", NOT_FITTING)
def test_parts_of_another_kind_are_named(what: str, tmp_path: Path) -> None:
    spoil(make_teacher(tmp_path / "teacher"), NOT_FITTING[what])
    with pytest.raises(UserError, match=NOT_FITTING[what][-1]) as error:
        Checkpoint(tmp_path / "teacher")
    assert Q_PROJ in str(error.value)


@pytest.mark.parametrize("what", IMPLAUSIBLE)
def test_numbers_that_no_quantiser_writes_are_refused(what: str, tmp_path: Path) -> None:
    spoil(make_teacher(tmp_path / "teacher"), IMPLAUSIBLE[what])
    checkpoint = Checkpoint(tmp_path / "teacher")
    checkpoint.read("model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(UserError, match=IMPLAUSIBLE[what][-1]) as error:
        checkpoint.read(Q_PROJ + "weight")
    assert Q_PROJ in str(error.value)


def test_what_quantisers_do_write_is_read(tmp_path: Path) -> None:
    # Of a group of zeros the scale may be 0, of integers in groups negative, and a float8 scale
    # rounds to 0 where a block's numbers are the smallest.
    folder = make_teacher(tmp_path / "fp8")
    quantise(folder, "fp8, one scale")
    tensors = load_file(folder / "model.safetensors")
    for end in ("weight", "weight_scale"):
        tensors[Q_PROJ + end] = torch.zeros_like(tensors[Q_PROJ + end])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not Checkpoint(folder).read(Q_PROJ + "weight").any()
    for name, end in (("gptq", "scales"), ("compressed w4a16", "weight_scale")):
        folder = make_teacher(tmp_path / name)
        plain = quantise(folder, name)[Q_PROJ + "weight"]
        tensors = load_file(folder / "model.safetensors")
        tensors[Q_PROJ + end] *= -1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert torch.allclose(Checkpoint(folder).read(Q_PROJ + "weight"), -plain, rtol=3e-7)
    spoil(make_teacher(tmp_path / "t"), ("modelopt nvfp4", "weight_scale", with_first(0), ""))
    assert not Checkpoint(tmp_path / "t").read(Q_PROJ + "weight")[0, :16].any()


def test_zero_points_that_config_json_promises_must_be_there(tmp_path: Path) -> None:
    for name in ("compressed w4a16", "compressed int8"):
        folder = make_teacher(tmp_path / name)
        quantise(folder, name)
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        settings["config_groups"]["group_0"]["weights"]["symmetric"] = False
        edit_config(folder, quantization_config=settings)
        with pytest.raises(UserError, match=r"has no .*weight_zero_point beside it"):
            Checkpoint(folder)


def test_an_order_of_columns_that_config_json_promises_must_be_there(tmp_path: Path) -> None:
    for name, end in (
        ("gptq", "g_idx"),
        ("compressed w4a16, columns in any order", "weight_g_idx"),
    ):
        folder = make_teacher(tmp_path / name)
        quantise(folder, name)
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        if "config_groups" in settings:
            settings["config_groups"]["group_0"]["weights"]["actorder"] = "group"
            edit_config(folder, quantization_config=settings)
        Checkpoint(folder)
        tensors = load_file(folder / "model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=rf"has no .*{end} beside it"):
            Checkpoint(folder)


def test_scales_of_other_blocks_than_declared_are_refused(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    for name in ("fp8, one scale", "scales that nobody declares"):
        make_teacher(folder)
        quantise(folder, name)
        edit_config(
            folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}
        )
        with pytest.raises(UserError, match=r"blocks of \[16, 16\] of .* imply"):
            Checkpoint(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": "none"},
        {"quant_method": "compressed-tensors", "format": "dense", "config_groups": [1]},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"type": "int", "num_bits": [4], "group_size": {}}}},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"a": {"weights": {"block_structure": 16}}},
        },
        {"quant_method": "awq", "bits": [4]},
        {"quant_method": {}, "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": 0},
    ],
)
def test_a_config_that_makes_no_sense_is_one_line(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_teacher(tmp_path / "teacher")
    edit_config(folder, quantization_config=settings)
    assert main(["inspect", str(folder)]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("m2d ")]
    assert "config.json" in line


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
    "compressed-tensors' transforms": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": []}}},
        },
        None,
    ),
    "gptq after a rotation (hadamard)": (
        {"quant_method": "gptq", "bits": 4, "rotation": "hadamard"},
        None,
    ),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3}, None),
    "awq of 4 bits in the layout 'gemv'": (
        {"quant_method": "awq", "bits": 4, "version": "GEMV"},
        None,
    ),
    "awq of 4 bits in the layout 'llm-awq'": (
        {"quant_method": "awq", "bits": 4, "version": "gemm", "backend": "llm-awq"},
        None,
    ),
    "gptq of 4 bits in the layout 'marlin'": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "is_marlin_format": True},
        None,
    ),
    "gptq of 8 bits in the layout 'bitblas'": (
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq", "format": "bitblas"},
        None,
    ),
    "gptq of 4 bits in the layout 'gptq and gptq_v2'": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "format": "gptq_v2"},
        None,
    ),
    "compressed-tensors' marlin-24, in a group": (
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {"a": {"format": "marlin-24", "weights": {"type": "int"}}},
        },
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
    assert f"quantised with {said.removesuffix(', in a group')}" in capsys.readouterr().err
