"""The form of a student that more programs take is the same function, through files on disk."""

import json
from pathlib import Path
from typing import Any

import family_teachers
import pytest
import torch
from conftest import VOCABULARY
from transformers import AutoModelForCausalLM

import m2d
from m2d.cli import main
from m2d.errors import UserError
from m2d.export.folder import export_folder, weight_of_each
from m2d.models.skeleton import experts_modules, layers_of
from m2d.verify import check


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Any:
    """Name -> a student's folder, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp("students") / name
            teacher = family_teachers.make(name, root / "teacher")
            call = {"text": [tiny_text], "sequences": 2, "length": 16}
            if name == "qwen2_moe":  # whose sibling is dense
                call["student_class"] = "same"
            made[name] = m2d.convert(teacher, root / "student", **call)
        return made[name]

    return get


@torch.no_grad()
def same_function(a: Path, b: Path) -> float:
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs, ours = (load(folder)(ids).logits for folder in (a, b))
    return float((theirs - ours).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "gpt_oss"])
def test_one_expert_is_cut_into_several(
    name: str, experts: int, students: Any, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    student = students(name)
    before = load(student)
    assert main(["export", str(student), str(out), "--experts", str(experts)]) == 0
    cut = load(out)
    for layer, path in experts_modules(cut).items():
        block = layers_of(cut)[layer].get_submodule(path)
        assert block.down_proj.shape[0] == experts
    assert same_function(student, out) < 1e-5
    assert sum(p.numel() for p in cut.parameters()) - sum(
        p.numel() for p in before.parameters()
    ) == (experts - 1) * sum(
        p.numel()
        for n, p in before.named_parameters()
        if n.endswith(("mlp.gate.weight", "router.weight", "router.bias"))
    ) + (
        (experts - 1) * len(experts_modules(cut)) * cut.config.hidden_size
        if name == "gpt_oss"  # the down projections' biases
        else 0
    )
    config = json.loads((out / "config.json").read_text())
    assert config["num_experts_per_tok"] == experts
    assert (out / "tokenizer.json").is_file()
    assert not check(out).faults  # its m2d.json is of its own files


@pytest.mark.parametrize("experts", [2, 4])
def test_a_dense_student_gets_a_last_layer_of_experts(
    experts: int, students: Any, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    student = students("glm4_moe")
    assert main(["export", str(student), str(out), "--experts", str(experts)]) == 0
    model = load(out)
    last = len(layers_of(model)) - 1
    assert experts_modules(model) == {last: "mlp.experts"}
    assert weight_of_each(model) == 1.0
    assert same_function(student, out) < 1e-5
    # Slices of the FFN, of 144 neurons: the shared expert has the first, zeros fill the last.
    before, after = (layers_of(m)[last].mlp for m in (load(student), model))
    width = before.gate_proj.weight.shape[0]
    each = after.shared_experts.gate_proj.weight.shape[0]
    assert each % 8 == 0
    assert 0 <= (experts + 1) * each - width < (experts + 1) * 8
    up = torch.cat([after.shared_experts.up_proj.weight, *after.experts.gate_up_proj[:, each:]])
    assert torch.equal(up[:width], before.up_proj.weight)
    assert not up[width:].any()


def test_what_needs_no_other_form_is_refused(
    students: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(students("qwen3_moe")), str(tmp_path / "s")]) == 2
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="no multiple of 5 x 8"):
        export_folder(students("olmoe"), tmp_path / "s", 5)
    export_folder(students("olmoe"), tmp_path / "two")
    with pytest.raises(UserError, match="2 experts in a layer"):
        export_folder(tmp_path / "two", tmp_path / "s")
    assert not (tmp_path / "s").exists()
