"""Every family with bfloat16 weights: computed in float32, weights as they are, and in bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from family_teachers import MAKERS, make
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import m2d
from m2d.models.load import load_model
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher, read_config
from m2d.statistics.routing import RoutingTotals

CPU = torch.device("cpu")
IDS = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=MAKERS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of the family with bfloat16 weights."""
    folder = make(request.param, tmp_path_factory.mktemp("bfloat16") / request.param)
    for file in folder.glob("*.safetensors"):
        tensors = {
            n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stock(folder: Path) -> Any:
    """transformers' own model, all of it in float32."""
    read_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def held(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


@torch.no_grad()
def test_float32_on_narrow_weights_is_float32(teacher: Path) -> None:
    """Streamed and loaded, logits are those of the stock float32 model; the memory is not."""
    expected = stock(teacher)(IDS).logits
    stream = StreamedTeacher(open_teacher(teacher), torch.float32, CPU)
    (hidden,) = stream.run(IDS, 3)
    torch.testing.assert_close(
        stream.logits(IDS, hidden, slice(None)), expected, rtol=1e-4, atol=1e-4
    )
    _, config = read_config(teacher)
    narrow = load_model(teacher, config, torch.float32, CPU, narrow=True)
    torch.testing.assert_close(narrow(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    own = load_model(teacher, config, torch.bfloat16, CPU)
    assert held(narrow) < 1.1 * held(own)  # norms and routers are widened
    assert held(load_model(teacher, config, torch.float32, CPU)) > 1.8 * held(own)


def test_both_dtypes_route_alike_and_make_the_same_student(
    teacher: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Selections differ by the near ties of bfloat16's rounding alone; a plan by none."""
    frequencies = {}
    for dtype in (torch.float32, torch.bfloat16):
        opened = open_teacher(teacher)
        totals = RoutingTotals(opened)
        StreamedTeacher(opened, dtype, CPU).run(IDS, 3, totals.visit)
        frequencies[dtype] = {i: r.prob_sum / r.n_tokens for i, r in totals.result().items()}
    for layer, exact in frequencies[torch.float32].items():
        assert abs(frequencies[torch.bfloat16][layer] - exact).max() < 0.02
    students = {}
    for name in ("float32", "bfloat16"):
        # All experts are kept, in as many groups as the top-k, so that no near tie decides.
        students[name] = m2d.convert(
            teacher, tmp_path / name, text=[tiny_text], sequences=2, length=12, dtype=name,
            scoring="SF", grouping="router_cluster", keep=open_teacher(teacher).num_experts,
            scaling="uniform",
        )  # fmt: skip
    tensors = [load_file(folder / "model.safetensors") for folder in students.values()]
    assert tensors[0].keys() == tensors[1].keys()
    groups = [
        [[sorted(g["experts"]) for g in layer["groups"]] for layer in plan["layers"]]
        for plan in (json.loads((f / "plan.json").read_text()) for f in students.values())
    ]
    assert [sorted(layer) for layer in groups[0]] == [sorted(layer) for layer in groups[1]]
