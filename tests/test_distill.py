"""Distillation: parity over processes, stops and kills, and what the result holds."""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from conftest import make_tokenizer
from distill_worker import ADAM_EPSILON, large_epsilon
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from m2d.cli import main
from m2d.distill import run, watch
from m2d.distill.heads import check_head, hidden_states
from m2d.distill.recipe import make_recipe
from m2d.errors import UserError
from m2d.tokens.dataset import PackedTokens

STEPS = 6


LEARNING_RATE = 0.01


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A folder with a student, the teacher and 40 sequences of 16 tokens."""
    folder = tmp_path_factory.mktemp("distill")
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=False))
    model.save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    (folder / "student" / "plan.json").write_text("{}")
    (folder / "student" / "m2d.json").write_text('{"plan": {"keep": 2}, "dtype": "float32"}')
    (folder / "teacher").symlink_to(tiny_teacher)
    ids = torch.randint(0, 300, (40, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, folder / "tokens.safetensors", {"source": "random"})
    return folder


def arguments(folder: Path, out: str, *more: str, device_batch: int = 8) -> list[str]:
    command = ["distill", str(folder / "student"), str(folder / "teacher"), str(folder / out)]
    command += ["--tokens", str(folder / "tokens.safetensors"), "--steps", str(STEPS)]
    command += ["--batch", "8", "--device-batch", str(device_batch), "--learning-rate"]
    command += [str(LEARNING_RATE)]
    return [*command, "--precision", "fp32", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def comparable(place: Path) -> Path:
    """The same with `large_epsilon`: what the same gradients otherwise added up agree with."""
    with large_epsilon():
        assert main(arguments(place, "comparable")) == 0
    return place / "comparable"


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """One process, no accumulation, no interruption: what all others must agree with."""
    assert main(arguments(place, "whole")) == 0
    return place / "whole"


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_training(out: Path, reference: Path) -> None:
    """Step by step the same losses and, at the end, the same weights, in float32."""
    ours, theirs = metrics_of(out), metrics_of(reference)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["loss"] - b["loss"]) < 2e-6
        assert a["lr"] == b["lr"]
    reference_weights = weights_of(reference)
    for name, weight in weights_of(out).items():
        # Gradients, clipped to a norm of 1, are sums whose terms float32 rounds: exact to 2e-6.
        bound = STEPS * LEARNING_RATE / ADAM_EPSILON * 2e-6
        torch.testing.assert_close(weight, reference_weights[name], rtol=0, atol=bound)


def assert_identical(out: Path, reference: Path) -> None:
    reference_weights = weights_of(reference)
    for name, weight in weights_of(out).items():
        assert torch.equal(weight, reference_weights[name]), name
    assert [r["loss"] for r in metrics_of(out)] == [r["loss"] for r in metrics_of(reference)]


def test_the_result_is_a_stock_folder(place: Path, whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.dtype == torch.float32
    AutoTokenizer.from_pretrained(whole)
    assert (whole / "plan.json").read_text() == "{}"
    record = json.loads((whole / "m2d.json").read_text())
    assert record["plan"] == {"keep": 2}
    assert record["distillation"]["tokens"] == STEPS * 8 * 16
    assert record["distillation"]["source"] == "random"
    assert "forward KL" in (whole / "README.md").read_text()
    losses = [row["loss"] for row in metrics_of(whole)]
    assert losses[-1] < losses[0] - 0.02
    assert not list(place.glob(".whole*"))


def test_accumulation_changes_nothing(place: Path, comparable: Path) -> None:
    with large_epsilon():
        assert main(arguments(place, "accumulated", device_batch=4)) == 0
    assert_same_training(place / "accumulated", comparable)


def test_two_processes_agree_and_resume_bitwise(place: Path, comparable: Path) -> None:
    """DDP, ZeRO-2 and ZeRO-3 on two processes with accumulation 2; ZeRO-2 also stopped midway."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    worker = Path(__file__).parent / "distill_worker.py"
    strategies = ["ddp", "zero2", "zero3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", port, str(worker), str(place), str(STEPS), *strategies]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for strategy in strategies:
        assert_same_training(place / strategy, comparable)
    assert_identical(place / "zero2-stopped", place / "zero2")


