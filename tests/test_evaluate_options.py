"""Options of `m2d evaluate`: what reaches lm-eval, what is written, and what is refused."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_teacher
from evaluation_data import make_dataset, winogrande, words, write_split

from m2d import cli
from m2d.errors import UserError
from m2d.evaluate.lm_eval import evaluate
from m2d.models.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("own_cache")


def test_same_evaluation_same_file_without_local_paths(tmp_path: Path, scored_model: Path) -> None:
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 6, "validation": 4})
    arguments = ["evaluate", str(scored_model), "--task", "winogrande", "--shots", "2"]
    arguments += ["--datasets", str(tmp_path), "--batch-size", "4", "--device", "cpu"]
    outs = [tmp_path / "one.json", tmp_path / "two.json"]
    for out in outs:
        assert cli.main([*arguments[:2], str(out), *arguments[2:]]) == 0
    texts = [out.read_text(encoding="utf-8") for out in outs]
    assert texts[0] == texts[1]
    result = json.loads(texts[0])
    assert result["config"].pop("model_args")["pretrained"] == str(scored_model)
    rest = json.dumps({key: value for key, value in result.items() if key != "model_name"})
    assert sys.prefix not in rest
    assert str(tmp_path) not in rest


def test_several_tasks_from_yaml_of_ones_own(tmp_path: Path, scored_model: Path) -> None:
    rng = random.Random(1)
    items = [
        {"context": words(rng, 3), "choices": [words(rng, 1), words(rng, 2)], "answer": 1}
        for _ in range(5)
    ]
    tasks = tmp_path / "tasks"
    write_split(tasks, "own", items)
    for name in ("own_a", "own_b"):
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            "dataset_kwargs:\n  data_files:\n    test: own.jsonl\n"
            "test_split: test\noutput_type: multiple_choice\n"
            'doc_to_text: "{{context}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n',
            encoding="utf-8",
        )
    out = tmp_path / "out"
    options = ["--include", str(tasks), "--shots", "0", "--batch-size", "4", "--device", "cpu"]
    options += ["--task", "own_a", "--task", "own_b", "--limit", "3"]
    assert cli.main(["evaluate", str(scored_model), str(out), *options]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["own_a.json", "own_b.json"]
    result = json.loads((out / "own_b.json").read_text(encoding="utf-8"))
    assert result["n-samples"]["own_b"] == {"original": 5, "effective": 3}


def test_batch_size_is_found_and_stdout_stays_clean(
    tmp_path: Path, scored_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 3, "validation": 4})
    options = {"shots": 1, "datasets": tmp_path, "dtype": "float32", "device": "cpu"}
    found = evaluate(str(scored_model), ["winogrande"], **options)["winogrande"]
    fixed = evaluate(str(scored_model), ["winogrande"], batch_size="1", **options)["winogrande"]
    assert found["model_fingerprint"] == fingerprint(Path(scored_model))
    assert (found["dtype"], found["computed_on"]["device"]) == ("float32", "cpu")
    assert found["config"]["batch_size"] == "auto"
    assert found["config"]["batch_sizes"]
    assert found["results"] == fixed["results"]
    assert capsys.readouterr().out == ""


def recorded(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[tuple[dict, dict]]:
    """What that backend of lm-eval will be given; in its place stands hf."""
    import lm_eval.api.registry

    hf = lm_eval.api.registry.get_model("hf")
    given = []

    class Recorder:
        @staticmethod
        def create_from_arg_obj(arguments: dict, others: dict) -> object:
            given.append((arguments, others))
            plain = {key: arguments[key] for key in ("pretrained", "dtype")}
            return hf.create_from_arg_obj(plain, {"batch_size": "4", "device": "cpu"})

    def get_model(name: str) -> type:
        return {backend: Recorder}[name]

    monkeypatch.setattr(lm_eval.api.registry, "get_model", get_model)
    return given


def test_what_the_vllm_backend_is_given(
    tmp_path: Path, scored_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm itself needs a GPU: in its place stands the hf backend, which records its arguments."""
    given = recorded(monkeypatch, "vllm")
    # Of vllm alone: other libraries look for their hardware in the same way.
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: object() if name == "vllm" else find(name, *rest),
    )
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 3, "validation": 4})
    options = ["--backend", "vllm", "--shots", "0", "--datasets", str(tmp_path)]
    options += ["--model-arg", "tensor_parallel_size=4", "--model-arg", "quantization=fp8"]
    out = tmp_path / "out.json"
    task = ["--task", "winogrande", "--dtype", "bfloat16"]
    assert cli.main(["evaluate", str(scored_model), str(out), *task, *options]) == 0
    assert [arguments | others for arguments, others in given] == [
        {
            "pretrained": str(scored_model),
            "dtype": "bfloat16",
            "tensor_parallel_size": 4,
            "quantization": "fp8",
            "batch_size": "auto",
            "max_batch_size": None,
            "device": None,
        }
    ]
    assert json.loads(out.read_text(encoding="utf-8"))["config"]["model"] == "vllm"


