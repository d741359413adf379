"""Layouts on disk, and classes that are in no table: the same student, with the hub's names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from family_teachers import EXPERTS, MAKERS, STOCK, WIDTH, load, make, make_uniform, relative_error
from safetensors.torch import load_file, save_file

import m2d
from m2d.choose.plan import Group, LayerPlan, Plan
from m2d.models.families import SIBLINGS
from m2d.models.teacher import open_teacher
from m2d.students.merge import write_student

ONE_EXPERT = ("gpt_oss", "olmoe")  # of STUDENTS in test_families


@pytest.mark.parametrize("name", sorted(ONE_EXPERT))
def test_a_one_expert_student_has_the_hubs_tensor_names(name: str, tmp_path: Path) -> None:
    """Those that the class's own save_pretrained writes for such a config."""
    folder = make_uniform(name, tmp_path / "teacher", num_hidden_layers=2)
    plan_layers = [
        LayerPlan(i, (Group((2,), (1.0,), 1.0),)) for i in open_teacher(folder).moe_layers
    ]
    out = write_student(
        open_teacher(folder), Plan("x", "x", "x", None, tuple(plan_layers)), tmp_path / "student"
    )
    load(out).save_pretrained(tmp_path / "again")
    ours, stock = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert set(ours) == set(stock)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)


def fuse(folder: Path) -> Path:
    """The experts of a layer in one tensor, as some repositories keep them."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{at}.{e}.{part}_proj.weight") for e in range(EXPERTS)])
            for part in ("gate", "up", "down")
        )
        tensors[f"{at}.gate_up_proj"], tensors[f"{at}.down_proj"] = torch.cat([gate, up], 1), down
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def shard(folder: Path) -> Path:
    """The same tensors in shards with an index."""
    model = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "emo"])
@pytest.mark.parametrize("layout", [fuse, shard])
def test_the_layout_on_disk_does_not_matter(
    name: str, layout: Any, tmp_path: Path, teachers: Any, tiny_text: Path
) -> None:
    folder = layout(make(name, tmp_path / "teacher"))
    settings: Any = {"text": [tiny_text], "sequences": 2, "length": 12, "keep": 5}
    one = load(m2d.convert(folder, tmp_path / "one", **settings)).state_dict()
    other = load(m2d.convert(teachers(name), tmp_path / "other", **settings)).state_dict()
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


# Model, the transformers stem, what to change in the common config.
OUTSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "flex_olmo": ("FlexOlmo", {"num_experts": EXPERTS, "intermediate_size": WIDTH}),
    "minimax_m2": (
        "MiniMaxM2",
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "head_dim": 16},
    ),
    "granitemoeshared": (
        "GraniteMoeShared",
        {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "shared_intermediate_size": 40,
         "residual_multiplier": 0.5},
    ),
    "kolibri1": (
        "Kolibri1",
        {"num_local_experts": EXPERTS, "moe_intermediate_size": WIDTH, "head_dim": 16,
         "shared_expert_intermediate_size": 40},
    ),
    "exaone_moe": (
        "ExaoneMoe",
        {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "intermediate_size": 100,
         "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "sliding_window": 8,
         "mlp_layer_types": ["dense", "sparse"], "routed_scaling_factor": 2.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@torch.no_grad()
def test_a_model_that_is_in_no_table_converts_exactly(
    name: str, tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STOCK, name, OUTSIDE[name])
    monkeypatch.setitem(
        MAKERS, name, lambda folder, **changes: _save_outside(folder, name, changes)
    )
    folder = make_uniform(name, tmp_path / "teacher")
    out = m2d.convert(folder, tmp_path / "student", text=[tiny_text], sequences=2, length=12)
    student, teacher = load(out), load(folder)
    assert type(student) is type(teacher) or name in SIBLINGS
    counts = {
        len(module.down_proj)
        for module in student.modules()
        if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter)
    }
    assert counts <= {1}  # one expert, or none where every layer is dense
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    assert relative_error(student(ids).logits, teacher(ids).logits) < 5e-6


def _save_outside(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    from family_teachers import save_stock

    stem, config = OUTSIDE[name]
    return save_stock(folder, stem, {**config, **changes})