def at_step(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    original = watch.Watch.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            act()
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(watch.Watch, "on_step_end", on_step_end)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_the_same_command_goes_on(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = f"signal{number}"
    with monkeypatch.context() as patch:
        at_step(2, lambda: os.kill(os.getpid(), number), patch)
        with pytest.raises(SystemExit) as stop:
            main(arguments(place, out))
    assert stop.value.code == watch.EXIT_STOPPED == 75
    assert not (place / out).exists()
    (work,) = place.glob(f".{out}.checkpoints-*")
    assert [folder.name for folder in work.glob("checkpoint-*")] == ["checkpoint-2"]
    # a checkpoint that a kill cut short, and a line that it cut short, are not gone on from
    (work / ".partial" / "checkpoint-5").mkdir(parents=True)
    with (work / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert main(arguments(place, out)) == 0
    assert_identical(place / out, whole)
    assert not list(place.glob(f".{out}*"))


def test_sigkill_at_a_random_step_changes_nothing(place: Path, whole: Path) -> None:
    step = random.randrange(1, STEPS)
    command = [sys.executable, "-m", "m2d.cli", *arguments(place, "killed")]
    command += ["--checkpoint-minutes", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = list(place.glob(".killed.checkpoints-*/metrics.jsonl"))
        if files and files[0].read_text().count("\n") >= step:
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, (step, process.stderr.read())
    assert not (place / "killed").exists()
    (work,) = place.glob(".killed.checkpoints-*")
    kept = [int(folder.name.split("-")[1]) for folder in work.glob("checkpoint-*")]
    assert len(kept) <= 3, kept  # a kill can come between a new one's naming and an old one's end
    assert main(arguments(place, "killed")) == 0
    assert_identical(place / "killed", whole)


def test_a_time_limit_stops_with_a_checkpoint(place: Path, whole: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments(place, "limited", "--stop-after", "0"))
    assert stop.value.code == 75
    (work,) = place.glob(".limited.checkpoints-*")
    assert [folder.name for folder in work.glob("checkpoint-*")] == ["checkpoint-1"]
    assert main(arguments(place, "limited", "--stop-after", "60")) == 0
    assert_identical(place / "limited", whole)


def test_other_arguments_begin_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            main(arguments(place, "anew"))
    assert main(arguments(place, "anew", "--seed", "1")) == 0
    assert "beginning anew" in capsys.readouterr().err
    assert [row["step"] for row in metrics_of(place / "anew")] == list(range(1, STEPS + 1))
    assert not list(place.glob(".anew*"))


def test_a_student_equal_to_its_teacher_stays_as_it_is(place: Path) -> None:
    command = arguments(place, "itself", "--tensorboard", str(place / "board"))
    command[2] = command[1]
    assert main(command) == 0
    assert [row["loss"] for row in metrics_of(place / "itself")] == [0.0] * STEPS
    before = weights_of(place / "student")
    for name, weight in weights_of(place / "itself").items():
        assert torch.equal(weight, before[name])
    assert list((place / "board").glob("events*"))


def test_options_reach_the_training(place: Path, whole: Path) -> None:
    more = ["--teacher-top-k", "8", "--gradient-checkpointing", "--precision", "bf16"]
    more += ["--warmup-steps", "2", "--decay-steps", "3", "--min-learning-rate", "0.002"]
    assert main(arguments(place, "options", *more)) == 0
    rows, plain = metrics_of(place / "options"), metrics_of(whole)
    rates = [row["lr"] for row in rows]
    # the floor, half-way up, the peak, then down in three steps (the last one not yet there)
    np.testing.assert_allclose(rates, [0.002, 0.006, 0.01, 0.01, 0.0073333, 0.0046667], rtol=1e-4)
    assert abs(rows[0]["loss"] - plain[0]["loss"]) > 1e-3  # all experts at once: another teacher
    assert (
        json.loads((place / "options" / "m2d.json").read_text())["distillation"]["teacher_top_k"]
        == 8
    )


def test_a_spread_teacher_is_the_same_teacher(place: Path, whole: Path) -> None:
    """With accelerate's hooks on every part; on this machine all of them are on the CPU."""
    options = ["--teacher-device-map", json.dumps({"": "cpu"})]
    assert main(arguments(place, "spread", *options)) == 0
    assert_identical(place / "spread", whole)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    parts += ["model.rotary_emb", "lm_head"]
    ids = torch.arange(16)[None]
    teacher = AutoModelForCausalLM.from_pretrained(place / "teacher").eval()
    with torch.no_grad():
        before = hidden_states(teacher, ids)
        spread = dispatch_model(teacher, dict.fromkeys(parts, "cpu"), "cpu", force_hooks=True)
        assert hasattr(spread.model.layers[1], "_hf_hook")
        assert torch.equal(hidden_states(spread, ids), before)
    check_head(spread, ids, "teacher")


BAD = {
    "device map": (["--teacher-device-map", "everywhere"], "nor a JSON object of modules"),
    "out exists": (["--seed", "0"], "exists already"),
    "batch": (["--device-batch", "3"], "must be a multiple of --device-batch 3"),
    "schedule": (["--warmup-steps", "5", "--decay-steps", "5"], "are more than the 6 steps"),
    "floor": (["--min-learning-rate", "1"], "is above --learning-rate"),
    "top-k low": (["--teacher-top-k", "1"], "must lie between the teacher's own 2 and its 8"),
    "top-k high": (["--teacher-top-k", "9"], "must lie between the teacher's own 2 and its 8"),
    "tokens": (["--tokens", "nowhere.safetensors"], "no such file"),
    "too few": (["--tokens", "{few}", "--steps", "0"], "greater than or equal to 1"),
    "not tokens": (["--tokens", "{student}/model.safetensors"], "input_ids"),
    "not safetensors": (["--tokens", "{student}/config.json"], "not a readable token file"),
    "vocabulary": (["--tokens", "{outside}"], "token id 300 is outside"),
    "device": (["--device", "nothing"], "not available here"),
    "board": (["--tensorboard", "{nowhere}"], "is no folder"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(
    kind: str, place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more, message = BAD[kind]
    outside = tmp_path / "outside.safetensors"
    save_file({"input_ids": torch.full((8, 4), 300)}, outside)
    nowhere = tmp_path / "link"
    nowhere.symlink_to("nowhere")
    names = {"student": place / "student", "outside": outside, "few": outside, "nowhere": nowhere}
    out = "whole" if kind == "out exists" else "bad"
    try:
        code = main(arguments(place, out, *(word.format(**names) for word in more)))
    except SystemExit as stop:  # argparse's own check, with its usage lines
        code = stop.code
        assert message in capsys.readouterr().err
    else:
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert code == 2
    assert not (place / "bad").exists()
    assert not list(place.glob(".bad*"))


def test_what_fails_before_a_checkpoint_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    below_a_file = str(place / "tokens.safetensors" / "board")
    assert main(arguments(place, "bad", "--tensorboard", below_a_file)) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert not list(place.glob(".bad*"))


def test_models_that_do_not_fit_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "vocab_size": 200})).save_pretrained(tmp_path / "s")
    for position, folder, message in (
        (1, tmp_path / "s", "its vocabulary has 200 tokens and the teacher's 300"),
        (1, tmp_path / "missing", "no such folder"),
        (2, tmp_path / "missing", "no such folder"),
    ):
        command = arguments(place, "bad")
        command[position] = str(folder)
        assert main(command) == 2
        assert message in capsys.readouterr().err
    command = arguments(place, "bad", "--teacher-top-k", "4")
    command[2] = command[1]
    assert main(command) == 2
    assert "'qwen3' is not a Mixture-of-Experts model" in capsys.readouterr().err
    assert not (place / "bad").exists()


def test_heads_of_other_families_are_handled_or_refused() -> None:
    ids = torch.arange(8)[None]
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))
    cohere = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5))
    gemma = Gemma2ForCausalLM(
        Gemma2Config(**SMALL, final_logit_softcapping=0.05, initializer_range=0.3)
    )
    for model in (granite, cohere, gemma):
        check_head(model.eval(), ids, "teacher")

    class Doubled(Qwen3ForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    with pytest.raises(UserError, match="teacher: its logits are not"):
        check_head(Doubled(Qwen3Config(**SMALL)).eval(), ids, "teacher")


def test_every_epoch_is_a_permutation(place: Path) -> None:
    tokens = PackedTokens(place / "tokens.safetensors", seed=3, items=100)
    rows = [int(tokens[i]["row"]) for i in range(100)]
    assert sorted(rows[:40]) == sorted(rows[40:80]) == list(range(40))
    assert rows[:40] != rows[40:80]
    stored = load_file(place / "tokens.safetensors")["input_ids"]
    assert torch.equal(tokens[57]["input_ids"], stored[rows[57]])
    again = PackedTokens(place / "tokens.safetensors", seed=3, items=100)
    assert int(again[99]["row"]) == rows[99]
    other = PackedTokens(place / "tokens.safetensors", seed=4, items=100)
    assert [int(other[i]["row"]) for i in range(40)] != rows[:40]


@pytest.mark.parametrize(
    ("repairs", "options", "expected"),
    [  # steps, batch, peak, floor, warm-up, decay
        # 146,304 sequences in 1,000 steps or more are 146 a step, in fours 144: 1,016 steps.
        ([], [], (1016, 144, 1e-4, 0.0, 33, 304)),
        (["refit"], [], (1016, 144, 5e-5, 0.0, 33, 304)),
        (["align", "refit"], [], (1016, 144, 2.5e-5, 0.0, 33, 304)),
        (["align"], ["--learning-rate", "1e-3"], (1016, 144, 1e-3, 0.0, 33, 304)),
        ([], ["--steps", "200"], (200, 384, 1e-4, 0.0, 6, 60)),
        ([], ["--steps", "80000"], (80000, 4, 1e-4, 0.0, 2666, 24000)),
        ([], ["--batch", "384", "--decay-steps", "38"], (381, 384, 1e-4, 0.0, 12, 38)),
    ],
)
def test_defaults_follow_from_tokens_and_student(
    repairs: list[str], options: list[str], expected: tuple[float, ...]
) -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    args = parser.parse_args(["student", "teacher", "out", "--tokens", "file", *options])
    recipe = make_recipe(args, "single", 146_304, "fp32", "float32", repairs)
    found = (
        recipe.steps,
        recipe.batch,
        recipe.learning_rate,
        recipe.min_learning_rate,
        recipe.warmup_steps,
        recipe.decay_steps,
    )
    assert found == pytest.approx(expected, abs=0)