@pytest.mark.parametrize(("gpus", "more"), [(1, {}), (2, {"parallelize": True})])
def test_a_model_is_spread_over_several_gpus(
    tmp_path: Path, scored_model: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, more: dict
) -> None:
    given = recorded(monkeypatch, "hf")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("m2d.devices.pick_device", lambda _: torch.device("cpu"))
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 3, "validation": 4})
    evaluate(str(scored_model), ["winogrande"], shots=0, datasets=tmp_path)
    assert [arguments for arguments, _ in given] == [
        {"pretrained": str(scored_model), "dtype": "float32", **more}
    ]


def test_a_folder_for_one_dataset(tmp_path: Path, scored_model: Path) -> None:
    make_dataset(tmp_path / "any/where", winogrande, {"train": 3, "validation": 4})
    options = ["--task", "winogrande", "--shots", "1", "--batch-size", "4", "--device", "cpu"]
    options += ["--dataset", f"allenai/winogrande={tmp_path / 'any/where'}"]
    out = tmp_path / "out.json"
    assert cli.main(["evaluate", str(scored_model), str(out), *options]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["n-samples"]["winogrande"]["effective"] == 4


@pytest.mark.parametrize("task", ["winogrande", "wikitext"])
def test_without_network_and_data_one_line_says_what_is_missing(
    tmp_path: Path, scored_model: Path, task: str
) -> None:
    """In a process of its own: whether the hub is offline is read when `datasets` is imported."""
    command = [
        sys.executable,
        "-m",
        "m2d.cli",
        "evaluate",
        str(scored_model),
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(
        [*command, "--task", task],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    name = {"winogrande": "allenai/winogrande", "wikitext": "EleutherAI/wikitext_document_level"}
    assert len(lines) == 1
    assert f"dataset {name[task]}" in lines[0]
    assert f"--dataset {name[task]}=FOLDER/{name[task]}" in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_too_many_examples_are_refused(tmp_path: Path, scored_model: Path) -> None:
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 3, "validation": 4})
    with pytest.raises(UserError, match="winogrande has only 3 examples"):
        evaluate(str(scored_model), ["winogrande"], shots=4, datasets=tmp_path)
    for split in ("train", "validation", "test"):
        write_split(tmp_path / "wikitext_document_level", split, [{"page": "a b"}])
    with pytest.raises(UserError, match="wikitext takes no examples"):
        evaluate(str(scored_model), ["wikitext"], shots=5, datasets=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["hellaswagg"]}, "no such task; did you mean hellaswag"),
        ({"tasks": ["hellaswag", "../../escaped"]}, "--task '../../escaped': is no task's name"),
        ({"tasks": ["/tmp/escaped"]}, "--task '/tmp/escaped': is no task's name"),
        ({"tasks": ["hellaswag"]}, "dataset Rowan/hellaswag is not available"),
        ({"model": "/no/such/folder"}, "no such folder; give a model folder or a hub id"),
        ({"model": "."}, "no config.json in it"),
        ({"include": "/no/such/folder"}, "--include /no/such/folder: no such folder"),
        ({"datasets": "/no/such/folder"}, "--datasets /no/such/folder: no such folder"),
        ({"dataset_folders": {"a/b": "/no/such"}}, "--dataset a/b=/no/such: no such folder"),
        ({"backend": "vllm"}, "vllm is not installed"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, scored_model: Path, changes: dict, message: str
) -> None:
    settings = {
        "model": str(scored_model),
        "tasks": ["hellaswag"],
        "datasets": str(tmp_path),
        **changes,
    }
    with pytest.raises(UserError, match=message) as caught:
        evaluate(**settings)
    assert "\n" not in str(caught.value)


def test_a_task_named_like_a_path_writes_nothing_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though a definition of that name is there, which lm-eval takes."""
    model, own = make_teacher(tmp_path / "model"), tmp_path / "own"
    own.mkdir()
    (own / "escaped.yaml").write_text("task: ../../escaped\ndataset_path: json\n", encoding="utf-8")
    out = tmp_path / "a" / "b" / "out"
    out.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    words = ["evaluate", str(model), str(out), "--include", str(own), "--task", "hellaswag"]
    assert cli.main([*words, "--task", "../../escaped"]) == 2
    assert "--task '../../escaped': is no task's name" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
