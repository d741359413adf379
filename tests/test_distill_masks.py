"""Distillation over a part: of the tokens (loss masks, padding), and of the vocabulary."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_teacher, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from m2d.cli import main
from m2d.errors import UserError
from m2d.tokens.dataset import PackedTokens
from m2d.tokens.tokenizers import require_same_tokens
from tests.test_distill import SMALL

IDS = torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 300 tokens, one of 320, and a student of each size."""
    folder = tmp_path_factory.mktemp("masks")
    for size in (300, 320):
        torch.manual_seed(1)
        make_teacher(folder / f"teacher{size}", vocab_size=size)
        student = Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "vocab_size": size}))
        student.save_pretrained(folder / f"student{size}")
        make_tokenizer().save_pretrained(folder / f"student{size}")
    return folder


def distill(models: Path, out: Path, tokens: Path, *more: str, student=300, teacher=300) -> float:
    """The loss of one step over all 8 sequences."""
    words = ["distill", models / f"student{student}", models / f"teacher{teacher}", out]
    words += ["--tokens", tokens, "--steps", 1, "--batch", 8, "--precision", "fp32"]
    assert main([*map(str, words), "--device", "cpu", *more]) == 0
    return json.loads((out / "metrics.jsonl").read_text())["loss"]


def divergences(models: Path, student: int = 300, teacher: int = 300) -> Tensor:
    """KL(teacher || student) of every position, [8, 16], over the common vocabulary."""
    common = min(student, teacher)
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(models / name)(IDS).logits[..., :common]
            for name in (f"teacher{teacher}", f"student{student}")
        )
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_loss_is_over_the_counted_tokens(models: Path, tmp_path: Path) -> None:
    """A position counts if the token after it does, whatever the size of a micro-batch."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(8, 16, generator=generator) < 0.3).to(torch.uint8)
    mask[2] = 0  # a sequence of which nothing counts
    save_file({"input_ids": IDS, "loss_mask": mask}, tmp_path / "t")
    counted = torch.cat([mask[:, 1:], torch.zeros(8, 1)], 1).bool()
    expected = float(divergences(models)[counted].mean())
    for size in ("8", "4", "1"):
        found = distill(models, tmp_path / f"out{size}", tmp_path / "t", "--device-batch", size)
        assert found == pytest.approx(expected, rel=1e-5)
    one, other = (load_file(tmp_path / f"out{n}" / "model.safetensors") for n in (8, 1))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-6)


def test_padding_is_not_learnt_from(models: Path, tmp_path: Path) -> None:
    padding = (torch.arange(16) < torch.arange(6, 14)[:, None]).long()
    results = []
    for pad in (0, 7):
        ids = torch.where(padding.bool(), IDS, pad)
        save_file({"input_ids": ids, "attention_mask": padding}, tmp_path / f"t{pad}")
        results.append(distill(models, tmp_path / f"out{pad}", tmp_path / f"t{pad}"))
    counted = torch.cat([padding[:, 1:], torch.zeros(8, 1)], 1).bool()
    expected = float(divergences(models)[counted].mean())
    assert results == [pytest.approx(expected, rel=1e-5)] * 2


def test_stored_logits_and_cross_entropy_respect_the_mask(models: Path, tmp_path: Path) -> None:
    labels = torch.where(IDS % 3 == 0, IDS, -100)
    save_file({"input_ids": IDS, "labels": labels}, tmp_path / "t")
    words = ["teacher-logits", models / "teacher300", tmp_path / "stored", "--tokens"]
    assert main([*map(str, [*words, tmp_path / "t"]), "--size", "300"]) == 0
    plain = distill(models, tmp_path / "plain", tmp_path / "t")
    stored = ["--teacher-logits", str(tmp_path / "stored")]
    assert distill(models, tmp_path / "out", tmp_path / "t", *stored) == pytest.approx(
        plain, rel=2e-3
    )
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(models / "student300")
        own = float(model(IDS, labels=labels).loss)  # transformers' own shifted mean
    found = distill(models, tmp_path / "ce", tmp_path / "t", "--cross-entropy-weight", "1")
    assert found == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize(("student", "teacher"), [(320, 300), (300, 320)])
def test_vocabularies_padded_differently(
    models: Path, tmp_path: Path, student: int, teacher: int
) -> None:
    save_file({"input_ids": IDS}, tmp_path / "t")
    sizes = {"student": student, "teacher": teacher}
    expected = float(divergences(models, **sizes).mean())
    found = distill(models, tmp_path / "out", tmp_path / "t", **sizes)
    assert found == pytest.approx(expected, rel=1e-5)
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(rows) == student
    words = ["teacher-logits", models / f"teacher{teacher}", tmp_path / "stored", "--tokens"]
    assert main([*map(str, [*words, tmp_path / "t"]), "--size", str(teacher)]) == 0
    stored = ["--teacher-logits", str(tmp_path / "stored")]
    found = distill(models, tmp_path / "again", tmp_path / "t", *stored, **sizes)
    assert found == pytest.approx(expected, rel=2e-3)


def test_another_tokenizer_is_refused(models: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((models / "student300" / "tokenizer.json").read_text())
    require_same_tokens(models / "student300", models / "teacher320")
    tokenizer["added_tokens"].append({"id": 310, "content": "<extra>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    require_same_tokens(models / "student300", tmp_path)  # more tokens, the same ones before
    vocab = tokenizer["model"]["vocab"]
    first, second = (next(t for t, i in vocab.items() if i == n) for n in (40, 41))
    vocab[first], vocab[second] = 41, 40
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"token 40 is .*; the two must share a tokenizer"):
        require_same_tokens(models / "student300", tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        require_same_tokens(models / "student300", tmp_path)


def test_a_mask_of_nothing_is_refused(tmp_path: Path) -> None:
    save_file({"input_ids": IDS, "loss_mask": torch.zeros(8, 16).byte()}, tmp_path / "t")
    with pytest.raises(UserError, match="by its loss_mask no token counts"):
        PackedTokens(tmp_path / "t", 0).check_vocabulary(300)
