"""Distillation with the hidden states' distance from the teacher's in its loss."""

from pathlib import Path

import pytest
import torch
from conftest import make_teacher, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from m2d.cli import main
from m2d.distill.loss import hidden_state_loss
from tests.test_distill import SMALL
from tests.test_distill_masks import distill

IDS = torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hidden")
    torch.manual_seed(1)
    make_teacher(folder / "teacher300", vocab_size=300)
    student = Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "vocab_size": 300}))
    student.save_pretrained(folder / "student300")
    make_tokenizer().save_pretrained(folder / "student300")
    save_file({"input_ids": IDS}, folder / "tokens")
    return folder


def test_a_value_by_hand() -> None:
    """Layer 1: (3² + 1²) / 5² and 2² / 4²; layer 2: nothing, and where the teacher has nothing."""
    student = [torch.tensor([[3.0, 4.0], [4.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])]
    teacher = [torch.tensor([[0.0, 5.0], [4.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])]
    assert hidden_state_loss(student, teacher).item() == pytest.approx((0.4 + 0.25) / 2)


def distances(models: Path) -> Tensor:
    """Relative squared distance of every position's hidden states, mean over layers, [8, 16]."""
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(models / name)(
                IDS, output_hidden_states=True
            ).hidden_states[1:]
            for name in ("student300", "teacher300")
        )
    assert len(ours) == len(theirs) == SMALL["num_hidden_layers"]
    parts = [
        (s - t).square().sum(-1) / t.square().sum(-1) for s, t in zip(ours, theirs, strict=True)
    ]
    return torch.stack(parts).mean(0)


@pytest.mark.parametrize("device_batch", ["2", "8"])
def test_it_is_added_to_the_divergence(models: Path, tmp_path: Path, device_batch: str) -> None:
    """The mean over the counted positions, times the weight, whatever the micro-batch."""
    mask = (torch.rand(8, 16, generator=torch.Generator().manual_seed(3)) < 0.3).to(torch.uint8)
    save_file({"input_ids": IDS, "loss_mask": mask}, tmp_path / "t")
    size = ("--device-batch", device_batch)
    plain = distill(models, tmp_path / "plain", tmp_path / "t", *size)
    found = distill(models, tmp_path / "found", tmp_path / "t", *size, "--hidden-loss-weight", "3")
    counted = torch.zeros(8, 16, dtype=torch.bool)
    counted[:, :-1] = mask[:, 1:].bool()  # a position counts if the token after it does
    assert found - plain == pytest.approx(3 * float(distances(models)[counted].mean()), rel=1e-5)


def test_gradient_checkpointing_trains_alike(models: Path, tmp_path: Path) -> None:
    more = ("--hidden-loss-weight", "1", "--learning-rate", "1e-3", "--warmup-steps", "0")
    distill(models, tmp_path / "plain", models / "tokens", *more)
    distill(models, tmp_path / "saved", models / "tokens", *more, "--gradient-checkpointing")
    distill(models, tmp_path / "without", models / "tokens", *more[2:])
    plain, saved, without = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "saved", "without")
    )
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    assert not all(torch.equal(plain[name], without[name]) for name in plain)


def test_what_it_cannot_compare(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another depth or hidden size, and stored outputs, are refused before any step."""
    layers = SMALL["num_hidden_layers"] + 1
    deeper = Qwen3Config(**{**SMALL, "vocab_size": 300, "num_hidden_layers": layers})
    deeper.layer_types = ["full_attention"] * layers
    Qwen3ForCausalLM(deeper).save_pretrained(tmp_path / "deep")
    make_tokenizer().save_pretrained(tmp_path / "deep")
    words = ["distill", tmp_path / "deep", models / "teacher300", tmp_path / "out"]
    words += ["--tokens", models / "tokens", "--steps", 1, "--batch", 8, "--device", "cpu"]
    words += ["--hidden-loss-weight", 1]
    assert main(list(map(str, words))) == 2
    assert f"the student has {layers} layers of hidden size" in capsys.readouterr().err
    stored = tmp_path / "stored"
    logits = ["teacher-logits", models / "teacher300", stored, "--tokens", models / "tokens"]
    assert main([*map(str, logits), "--device", "cpu"]) == 0
    words[1] = models / "student300"
    assert main([*map(str, words), "--teacher-logits", str(stored)]) == 2
    assert "holds no hidden states" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
