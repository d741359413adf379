"""Words of earlier releases still work, or one line says what they are called now."""

from pathlib import Path

import pytest
import torch
from conftest import write_tokens

import m2d
from m2d.cli import main
from m2d.errors import UserError
from m2d.pipeline.schema import RecipeSettings
from m2d.renamed import with_new_names
from m2d.settings import checked


def test_commands_and_options(capsys: pytest.CaptureFixture) -> None:
    words = ["--debug", "outputs", "T", "OUT", "--calibration=c", "--teacher-outputs", "outputs"]
    new = ["--debug", "teacher-logits", "T", "OUT", "--tokens=c", "--teacher-logits", "outputs"]
    assert with_new_names(words) == new
    assert capsys.readouterr().err.splitlines() == [
        "m2d: outputs is now called teacher-logits",
        "m2d: --calibration is now called --tokens",
        "m2d: --teacher-outputs is now called --teacher-logits",
    ]
    assert with_new_names(new) == new
    assert capsys.readouterr().err == ""


def test_an_old_command_runs(
    tiny_teacher: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--text", str(tiny_text), "--sequences", "4", "--length", "8"]
    for name in ("calibrate", "tokenize"):
        assert main([name, str(tiny_teacher), str(tmp_path / name), *options]) == 0
    assert "calibrate is now called tokenize" in capsys.readouterr().err
    assert (tmp_path / "calibrate").read_bytes() == (tmp_path / "tokenize").read_bytes()


def test_an_old_argument_of_convert(tiny_teacher: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "c", torch.arange(32).view(4, 8), {})
    with pytest.warns(FutureWarning, match="calibration= is now called tokens="):
        out = m2d.convert(tiny_teacher, tmp_path / "s", calibration=tmp_path / "c")
    assert (out / "model.safetensors").is_file()


def test_an_old_key_of_the_config() -> None:
    with pytest.raises(UserError, match="teacher_outputs is now called teacher_logits"):
        checked(
            RecipeSettings, {"steps": 1, "learning_rate": 1, "teacher_outputs": {"kind": "top"}}
        )
