"""Passes of calibration tokens that go on, after a kill, at the last finished layer."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_teacher, write_tokens

import m2d
from m2d.cli import main
from m2d.models import resume, stream
from m2d.models.calls import Calls
from m2d.models.hidden import HiddenStates
from m2d.models.stream import StreamedTeacher
from m2d.refit.halves import SteppedModel
from m2d.refit.refit import Fitting

LAYERS = 4
TOKENS = torch.randint(0, 300, (5, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four layers, and its calibration tokens: two batches of 2 sequences and one."""
    folder = tmp_path_factory.mktemp("resume")
    make_teacher(folder / "teacher", num_hidden_layers=LAYERS)
    write_tokens(folder / "tokens.safetensors", TOKENS, {"source": "random"})
    return folder


@pytest.fixture(params=["memory", "files"])
def always_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is kept, however fast it was; hidden states in memory, or in files alone."""
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    if request.param == "files":
        monkeypatch.setattr(stream, "IN_MEMORY_BYTES", 0)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were loaded, in order."""
    seen: list[int] = []
    load = StreamedTeacher._load_layer

    def noted(self: StreamedTeacher, index: int) -> Any:
        seen.append(index)
        return load(self, index)

    monkeypatch.setattr(StreamedTeacher, "_load_layer", noted)
    return seen


def killed_at(monkeypatch: pytest.MonkeyPatch, layer: int, nth: int, words: Any) -> None:
    """Run a command that ends when its `nth` pass observes `layer`."""
    observe = StreamedTeacher._observe
    passes = iter(range(1, 100))

    def fail(self: StreamedTeacher, module: Any, index: int, visit: Any) -> None:
        if index == layer and next(passes) == nth:
            raise KeyboardInterrupt
        observe(self, module, index, visit)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedTeacher, "_observe", fail)
        assert main([str(word) for word in words]) == 130


def digests(path: Path) -> dict[str, str]:
    """Content of a file, or of a folder's files."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.usefixtures("always_kept")
@pytest.mark.parametrize("command", ["stats", "gram", "neurons", "fold"])
@pytest.mark.parametrize("layer", [1, 3])
def test_statistics_go_on_at_the_last_finished_layer(
    command: str, layer: int, place: Path, tmp_path: Path, loaded: list[int], monkeypatch: Any
) -> None:
    name = {"stats": "s.parquet"}.get(command, "s.safetensors")
    options = ["--tokens", place / "tokens.safetensors", "--batch", "2"]
    whole = [command, place / "teacher", tmp_path / "whole" / name, *options]
    assert main([str(word) for word in whole]) == 0
    words = [command, place / "teacher", tmp_path / "killed" / name, *options]
    killed_at(monkeypatch, layer, 1, words)
    assert not (tmp_path / "killed" / name).exists()
    loaded.clear()
    assert main([str(word) for word in words]) == 0
    assert loaded == list(range(layer, LAYERS))
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")  # and nothing else is left


@pytest.mark.usefixtures("always_kept")
def test_a_share_is_kept_apart(place: Path, tmp_path: Path, monkeypatch: Any, loaded: Any) -> None:
    """What one share has kept is not another's."""
    common = ["gram", place / "teacher", tmp_path / "share.safetensors"]
    common += ["--tokens", place / "tokens.safetensors", "--batch", "2", "--share"]
    killed_at(monkeypatch, 2, 1, [*common, "1/2"])
    loaded.clear()
    assert main([str(word) for word in [*common, "2/2"]]) == 0
    assert loaded == list(range(LAYERS))


@pytest.mark.usefixtures("always_kept")
@pytest.mark.parametrize(
    ("how", "nth"),
    [
        ({"scoring": "DO-ACP"}, 1),
        ({"granularity": "neurons", "choice": "greedy", "fold": "neuron"}, 1),
        ({"granularity": "neurons", "choice": "greedy", "fold": "neuron"}, 3),
    ],
)
def test_a_conversion_goes_on_within_each_of_its_passes(
    how: dict[str, str], nth: int, place: Path, tmp_path: Path, monkeypatch: Any, loaded: list[int]
) -> None:
    tokens = place / "tokens.safetensors"
    m2d.convert(place / "teacher", tmp_path / "whole", tokens=tokens, batch=2, **how)
    words = ["convert", place / "teacher", tmp_path / "killed", "--tokens", tokens, "--batch", "2"]
    words += [word for key, value in how.items() for word in (f"--{key}", value)]
    killed_at(monkeypatch, 2, nth, words)
    loaded.clear()
    assert main([str(word) for word in words]) == 0
    passes = 3 if "fold" in how else 1
    assert loaded == [2, 3, *list(range(LAYERS)) * (passes - nth)]
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("always_kept")
def test_other_arguments_begin_anew(
    place: Path, tmp_path: Path, monkeypatch: Any, loaded: list[int]
) -> None:
    out = tmp_path / "s.parquet"
    words = ["stats", place / "teacher", out, "--tokens", place / "tokens.safetensors"]
    killed_at(monkeypatch, 2, 1, [*words, "--batch", "2"])
    loaded.clear()
    assert main([str(word) for word in [*words, "--batch", "3"]]) == 0
    assert loaded == list(range(LAYERS))
    assert not list(tmp_path.glob(".*"))


