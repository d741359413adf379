"""A teacher's stored outputs: their loss, their files, and distillation from them."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from m2d.cli import main as m2d
from m2d.distill import teacher_logits as outputs
from m2d.distill.divergences import forward_kl
from m2d.distill.logits import StoredLogits, sampled_outputs, top_outputs, write_shard
from m2d.distill.loss import partial_forward_kl
from m2d.errors import UserError
from m2d.verify import check


def logits(rows: int = 9, vocabulary: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, rows, vocabulary, generator=generator) * 3
    return z, t


def test_all_tokens_give_the_full_divergence() -> None:
    z, t = logits()
    ids, log_p = top_outputs(t, 40)
    loss, gradient = partial_forward_kl(z.clone(), ids, log_p.exp())
    expected, expected_gradient = forward_kl(z.clone(), t.clone())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=2e-6)


def test_the_rest_of_the_mass_counts_as_one_outcome() -> None:
    z, t = logits()
    ids, log_p = top_outputs(t, 6)
    p = log_p.exp()
    loss, gradient = partial_forward_kl(z.clone(), ids, p)
    exact = z.double().requires_grad_()
    log_q = exact.log_softmax(-1).gather(-1, ids)
    rest, q_rest = 1 - p.double().sum(-1), 1 - log_q.exp().sum(-1)
    direct = (p.double() * (p.double().log() - log_q)).sum() + (rest * (rest / q_rest).log()).sum()
    direct.backward()
    torch.testing.assert_close(loss.double(), direct, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=0, atol=2e-6)
    assert loss < forward_kl(z.clone(), t.clone())[0]


def test_draws_are_distinct_and_unbiased() -> None:
    _, t = logits(1, 12)
    ids, log_p = sampled_outputs(t.expand(20_000, -1), 8, torch.Generator().manual_seed(1))
    p = log_p.exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(20_000))
    for row, shares in zip(ids[:50].tolist(), p[:50].tolist(), strict=True):
        drawn = [token for token, share in zip(row, shares, strict=True) if share > 0]
        assert len(set(drawn)) == len(drawn)
    mean = torch.zeros(20_000, 12).scatter_add_(-1, ids, p).mean(0)
    exact = t[0].softmax(-1)
    deviation = (exact * (1 - exact) / 8 / 20_000).sqrt()
    assert bool(((mean - exact).abs() < 5 * deviation + 1e-7).all())
    # with nothing left over, the gradient is q minus the shares
    z, _ = logits(1, 12)
    _, gradient = partial_forward_kl(z.clone(), ids[:1], p[:1])
    target = torch.zeros(1, 12).scatter_add_(-1, ids[:1], p[:1])
    torch.testing.assert_close(gradient, z.softmax(-1) - target, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A folder with a student, the teacher, 40 sequences of 16 tokens, and all outputs on them."""
    folder = tmp_path_factory.mktemp("outputs")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    (folder / "teacher").symlink_to(tiny_teacher)
    ids = torch.randint(0, 300, (40, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, folder / "tokens.safetensors")
    make(folder, "all", "--size", "300")
    return folder


def make(folder: Path, out: str, *more: str) -> None:
    parser = argparse.ArgumentParser()
    outputs.add_arguments(parser)
    words = [str(folder / "teacher"), str(folder / out), "--tokens"]
    words += [str(folder / "tokens.safetensors"), "--rows", "16", "--device", "cpu", *more]
    outputs.main(parser.parse_args(words))


def distill(folder: Path, out: str, *more: str) -> int:
    words = ["distill", *(str(folder / name) for name in ("student", "teacher", out)), "--tokens"]
    words += [str(folder / "tokens.safetensors"), "--batch", "8", "--device-batch", "4"]
    words += ["--learning-rate", "0.01", "--precision", "fp32", "--device", "cpu", *more]
    return m2d(words)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_distillation_from_all_outputs_is_distillation_from_the_teacher(place: Path) -> None:
    assert distill(place, "direct") == 0
    assert distill(place, "stored", "--teacher-logits", str(place / "all")) == 0
    # float16 log-probabilities
    torch.testing.assert_close(
        losses(place / "stored"), losses(place / "direct"), rtol=0, atol=2e-3
    )
    record = json.loads((place / "stored" / "m2d.json").read_text())
    assert record["distillation"]["teacher_logits"]["size"] == 300


def test_parts_make_the_same_files_and_can_be_stopped(place: Path) -> None:
    sampled = ["--kind", "sampled", "--size", "8"]
    make(place, "once", *sampled)
    make(place, "parts", *sampled, "--part", "2/2")
    assert sorted(f.name for f in (place / "parts").iterdir()) == [
        "index.json",
        "shard-00001.safetensors",
    ]
    tokens = place / "tokens.safetensors"
    with pytest.raises(UserError, match=r"2 of 3 shards are missing, the first is shard-00000"):
        StoredLogits(place / "parts", tokens, 300)
    # As who was killed once a shard was there leaves it.
    for number in (0, 1):
        (place / "parts" / f".shard-{number:05}.safetensors.lock").touch()
    make(place, "parts", *sampled, "--part", "1/2")
    make(place, "parts", *sampled)
    assert not list((place / "parts").glob(".*"))
    for number in range(3):
        name = f"shard-{number:05}.safetensors"
        ours, theirs = load_file(place / "parts" / name), load_file(place / "once" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ("ids", "log_p"))
    assert StoredLogits(place / "once", tokens, 300)[39][0].shape == (16, 8)
    more = ["--teacher-logits", str(place / "once"), "--steps", "30"]
    assert distill(place, "from-draws", *more) == 0
    trained = losses(place / "from-draws")
    assert sum(trained[-5:]) < sum(trained[:5]) - 0.5


def test_an_index_of_more_shards_than_could_be_is_refused_at_once(place: Path) -> None:
    """Counting to 2^39 would never end."""
    make(place, "many", "--kind", "sampled", "--size", "8")
    file = place / "many" / "index.json"
    index = {**json.loads(file.read_text()), "sequences": 2**39, "rows_of_shard": 1}
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{2**39 - 3} of {2**39} shards are missing, .*-00003"):
        StoredLogits(place / "many", place / "tokens.safetensors", 300)
    found = check(place / "many")
    assert f"shard-00003.safetensors is missing, as are {2**39 - 4} others" in found.faults


def test_outputs_that_do_not_fit_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError, match="holds outputs of kind top, not sampled"):
        make(place, "all", "--kind", "sampled", "--size", "300")
    with pytest.raises(UserError, match="the vocabulary has 300 tokens"):
        make(place, "more", "--size", "301")
    save_file({"input_ids": torch.zeros(9, 4, dtype=torch.int64)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="was not made on"):
        StoredLogits(place / "all", tmp_path / "other.safetensors", 300)
    given = ["--teacher-logits", str(place / "all")]
    for more, message in (
        (["--loss", "reverse_kl"], "goes with --loss forward_kl"),
        (["--teacher-top-k", "4"], "were chosen in m2d teacher-logits"),
        (["--teacher-logits", str(tmp_path)], "no such file"),
    ):
        assert distill(place, "bad", *given, *more) == 2
        assert message in capsys.readouterr().err
    assert not (place / "bad").exists()


def test_the_same_shard_is_the_same_bytes(tmp_path: Path) -> None:
    """Also after a kill: metadata of several keys would be written in any order."""
    ids, log_p = torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(2, 3, 4)
    written = set()
    for i in range(20):
        file = tmp_path / str(i) / "shard-00000.safetensors"
        write_shard(file, ids, log_p, 300, {"rows_of_shard": 2})
        written.add(file.read_bytes())
    assert len(written) == 1
