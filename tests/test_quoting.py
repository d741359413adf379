"""Values of the config reach commands as they are: nothing is split, and nothing is run.

A stub in the place of every command writes down its words, so that each rule is seen.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config
from workflow_project import CONFIG, make_project, make_stub, snakemake, write_config

pytestmark = pytest.mark.timeout(600)

EVIL = "$(touch ran)teacher `touch ran`; touch ran & 'touch ran' (v2)"
PIPELINES = ["all_tiny", "all_solved", "all_stored", "all_other"]


END = "end of a call"


def words_told(stub: Path) -> list[list[str]]:
    """The words of every call of the stub, in order."""
    calls: list[list[str]] = [[]]
    for word in (stub / "words").read_text().split("\0"):
        calls[-1].append(word)
        if word == END:
            calls[-1].pop()
            calls.append([])
    return calls[:-1]


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub that also writes down its words, and makes rankings and tasks of nothing too."""
    stub = make_stub(tmp_path / "bin")
    monkeypatch.setenv("M2D_STUB_WORDS", str(stub / "words"))
    text = (stub / "m2d").read_text()
    more = 'rank | combine) echo "{}" > "$2" ;;\n    demo) mkdir "$4" ;;'
    text = text.replace("case $1 in", f"case $1 in\n    {more}")
    record = f"printf '%s\\0' \"$@\" '{END}' >>\"$M2D_STUB_WORDS\""
    (stub / "m2d").write_text(text.replace("#!/bin/sh", f"#!/bin/sh\n{record}"))
    return stub


def hostile_config(teacher: str, text: str, results: str) -> dict[str, Any]:
    """The tests' config with these paths, and a student of every further rule."""
    config = copy.deepcopy(CONFIG)
    config["results"] = results
    config["datasets"]["text"]["files"] = [text]
    config["datasets"]["more"] = {"files": [text]}
    config["datasets"]["mixed"] = {"mix": {"text": 1, "more": 2}}
    config["teachers"]["tiny"]["model"] = teacher
    config["teachers"]["tiny"]["tokens"]["distillation"]["dataset"] = "mixed"
    shared = {**config["teachers"]["tiny"], "batch": 4, "shares": 2}
    config["teachers"]["dense"] = {
        k: v for k, v in shared.items() if k not in ("experts", "top_k", "keeps")
    } | {"model": f"{teacher} dense"}
    config["teachers"]["shared"] = shared
    sizes = {"layers": 1, "hidden_size": 24, "heads": 2, "kv_heads": 2, "intermediate_size": 20}
    config["students"] |= {"fresh": {"baseline": "random_ffn"}, "d2d": {"baseline": "d2d", **sizes}}
    config["evaluations"]["demo"] |= {
        "datasets": {"a/b": teacher},
        "model_args": {"revision": teacher},
    }
    config["pipelines"]["all_other"] = {
        "teachers": ["shared", "dense"],
        "students": ["do-acp", "fresh", "d2d"],
        "evaluations": ["demo"],
    }
    return config


@pytest.mark.parametrize("name", ["My MoE (v2)", EVIL])
def test_every_rule_hands_over_its_paths_whole(
    tmp_path: Path, recording: Path, tiny_teacher: Path, tiny_text: Path, name: str
) -> None:
    name = name.replace("/", "")
    folder = make_project(tmp_path / "my project (1)" / "p", tiny_teacher, tiny_text)
    shutil.copytree(tiny_teacher, folder / name)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "head_dim": 8}
    Qwen3Config(**settings).save_pretrained(folder / f"{name} dense")
    shutil.copyfile(tiny_text, folder / f"{name}.txt")
    write_config(folder, hostile_config(name, f"{name}.txt", f"{name} results"))
    shutil.copytree(folder / "results", folder / f"{name} results")
    snakemake(folder, *PIPELINES, stub=recording)
    told = words_told(recording)
    commands = {words[0] for words in told}
    assert commands >= {
        "tokenize", "stats", "gram", "combine", "rank", "merge", "neurons", "prune", "baseline",
        "refit", "distill", "teacher-logits", "perplexity", "evaluate", "tables", "figures", "card",
    }  # fmt: skip
    for words in told:
        paths = [word for word in words if "v2" in word]
        assert paths, words
        for word in paths:
            assert name in word, words
    assert not list(tmp_path.rglob("ran"))


def test_a_launcher_with_arguments_and_one_whose_path_has_blanks(tmp_path: Path) -> None:
    from m2d.errors import UserError
    from m2d.pipeline.commands import launcher_words

    assert launcher_words("bash 'my tools/launch' -x") == ["bash", "my tools/launch", "-x"]
    file = tmp_path / "my launcher"
    file.touch()
    assert launcher_words(str(file)) == [str(file)]
    with pytest.raises(UserError, match='launcher: "\'open": No closing quotation'):
        launcher_words("'open")