def test_quick_layers_are_not_kept(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = ["stats", place / "teacher", tmp_path / "s.parquet", "--tokens"]
    words += [place / "tokens.safetensors"]
    killed_at(monkeypatch, 3, 1, words)
    assert not list(tmp_path.glob(".s.parquet*"))


def test_states_in_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    states = HiddenStates(3, torch.device("cpu"))
    states.plan([(2, 5, 4), (2, 5, 4), (1, 5, 4)], torch.bfloat16)
    states.keep_in(tmp_path, "hidden", limit=0)
    first = [torch.randn(b, 5, 4).bfloat16() for b in (2, 2, 1)]
    for i, batch in enumerate(first):
        states[i] = batch
    assert all(torch.equal(a, b) for a, b in zip(states, first, strict=True))
    kept = states.keep()
    for _ in range(3):  # later layers, not kept, leave what was kept alone
        states.next_layer()
        for i in range(3):
            states[i] = states[i] + 1
    assert torch.equal(states[2], first[2] + 1 + 1 + 1)
    states.close()
    again = HiddenStates(3, torch.device("cpu"))
    again.plan([(2, 5, 4), (2, 5, 4), (1, 5, 4)], torch.bfloat16)
    again.keep_in(tmp_path, "hidden", limit=0)
    again.restore(kept)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    # two files of one state per token each, however many layers
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 2 * 5 * 5 * 4 * 2
    with pytest.raises(ValueError, match="a layer gives"):
        again[0] = first[0].float()


def killed_while_refitting(monkeypatch: pytest.MonkeyPatch, layer: int, words: Any) -> None:
    """Run a command that ends when its refit loads the teacher's `layer`."""
    load = SteppedModel.load

    def fail(self: SteppedModel, index: int) -> Any:
        if index == layer:
            raise KeyboardInterrupt
        return load(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(SteppedModel, "load", fail)
        assert main([str(word) for word in words]) == 130


@pytest.mark.parametrize("variant", ["layer", "sequential"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_refit_goes_on_at_the_last_finished_layer(
    variant: str, layer: int, place: Path, tmp_path: Path, loaded: list[int], monkeypatch: Any
) -> None:
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    tokens = place / "tokens.safetensors"
    student = m2d.convert(place / "teacher", tmp_path / "student", tokens=tokens)
    options = ["--tokens", tokens, "--batch", "2", "--variant", variant]
    whole = ["refit", student, place / "teacher", tmp_path / "whole", *options]
    assert main([str(word) for word in whole]) == 0
    words = ["refit", student, place / "teacher", tmp_path / "killed", *options]
    killed_while_refitting(monkeypatch, layer, words)
    assert not (tmp_path / "killed").exists()
    loaded.clear()
    assert main([str(word) for word in words]) == 0
    assert loaded == [index for index in range(layer, LAYERS) for _ in ("teacher", "student")]
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "stage", [["refit", "--variant", "layer"], ["refit"], ["align", "--steps", "3"]]
)
def test_where_layers_hand_on_more_only_the_fitting_is_not_repeated(
    stage: list[str], place: Path, tmp_path: Path, loaded: list[int], monkeypatch: Any
) -> None:
    """Such as an index of tokens that later layers attend to, which is not kept."""
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(Calls, "between_layers", True)
    tokens = place / "tokens.safetensors"
    student = m2d.convert(place / "teacher", tmp_path / "student", tokens=tokens)
    words = [student, place / "teacher", "--tokens", tokens, "--batch", "2", *stage[1:]]
    assert main([stage[0], *map(str, [*words[:2], tmp_path / "whole", *words[2:]])]) == 0
    killed = [stage[0], *words[:2], tmp_path / "killed", *words[2:]]
    killed_while_refitting(monkeypatch, 2, killed)
    fitted: list[int] = []
    solve = Fitting.solve

    def noted(self: Fitting, index: int, *others: Any) -> Any:
        fitted.append(index)
        return solve(self, index, *others)

    monkeypatch.setattr(Fitting, "solve", noted)
    loaded.clear()
    assert main([str(word) for word in killed]) == 0
    assert len(fitted) == 2
    assert loaded == [index for index in range(LAYERS) for _ in ("teacher", "student")]
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_conversion_goes_on_within_its_refit(
    place: Path, tmp_path: Path, monkeypatch: Any, loaded: list[int]
) -> None:
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    tokens = place / "tokens.safetensors"
    how: Any = {"refit": "sequential", "grouping": "RR", "keep": 4}
    m2d.convert(place / "teacher", tmp_path / "whole", tokens=tokens, batch=2, **how)
    words = ["convert", place / "teacher", tmp_path / "killed", "--tokens", tokens, "--batch", "2"]
    words += ["--refit", "sequential", "--keep", "4", "--grouping"]
    killed_while_refitting(monkeypatch, 2, [*words, "RR"])
    # What another student's refit has kept is not gone on with.
    loaded.clear()
    with monkeypatch.context() as patch:
        patch.setattr("m2d.conversion.remove_kept", lambda _: None)
        assert main([str(word) for word in [*words, "WC"]]) == 0
    # The first layer is looked at before any pass, whether its kind can be refitted.
    assert loaded == [0, *(index for index in range(LAYERS) for _ in ("teacher", "student"))]
    shutil.rmtree(tmp_path / "killed")
    loaded.clear()
    assert main([str(word) for word in [*words, "RR"]]) == 0
    assert loaded == [0, *(index for index in range(2, LAYERS) for _ in ("teacher", "student"))]
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))
