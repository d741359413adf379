"""Recipes and budgets of m2d convert."""

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, write_tokens

import m2d
from m2d.budget import STEPS, Budget, Speed, choose, measure_speed, parse_budget
from m2d.cli import main
from m2d.errors import UserError
from m2d.models.teacher import open_teacher
from m2d.recipes import RECIPES, Conversion, settled
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
    speed = Speed(fixed=10.0, token=1e-4, step=0.1)
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
    assert speed.fixed > 0
    assert speed.token > 0
    assert (speed.step > 0) == (recipe == "best")


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
