"""The dtype of the computation: chosen by the device, weights as on disk, results the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import m2d
from m2d import devices
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.models.widen import widen

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "dtype", "fast"),
    [
        ({"amx_bf16": True}, torch.bfloat16, True),
        ({"avx512_bf16": True}, torch.bfloat16, True),
        ({"bf16": True}, torch.bfloat16, True),  # ARM
        ({"avx512_bf16": True}, torch.float16, None),
        ({"avx2": True, "avx512_bf16": False}, torch.bfloat16, None),
    ],
)
def test_units_of_the_cpu_decide(monkeypatch, capabilities, dtype, fast) -> None:  # type: ignore[no-untyped-def]
    for name in devices.LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "cpu_capabilities", lambda: capabilities)
    assert devices.hardware_says(dtype, CPU) is fast


def test_a_measurement_decides_where_the_hardware_does_not_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {torch.bfloat16: 3.0, torch.float32: 1.0, torch.float16: 0.5}
    monkeypatch.setattr(devices, "hardware_says", lambda *_: None)
    monkeypatch.setattr(devices, "product_seconds", lambda dtype, device: seconds[dtype])
    devices.measured_fast.cache_clear()
    assert devices.compute_dtype("auto", torch.bfloat16, CPU) == torch.float32
    assert devices.compute_dtype("auto", torch.float16, CPU) == torch.float16
    assert devices.compute_dtype("bfloat16", torch.float32, CPU) == torch.bfloat16
    assert devices.compute_dtype(None, torch.float32, CPU) == torch.float32
    devices.measured_fast.cache_clear()


def test_limited_instructions_are_measured() -> None:
    """A CPU that may not use its bfloat16 units computes in float32, whatever it has."""
    code = (
        "import torch; from m2d import devices; cpu = torch.device('cpu');"
        "assert devices.hardware_says(torch.bfloat16, cpu) is None;"
        "print(devices.compute_dtype('auto', torch.bfloat16, cpu))"
    )
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **limits}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "torch.float32", done.stderr


def test_widened_modules_compute_in_float32_and_keep_their_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 5)).bfloat16()
    wide = [p.float() for p in model.parameters()]
    widen(widen(model, torch.float32), torch.float32)  # twice: a skeleton is streamed again
    ids = torch.arange(7)
    expected = functional.linear(
        functional.layer_norm(wide[0][ids], (8,), wide[1], wide[2]), wide[3], wide[4]
    )
    torch.testing.assert_close(model(ids), expected)
    assert model[0].weight.dtype == model[2].weight.dtype == torch.bfloat16


def test_experts_that_cannot_widen_themselves_are_widened_for_a_call() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 4, 4).bfloat16())

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            if hidden.isnan().any():
                raise ValueError("not a number")
            return hidden @ self.stack[1]

    experts, hidden = Experts(), torch.randn(2, 4)
    narrow = experts.stack.detach().clone()
    widen(experts, torch.float32)
    for _ in range(2):
        torch.testing.assert_close(experts(hidden), hidden @ narrow[1].float())
        assert experts.stack.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not a number"):
        experts(hidden * float("nan"))
    assert torch.equal(experts.stack, narrow)


@pytest.fixture(scope="module")
def bfloat16_teacher(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher as the hub has them, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("bfloat16") / "teacher"
    AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


def test_a_streamed_layer_keeps_its_dtype_and_computes_in_float32(
    bfloat16_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    stream = StreamedTeacher(open_teacher(bfloat16_teacher), torch.float32, CPU)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "teacher: bfloat16 weights, computed in float32 on cpu"
    layer = stream._load_layer(0)
    large = {n: p for n, p in layer.named_parameters() if p.dim() > 1 and ".gate." not in f".{n}"}
    assert {p.dtype for p in large.values()} == {torch.bfloat16}
    ids = torch.arange(24).view(2, 12) % 20
    (hidden,) = stream.run(ids, 2)
    assert hidden.dtype == torch.float32
    stock = AutoModelForCausalLM.from_pretrained(bfloat16_teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(stream.logits(ids, hidden, slice(None)), stock(ids).logits)


@pytest.mark.parametrize("granularity", ["experts", "neurons"])
def test_both_dtypes_give_the_same_student(
    granularity: str, bfloat16_teacher: Path, tiny_text: Path, tmp_path: Path
) -> None:
    made = {}
    for dtype in ("float32", "bfloat16"):
        out = m2d.convert(
            bfloat16_teacher, tmp_path / dtype, text=[tiny_text], sequences=4, length=16,
            dtype=dtype, scoring="DO-ACP", granularity=granularity,
        )  # fmt: skip
        plan = json.loads((out / "plan.json").read_text())
        record = json.loads((out / "m2d.json").read_text())
        assert record["calibration"]["compute_dtype"] == dtype
        assert record["dtype"] == "bfloat16"
        made[dtype] = (plan, load_file(out / "model.safetensors"))
    plans, weights = zip(*made.values(), strict=True)
    kept = [[[g["experts"] for g in layer["groups"]] for layer in p["layers"]] for p in plans]
    assert kept[0] == kept[1]
    for name, tensor in weights[0].items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, weights[1][name], rtol=2e-2, atol=1e-3)
