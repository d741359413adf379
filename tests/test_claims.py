"""Outputs: checked and held before anything is computed, swept, and never an input."""

import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from m2d import cli
from m2d.artifacts import parsed_json, read_json, reading, write_json
from m2d.claims import claim, claimed
from m2d.distill.checkpoints import checkpoints_in, newest_sound, seal
from m2d.distill.result import other_work
from m2d.errors import UserError
from tests.fuzz_inputs import make_sound
from tests.kills import STAGES


def refused(words: list, capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said[-1]) < 700
    return said[-1]


def test_only_one_process_holds_an_output(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    code = "import sys; from m2d.claims import claim\nwith claim(sys.argv[1]): print('held')"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

    def other(name: Path) -> subprocess.CompletedProcess:
        words, environment = [sys.executable, "-c", code, name], {**os.environ, "PYTHONPATH": path}
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    with claim(out):
        assert "another process is writing it" in other(out).stderr
        assert other(out.with_name("out2")).stdout == "held\n"
        with pytest.raises(UserError, match="another process"), claim(out, part="0-2"):
            pass
    with claim(out, part="0-2"):
        with claim(out, part="1-2"):  # of one folder, two shares
            pass
        for part in ("", "0-2"):
            with pytest.raises(UserError, match="another process"), claim(out, part=part):
                pass
    assert not out.parent.exists()  # it was made for nothing
    assert other(out).stdout == "held\n"


def test_what_dead_runs_left_is_swept(tmp_path: Path) -> None:
    for name in (".run[1].abc.partial", ".run1.abc.partial", ".run[1].x.abc.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".run[1].lock").touch()
    with claim(tmp_path / "run[1]"):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".run1.abc.partial", ".run[1].lock"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".run1.abc.partial"]


def test_what_a_run_left_that_was_killed_at_its_end_is_swept(tmp_path: Path) -> None:
    """The output is there, so the same command is refused: its lock goes all the same."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / ".run.lock").touch()
    (tmp_path / ".run.abc.partial").touch()
    arguments = argparse.Namespace(command="merge", out=tmp_path / "run")
    with pytest.raises(UserError, match="exists already"), claimed(arguments):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_inputs_are_not_overwritten(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "T"
    model.mkdir()
    for file in tiny_teacher.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text("words " * 400)
    before = {file: file.read_bytes() for file in [*model.iterdir(), tmp_path / "text.txt"]}
    text = ["--text", tmp_path / "text.txt"]
    for out in ("model.safetensors", "tokenizer.json", "config.json"):
        words = ["tokenize", model, model / out, *text]
        assert "belongs to the model" in refused(words, capsys)
    said = refused(["tokenize", model, tmp_path / "text.txt", *text], capsys)
    assert "is an input too" in said
    assert {file: file.read_bytes() for file in before} == before


def test_outputs_that_cannot_be_written_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Before the inputs are looked at: those here are not there."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for out, says in (
        (tmp_path / "link", "is a link to nothing"),
        (tmp_path / "folder", "is a folder; name a file in it"),
        (tmp_path / "pipe", "is no regular file"),
        (Path("/dev/null"), "is no regular file"),
        (tmp_path / "file" / "below", "cannot be written (Not a directory)"),
        (Path("/proc/none/out"), "cannot be written"),
        (tmp_path / ("x" * 250), "a name of 250 bytes; at most"),
    ):
        assert says in refused(["tokenize", "none", out, "--text", "none"], capsys)
    said = refused(["merge", "none", tmp_path / "file", "--plan", "none"], capsys)
    assert "exists already" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link", "pipe"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/x/out"), "/x/out: No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (MemoryError(), "not enough memory"),
        (RecursionError(), "nested too deeply"),
        (RuntimeError("[enforce fail] can't allocate memory: 8 bytes"), "not enough memory"),
        (BrokenProcessPool("A process in the pool was terminated"), "most likely because memory"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: BaseException, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    def fails(_: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr("m2d.tokens.tokenize.main", fails)
    words = ["tokenize", "T", tmp_path / "out", "--text", "none"]
    assert says in refused(words, capsys)


def test_messages_have_a_bounded_length(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(["inspect", "x" * 5000 + "\n" + "y" * 5000], capsys)
    assert "\n" not in said


def test_several_processes_of_one_command_hold_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(out=tmp_path / "out", command="distill")
    with claimed(args):
        monkeypatch.setenv("RANK", "1")
        with claimed(args):
            pass


def test_json_that_hurts_is_one_line(tmp_path: Path) -> None:
    for content, says in (
        ("[" * 10**5, "nested too deeply"),
        ("1" * 10**5, "not readable as JSON"),
        ('{"a": 1', "not readable as JSON"),
        ('["\\ud800"]', "half a surrogate pair"),
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=says) as caught:
            read_json(tmp_path / "a.json")
        assert len(str(caught.value)) < 600
    (tmp_path / "a.json").write_text('\ufeff{"a": NaN}')
    assert len(read_json(tmp_path / "a.json")) == 1
    with pytest.raises(UserError, match="it holds NaN"):
        parsed_json(tmp_path / "a.json", constants=False)
    os.mkfifo(tmp_path / "b.json")
    with pytest.raises(UserError, match="not a regular file"):
        read_json(tmp_path / "b.json")


def make_checkpoint(work: Path, step: int) -> Path:
    folder = work / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    for name in ("student.pt", "optimizer.pt", "scheduler.pt", "deep/rank0.pt"):
        (folder / name).write_bytes(f"{name} {step}".encode() * 100)
    seal(folder)
    return folder


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "seal"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old, new = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-x").mkdir()
    assert checkpoints_in(tmp_path) == [old, new]
    assert newest_sound(tmp_path) == new
    for folder in (new, old):
        file = folder / "optimizer.pt"
        if damage == "missing":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:-1])
        elif damage == "flipped":
            file.write_bytes(b"X" + file.read_bytes()[1:])
        else:
            (folder / "files.json").write_text("[1]")
        if folder == new:
            assert newest_sound(tmp_path) == old
            assert "going on from the one before" in capsys.readouterr().err
            assert not new.exists()
    with pytest.raises(UserError, match="its checkpoints are damaged or incomplete; remove it"):
        newest_sound(tmp_path)
    assert newest_sound(tmp_path / "none") is None


def test_the_work_of_other_outputs_is_left_alone(tmp_path: Path) -> None:
    own = tmp_path / ".run[1].checkpoints-0123456789ab"
    names = (own.name, ".run1.checkpoints-0123456789ab", ".run[1].checkpoints-x.checkpoints-1")
    for name in names:
        (tmp_path / name).mkdir()
    assert other_work(tmp_path / "run[1]", tmp_path / "none") == [own]
    assert other_work(tmp_path / "run[1]", own) == []


def test_written_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ü": [1, None]}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, tokens, statistics and a student, for commands that then find the disk full."""
    place, back = tmp_path_factory.mktemp("small"), Path.cwd()
    try:
        make_sound(place)
    finally:
        os.chdir(back)
    return place


@pytest.mark.parametrize(
    "stage", ["stats", "gram", "neurons", "merge", "grid", "teacher-logits", "distill", "tables"]
)
def test_a_disk_that_takes_no_more_is_one_line(
    stage: str, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Files may grow to 600 bytes: a library written in Rust, C++ or Python meets it."""
    monkeypatch.chdir(small_run)
    out = tmp_path / "out"
    words = [str(out) if word == "out" else word for word in STAGES[stage]]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        code = cli.main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2
    assert len(said) == 1
    assert "File too large" in said[0]
    assert stage == "teacher-logits" or not out.exists()  # which others may be adding shards to
    assert not list(tmp_path.glob(".out.*.partial"))
    assert cli.main(words) == 0  # with room again, the same command does it


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ImportError("libx.so: failed to map segment\nmore"), "(libx.so: failed to map segment);"),
        (MemoryError(), "its libraries cannot be loaded; is there too little memory for them?"),
        (ModuleNotFoundError("No module named 'm2d.x'", name="m2d.x"), None),
    ],
)
def test_libraries_that_cannot_be_loaded_are_one_line(
    error: ImportError | MemoryError, line: str | None
) -> None:
    reason = cli.not_loaded(error)
    assert reason is None if line is None else line in str(reason)


def test_too_little_memory_is_not_the_files_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(MemoryError), reading(tmp_path / "a.json", "readable as JSON"):
        raise MemoryError
