"""Bad input: one line, exit code 2, nothing written. Start-up without torch."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_teacher, write_tokens
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from m2d import cli


def refused(words: list, out: Path, capsys: pytest.CaptureFixture) -> str:  # type: ignore[type-arg]
    """Run, expect exit code 2 and one line on stderr, and nothing left where `out` would be."""
    before = sorted(out.parent.iterdir())
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert sorted(out.parent.iterdir()) == before
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def convert(teacher: object, out: Path, text: Path, *more: object) -> list:  # type: ignore[type-arg]
    size = ["--sequences", 2, "--length", 8]
    return ["convert", teacher, out, "--text", text, *size, *more]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "student"


def test_a_missing_teacher(out, tiny_text, capsys, tmp_path) -> None:
    assert "no such folder" in refused(convert(tmp_path / "no", out, tiny_text), out, capsys)


def test_a_hub_id_that_cannot_be_had(out, tiny_text, capsys) -> None:
    assert "owner/name" in refused(convert("owner/name", out, tiny_text), out, capsys)


def test_a_folder_that_is_no_model(out, tiny_text, capsys, tmp_path) -> None:
    assert "config.json: no such file" in refused(convert(tmp_path, out, tiny_text), out, capsys)


def test_a_dense_teacher(out, tiny_text, capsys, tmp_path) -> None:
    config = Qwen3Config(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, intermediate_size=16,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    line = refused(convert(tmp_path / "dense", out, tiny_text), out, capsys)
    assert "qwen3" in line


def test_a_teacher_without_sparse_layers(out, tiny_text, capsys, tmp_path) -> None:
    folder = make_teacher(tmp_path / "t", mlp_only_layers=[0, 1])
    line = refused(convert(folder, out, tiny_text), out, capsys)
    assert "no layer has experts" in line


def test_an_unknown_architecture(out, tiny_text, capsys, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    line = refused(convert(tmp_path, out, tiny_text), out, capsys)
    assert "'nonesuch'" in line


def test_code_in_a_checkpoint_is_not_run(out, tiny_text, capsys, tmp_path) -> None:
    """A config that asks for its own modelling code is read as the stock class it names."""
    folder = make_teacher(tmp_path / "t")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert cli.main([str(word) for word in convert(folder, out, tiny_text)]) == 0
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--scoring", "gld_raep", "did you mean gld_reap"),
        ("--grouping", "nearest", "round_robin"),
        ("--scaling", "none", "proportional"),
        ("--keep", "1", "must lie between 2"),
        ("--keep", "9", "and 8"),
        ("--keep", "x", "whole number"),
        ("--dtype", "int8", "invalid choice"),
        ("--device", "quantum", "not available"),
        ("--sequences", "100000", "give more text"),
    ],
)
def test_bad_options(tiny_teacher, out, tiny_text, capsys, option, value, says) -> None:
    words = [*convert(tiny_teacher, out, tiny_text), option, value]
    assert says in refused(words, out, capsys)


def test_an_out_that_exists_is_left_as_it_was(tiny_teacher, out, tiny_text, capsys) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert "exists" in refused(convert(tiny_teacher, out, tiny_text), out, capsys)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("cut", ["truncated", "missing", "garbage"])
def test_an_unreadable_shard(tiny_teacher, out, tiny_text, capsys, tmp_path, cut) -> None:
    folder = tmp_path / "t"
    shutil.copytree(tiny_teacher, folder)
    shard = folder / "model.safetensors"
    if cut == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:5000] if cut == "truncated" else b"\xff" * 5000)
    assert "model.safetensors" in refused(convert(folder, out, tiny_text), out, capsys)


def test_token_ids_outside_the_vocabulary(tiny_teacher, out, capsys, tmp_path) -> None:
    write_tokens(tmp_path / "c.safetensors", torch.full((2, 8), 300), {})
    words = ["convert", tiny_teacher, out, "--tokens", tmp_path / "c.safetensors"]
    assert "token id 300 is outside the model's vocabulary of 300" in refused(words, out, capsys)


@pytest.mark.parametrize(
    "tensors",
    [
        {"tokens": torch.zeros(2, 8, dtype=torch.long)},
        {"input_ids": torch.zeros(8, dtype=torch.long)},
        {"input_ids": torch.zeros(2, 8)},
    ],
)
def test_a_file_that_holds_no_tokens(tiny_teacher, out, capsys, tmp_path, tensors) -> None:
    save_file(tensors, tmp_path / "c.safetensors")
    words = ["convert", tiny_teacher, out, "--tokens", tmp_path / "c.safetensors"]
    assert "input_ids" in refused(words, out, capsys)


def test_text_that_cannot_be_read(tiny_teacher, out, capsys, tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.csv").write_text("text")
    (tmp_path / "c.jsonl").write_text('{"body": 1}\n')
    for name, says in [("a.txt", "no text"), ("b.csv", "unknown kind"), ("c.jsonl", "no column"),
                       ("d.txt", "no such file")]:  # fmt: skip
        assert says in refused(convert(tiny_teacher, out, tmp_path / name), out, capsys)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from m2d.cli import build_parser; build_parser(None).format_help();"
        "assert not {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ranking_needs_no_torch() -> None:
    code = "import sys, m2d.statistics.rank; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspecting_needs_no_library_that_reads_data() -> None:
    libraries = "{'pyarrow', 'tokenizers', 'pydantic'}"
    code = f"import sys, m2d.inspect; assert not {libraries} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_kill_leaves_no_student(tiny_teacher, tiny_text, tmp_path) -> None:
    """SIGKILL while the student is being written: no folder, and a later run succeeds."""
    out = tmp_path / "student"
    code = (
        "import os, signal, sys\n"
        "from m2d.students import tensors\n"
        "make, count = tensors.StudentTensors.make, [0]\n"
        "def killing(self, name, plan):\n"
        "    count[0] += 1\n"
        "    if count[0] == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return make(self, name, plan)\n"
        "tensors.StudentTensors.make = killing\n"
        "from m2d.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = [str(word) for word in convert(tiny_teacher, out, tiny_text)]
    assert subprocess.run([sys.executable, "-c", code, *words]).returncode == -9
    assert not out.exists()
    assert cli.main(words) == 0
    assert (out / "model.safetensors").exists()


def test_a_command_that_needs_an_extra_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "snakemake", None)
    (tmp_path / "config.yaml").write_text("teachers: {}\npipelines: {}")
    assert cli.main(["estimate", "all_x", "--config", str(tmp_path / "config.yaml")]) == 2
    line = capsys.readouterr().err
    assert line == (
        "m2d estimate: error: needs snakemake, which is not installed; "
        "pip install 'm2d[workflow]'\n"
    )


def test_every_extra_is_one_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for package, extra in cli.EXTRAS.items():
        named = " ".join(project["optional-dependencies"][extra])
        assert package.replace("_kernel", "-kernel").replace("_eval", "-eval") in named


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "t", "o", "--batch", "1" + "0" * 20], "is not a whole number from 1 to 1e+12"),
        (["convert", "t", "o", "--batch", "٠"], "is not a whole number from 1 to"),
        (["convert", "t", "o", "--keep", "a" * 5000], "is not a whole number from 1 to"),
        (["convert", "t", "o", "--student-class", "a" * 5000], "invalid choice"),
        (["baseline", "t", "o", "--kind", "random_ffn", "--seed", "-1"], "from 0 to 4294967295"),
        (["distill", "s", "t", "o", "--tokens", "f", "--seed", "4294967296"], "must be less than"),
        (["distill", "s", "t", "o", "--tokens", "f", "--steps", "1" * 30], "must be less than"),
        (["card", "s", "--out", ""], "is no name for an output"),
        (["inspect", "t", "--params", "1e400"], "is not a number such as 2.5B"),
        (["convert", "t", "o", "--alpha", "nan"], "'nan' is not a number"),
        (["fold", "t", "o", "--tokens", "f", "--alpha", "1e999"], "'1e999' is not a number"),
        (["align", "s", "t", "o", "--tokens", "f", "--learning-rate", "0"], "'0' is not above 0"),
        (["doctor", "--config", "nowhere"], "is of a target; name one"),
        (["init", "t", "--tokens", "inf"], "'inf' is no number of tokens"),
        (["init", "t", "--tokens", "1" * 400], "is no number of tokens"),
        (["stats", "t", "\udcff", "--tokens", "f"], r"'\udcff' is not UTF-8; rename it"),
        (["tables", "o", "--grid", "/dev/zero"], "/dev/zero: not a regular file or folder"),
    ],
)
def test_absurd_values_are_one_short_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert len(error) < 700


@pytest.mark.parametrize("option", ["--statistics", "--gram", "--ranking", "--plan", "--fold"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(
    option: str, tiny_teacher: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    line = refused(["merge", tiny_teacher, out, option, tmp_path / "pipe"], out, capsys)
    assert "not a regular file or folder" in line


def m2d(words: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "m2d.cli", *words], text=True, stderr=subprocess.PIPE, **more
    )


def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    done = m2d(["workflow"], stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_results_that_cannot_be_printed_are_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = m2d(["workflow"], stdout=full)
    assert done.returncode == 2
    assert re.fullmatch(r"m2d.*: error: .*No space left on device\n", done.stderr)


def test_with_closed_streams_no_file_gets_what_is_printed(tmp_path: Path) -> None:
    """The first file to be opened would be number 1, and have the lines of print."""
    (tmp_path / "text.txt").write_text("")
    words = [sys.executable, "-m", "m2d.cli", "tokenize", "nowhere", "out", "--text", "text.txt"]
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *words], cwd=tmp_path)
    assert done.returncode == 2
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]
    code = (
        "from m2d.streams import prepare_streams; prepare_streams(); import os; "
        "number = os.open('file', os.O_CREAT); print('x', flush=True); assert number == 3, number"
    )
    words = [sys.executable, "-c", code]
    subprocess.run(["sh", "-c", '"$@" <&- >&-', "sh", *words], cwd=tmp_path, check=True)
    assert (tmp_path / "file").read_text() == ""


def test_names_are_printed_in_any_encoding(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = m2d(["verify", "schön"], env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "m2d verify: error: sch\\xf6n: no such file or folder\n"


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("when", ["import", "run"])
def test_a_signal_ends_a_command_with_its_code(number: str, code: int, when: str) -> None:
    """While its libraries are imported, which takes seconds, too."""
    where = "importlib.import_module" if when == "import" else "m2d.cli.take_gpu"
    script = (
        "import importlib, os, signal, sys, m2d.cli\n"
        # A shell's background job ignores it, and so would all that it starts.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"def hit(*_): os.kill(os.getpid(), signal.{number})\n"
        f"{where} = hit\n"
        "sys.exit(m2d.cli.main(['workflow']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "m2d", "no-such-command"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


def test_what_make_runs_as_modules_is_found() -> None:
    """`make kills` and its like do not have this folder in their path, as pytest does."""
    code = "import tests.arguments, tests.faults, tests.fuzz, tests.kills"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
