"""Recipes and budgets of m2d convert."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import VOCABULARY, write_tokens

import m2d
from m2d import budget as budgets
from m2d import conversion
from m2d.budget import (
    LEAST_STEPS,
    STEPS,
    Budget,
    Part,
    Speed,
    choose,
    measure_speed,
    parse_budget,
    steps_left,
)
from m2d.cli import main
from m2d.errors import UserError
from m2d.models import resume
from m2d.models.teacher import open_teacher
from m2d.recipes import RECIPES, Conversion, settled
from m2d.refit import align
from m2d.refit.align import AlignSettings

TOKENS = torch.randint(0, VOCABULARY, (40, 16), generator=torch.Generator().manual_seed(5))
STEP = AlignSettings().tokens
BEST = RECIPES["best"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30min", Budget(1800, None)),
        ("1.5h", Budget(5400, None)),
        ("90 s", Budget(90, None)),
        ("2M", Budget(None, 2_000_000)),
        ("500k", Budget(None, 500_000)),
        ("4096", Budget(None, 4096)),
    ],
)
def test_budgets_are_read(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "0min", "-3h", "3 days", "1e3x"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="30min"):
        parse_budget(text)


def test_tokens_are_counted_with_those_of_every_step() -> None:
    budget = Budget(None, 1_000_000)
    chosen = choose(budget, BEST, 256, None)
    spent = chosen.sequences * 256 + chosen.steps * STEP
    assert spent <= 1_000_000 < spent + 2 * (256 + STEP)
    assert choose(budget, Conversion(), 256, None) == choose(budget, Conversion(), 256, None)
    assert choose(budget, Conversion(), 256, None).sequences == 1_000_000 // 256
    assert choose(budget, Conversion(), 256, None).steps == 0
    with pytest.raises(UserError, match="too small"):
        choose(Budget(None, STEPS[0] * STEP), BEST, 256, None)


def test_more_time_gives_more_tokens_and_never_too_many() -> None:
    speed = Speed(Part(8.0, 8e-5), Part(2.0, 2e-5), step=0.1)
    last = 0
    for seconds in (20.0, 60.0, 600.0, 10_000.0):
        chosen = choose(Budget(seconds, None), BEST, 64, speed)
        assert chosen.seconds == pytest.approx(speed.seconds(chosen.sequences * 64, chosen.steps))
        assert chosen.seconds <= seconds
        assert chosen.sequences >= last
        assert STEPS[0] <= chosen.steps <= STEPS[1]
        last = chosen.sequences
    with pytest.raises(UserError, match="about 14 s are needed"):
        choose(Budget(5.0, None), BEST, 64, speed)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_probe_measures(recipe: str, tiny_teacher: Path) -> None:
    teacher = open_teacher(tiny_teacher)
    options = (TOKENS, 4, 32, torch.float32, torch.device("cpu"))
    speed = measure_speed(teacher, RECIPES[recipe], *options)
    assert speed.before.fixed > 0
    assert speed.before.token > 0
    for number in (speed.step, speed.align.fixed, speed.align.token):
        assert (number > 0) == (recipe == "best")


def test_alignment_gets_the_rest_of_the_time() -> None:
    speed = Speed(Part(10.0, 0.1), Part(5.0, 0.05), step=0.5)  # 100 tokens: 20 s, then 10 s
    # As fast as predicted: of 95 s, 25 are gone and 10 are for the pass; 60 s are 120 steps.
    assert steps_left(100.0, speed, 100, 25.0, 20.0) == 120
    # Half as fast: the 50 s that are left are worth 25; 10 for the pass, 15 for 30 steps.
    assert steps_left(100.0, speed, 100, 45.0, 40.0) == 30
    assert steps_left(100.0, speed, 100, 99.0, 20.0) == LEAST_STEPS
    assert steps_left(10_000.0, speed, 100, 25.0, 20.0) == STEPS[1]


def test_a_killed_run_goes_on_with_its_choice(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Killed before and within alignment, of which the time is then no longer measured."""
    file, out = tmp_path / "tokens.safetensors", tmp_path / "out"
    write_tokens(file, TOKENS, {})
    words = ["convert", str(tiny_teacher), str(out), "--budget", "1h", "--tokens", str(file)]
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "refit_student", Mock(side_effect=KeyboardInterrupt))
        assert main(words) == 130
    (kept,) = tmp_path.glob(".out.layers-*/budget.json")
    chosen = json.loads(kept.read_text())
    monkeypatch.setattr(budgets, "measure_speed", Mock(side_effect=AssertionError))
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(align, "rewrite_student", Mock(side_effect=KeyboardInterrupt))
        assert main(words) == 130
    with monkeypatch.context() as patch:  # every layer is there
        patch.setattr(align, "fit_block", Mock(side_effect=AssertionError))
        assert main(words) == 0
    assert "going on with what an earlier run has chosen" in capsys.readouterr().err
    about = json.loads((out / "m2d.json").read_text())
    assert about["calibration"]["sequences"] == len(TOKENS) <= chosen["sequences"]
    assert about["align"]["steps"] == chosen["steps"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_convert_keeps_to_a_budget(
    tiny_teacher: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "tokens.safetensors"
    write_tokens(file, TOKENS, {})
    budget = 10 * 16 + STEPS[0] * STEP
    words = ["convert", str(tiny_teacher), str(tmp_path / "a"), "--budget", str(budget)]
    assert main([*words, "--tokens", str(file)]) == 0
    about = json.loads((tmp_path / "a" / "m2d.json").read_text())
    assert about["recipe"] == "best"
    assert about["calibration"]["sequences"] == 10
    assert about["align"]["steps"] == STEPS[0]
    assert "budget 164000" in capsys.readouterr().err
    # A budget of time that is ample for all there is, with a recipe that does not align.
    out = m2d.convert(
        tiny_teacher, tmp_path / "b", text=[tiny_text], length=16, budget="1h", recipe="paper"
    )
    about = json.loads((out / "m2d.json").read_text())
    assert about["calibration"]["sequences"] > 40
    assert "align" not in about
    with pytest.raises(UserError, match="one or the other"):
        m2d.convert(tiny_teacher, tmp_path / "c", tokens=file, budget="1h", sequences=3)


def test_options_take_the_place_of_the_recipe() -> None:
    assert settled(None, {}) == settled("paper", {}) == Conversion()
    given = settled("best", {"align": 3, "fold": None})
    assert (given.align, given.fold) == (3, BEST.fold)
    with pytest.raises(UserError, match="unknown recipe 'better'; known: paper, best"):
        settled("better", {})
