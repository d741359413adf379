"""Students with new weights: what is new, what is the teacher's, and how new weights look."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_teacher
from family_teachers import STOCK, save_stock
from transformers import AutoModelForCausalLM, PreTrainedModel

from m2d.cli import main
from m2d.inspect import inspect
from m2d.models.checkpoint import Checkpoint
from m2d.models.teacher import open_teacher

STD = 0.2  # initializer_range of the test teachers
FAMILIES = ("qwen3_moe", "deepseek_v2", "granitemoe", "gpt_oss", "olmoe", "qwen2_moe")


def baseline(teacher: Path, out: Path, *options: str) -> PreTrainedModel:
    assert main(["baseline", str(teacher), str(out), *options]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert model(input_ids=torch.arange(12)[None]).logits.isfinite().all()
    return model


def assert_new(name: str, tensor: torch.Tensor) -> None:
    """Weights are normal with the config's deviation, biases zero, norms one."""
    if name.endswith("bias"):
        assert not tensor.any(), name
    elif tensor.numel() >= 500:  # of fewer numbers the deviation says little
        assert float(tensor.std()) == pytest.approx(STD, rel=0.1), name
        assert abs(float(tensor.mean())) < 0.1 * STD, name
    elif name.endswith("norm.weight"):
        assert (tensor == 1).all(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_random_ffn_keeps_all_but_the_ffns(name: str, tmp_path: Path) -> None:
    teacher = save_stock(tmp_path / "teacher", *STOCK[name])
    model = baseline(teacher, tmp_path / "student", "--kind", "random_ffn")
    facts = inspect(open_teacher(teacher))
    assert type(model).__name__ == facts["student_architecture"]
    assert model.num_parameters() == facts["student_parameters"]
    own = Checkpoint(teacher)
    kept = fresh = 0
    for key, tensor in model.state_dict().items():
        if ".mlp." not in key and "block_sparse_moe" not in key:
            kept += 1
            assert torch.equal(tensor, own.read(key)) if key in own else key == "lm_head.weight"
        elif key.endswith(("mlp.gate.weight", "router.weight", "router.bias")):
            assert not tensor.any(), key  # of one expert
        else:
            fresh += 1
            assert_new(key, tensor)
            assert key not in own or not torch.equal(tensor, own.read(key))
    assert kept > 10
    assert fresh >= 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_random_init_keeps_nothing(name: str, tmp_path: Path) -> None:
    teacher = save_stock(tmp_path / "teacher", *STOCK[name])
    model = baseline(teacher, tmp_path / "student", "--kind", "random_init")
    own = Checkpoint(teacher)
    for key, tensor in model.state_dict().items():
        if not key.endswith(("router.weight", "router.bias")):  # too few numbers to judge
            assert_new(key, tensor)
        assert key not in own or not torch.equal(tensor, own.read(key)), key


def test_new_weights_follow_from_the_seed(tiny_teacher: Path, tmp_path: Path) -> None:
    first = baseline(tiny_teacher, tmp_path / "a", "--kind", "random_ffn")
    torch.manual_seed(99)  # no other randomness must matter, nor be touched
    before = torch.random.get_rng_state()
    again = baseline(tiny_teacher, tmp_path / "b", "--kind", "random_ffn", "--seed", "0")
    assert torch.equal(torch.random.get_rng_state(), before)
    other = baseline(tiny_teacher, tmp_path / "c", "--kind", "random_ffn", "--seed", "1")
    tensors = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    gate = "model.layers.{}.mlp.gate_proj.weight"
    assert not torch.equal(tensors[0][gate.format(0)], tensors[2][gate.format(0)])
    assert not torch.equal(tensors[0][gate.format(0)], tensors[0][gate.format(1)])


def test_the_folder_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    teacher = make_teacher(tmp_path / "teacher", tie_word_embeddings=True)
    out = tmp_path / "student"
    baseline(teacher, out, "--kind", "random_init", "--seed", "5", "--dtype", "bfloat16")
    record = json.loads((out / "m2d.json").read_text())
    assert record["baseline"] == {"kind": "random_init", "seed": 5}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(e.dtype == torch.bfloat16 for e in Checkpoint(out).entries.values())
    assert "newly initialised weights" in (out / "README.md").read_text().replace("\n", " ")
    assert (out / "tokenizer.json").is_file()
    capsys.readouterr()
    assert main(["baseline", str(teacher), str(out), "--kind", "random_ffn"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["baseline", str(out), str(tmp_path / "x"), "--kind", "random_ffn"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
