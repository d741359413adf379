"""Artifacts are bound to the teacher that made them, and to their own bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from bound import DISTILL, Run, chosen, run
from conftest import make_teacher
from family_quantized import edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from m2d.artifacts import read_json
from m2d.models.fingerprint import fingerprint

# What is mixed: the keys that are of the other teacher, and the command.
MIXTURES: dict[str, tuple[tuple[str, ...], Callable[[Run, Path], list[Any]]]] = {
    "rank, gram": (
        ("gram",),
        lambda r, o: ["rank", o, "--statistics", r["stats"], "--gram", r["gram"], "--scoring=SF"],
    ),
    "merge, statistics": (("stats",), lambda r, o: ["merge", r["teacher"], o, *chosen(r)]),
    "merge, gram": (("gram",), lambda r, o: ["merge", r["teacher"], o, *chosen(r)]),
    "merge, ranking": (("rank",), lambda r, o: ["merge", r["teacher"], o, *chosen(r)]),
    "merge, all three": (
        ("stats", "gram", "rank"),
        lambda r, o: ["merge", r["teacher"], o, *chosen(r)],
    ),
    "merge, neurons": (
        ("neurons",),
        lambda r, o: [
            "merge",
            r["teacher"],
            o,
            "--neurons",
            r["neurons"],
            "--width",
            20,
            "--multiple",
            4,
        ],
    ),
    "merge, plan": (("plan",), lambda r, o: ["merge", r["teacher"], o, "--plan", r["plan"]]),
    "merge, fold": (
        ("fold",),
        lambda r, o: ["merge", r["teacher"], o, *chosen(r), "--fold", r["fold"]],
    ),
    "grid, ranking": (
        ("rank",),
        lambda r, o: ["grid", r["teacher"], o, *chosen(r)[:6], "--tokens", r["tokens"]],
    ),
    "grid, all three": (
        ("stats", "gram", "rank"),
        lambda r, o: ["grid", r["teacher"], o, *chosen(r)[:6], "--tokens", r["tokens"]],
    ),
    "refit": (
        ("student",),
        lambda r, o: ["refit", r["student"], r["teacher"], o, "--tokens", r["tokens"]],
    ),
    "align": (
        ("student",),
        lambda r, o: ["align", r["student"], r["teacher"], o, "--tokens", r["tokens"]],
    ),
    "distill": (
        ("student",),
        lambda r, o: ["distill", r["student"], r["teacher"], o, "--tokens", r["tokens"], *DISTILL],
    ),
    "distill, refitted": (
        ("refit",),
        lambda r, o: ["distill", r["refit"], r["teacher"], o, "--tokens", r["tokens"], *DISTILL],
    ),
    "distill, stored logits": (
        ("logits",),
        lambda r, o: [
            *("distill", r["student"], r["teacher"], o, "--tokens", r["tokens"], *DISTILL),
            *("--teacher-logits", r["logits"]),
        ],
    ),
    "teacher-logits, resumed": (
        ("teacher",),
        lambda r, o: [
            *("teacher-logits", r["teacher"], r["logits"], "--tokens", r["tokens"]),
            *("--dtype", "float32", "--rows", 4),
        ],
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_two_teachers_of_one_shape_is_refused(
    name: str, both_runs: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = both_runs
    keys, command = MIXTURES[name]
    mixed = ours | {key: theirs[key] for key in keys}
    out = tmp_path / "out.parquet"
    assert run(*command(mixed, out)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fingerprint" in error
    assert len(error) < 500
    assert not out.exists()


FROM_TEACHER = ("{student}", "{teacher}", "{out}", "--tokens", "{tokens}")
OF_STUDENTS: dict[str, tuple[Any, ...]] = {
    "refit": FROM_TEACHER,
    "align": FROM_TEACHER,
    "distill": (*FROM_TEACHER, *DISTILL),
    "perplexity": ("{student}", "--tokens", "{tokens}"),
    "evaluate": ("{student}", "{out}", "--task", "arc_easy"),
    "export": ("{student}", "{out}.gguf", "--converter", "{script}"),
    "teacher-logits": ("{student}", "{out}", "--tokens", "{tokens}"),
}


@pytest.mark.parametrize("command", OF_STUDENTS)
def test_a_student_with_weights_of_another_is_refused(
    command: str,
    both_runs: tuple[Run, Run],
    own_run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("m2d.evaluate.lm_eval._load_task", lambda *_: [])
    theirs = both_runs[1]["student"] / "model.safetensors"
    shutil.copy(theirs, own_run["student"] / "model.safetensors")
    places = own_run | {"out": own_run["student"].parent / "out", "script": Path(__file__)}
    assert run(command, *(str(word).format_map(places) for word in OF_STUDENTS[command])) == 2
    assert not list(places["out"].parent.glob("out*"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.safetensors is not what m2d.json was written with" in error


def test_logits_of_another_dtype_do_not_mix(
    both_runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    one = both_runs[0]
    command = ("teacher-logits", one["teacher"], one["logits"], "--tokens", one["tokens"])
    assert run(*command, "--rows", 4, "--dtype", "bfloat16") == 2
    assert "dtype float32, not bfloat16" in capsys.readouterr().err


def test_a_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "one")
    found = fingerprint(folder)
    again = shutil.copytree(folder, tmp_path / "again")
    assert fingerprint(again) == found
    model = AutoModelForCausalLM.from_pretrained(again)
    (again / "model.safetensors").unlink()
    model.save_pretrained(again, max_shard_size="60KB")  # other files, the same tensors
    edit_config(again, transformers_version="4.57.0")
    assert fingerprint(again) == found
    tensors = load_file(folder / "model.safetensors")
    half = shutil.copytree(folder, tmp_path / "half")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, half / "model.safetensors", {"format": "pt"})
    assert fingerprint(half) != found
    changed = shutil.copytree(folder, tmp_path / "changed")
    tensors["model.layers.1.mlp.experts.7.up_proj.weight"].mul_(1.01)
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    assert fingerprint(changed) != found
    edit_config(changed, rope_theta=5.0, rope_parameters=None)
    assert fingerprint(changed) != fingerprint(folder)


def edited(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a model whose tensors `change` has gone over, in place."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tuned(tensors: dict[str, torch.Tensor]) -> None:
    """As LoRA does it: norms, routers, embeddings and all experts but one stay as they were."""
    tensors["model.layers.1.mlp.experts.5.down_proj.weight"].mul_(1.01)


def tuned_attention(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.0.self_attn.o_proj.weight"]
    weight += 0.01 * torch.randn(32, 1, generator=torch.Generator().manual_seed(3))


def narrowed(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def fused(tensors: dict[str, torch.Tensor]) -> None:
    """As transformers 5 holds experts: a tensor for all of a layer."""
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts."
        gates, ups, downs = (
            [tensors.pop(f"{path}{e}.{kind}_proj.weight") for e in range(8)]
            for kind in ("gate", "up", "down")
        )
        pairs = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        tensors[f"{path}gate_up_proj"] = torch.stack(pairs)
        tensors[f"{path}down_proj"] = torch.stack(downs)


def to_half(tensors: dict[str, torch.Tensor]) -> None:
    narrowed(tensors)
    narrowed(tensors, torch.float16)


OTHERS: dict[str, tuple[tuple[Callable[[dict[str, torch.Tensor]], Any], ...], dict, bool]] = {
    "one expert tuned": ((tuned,), {}, False),
    "attention tuned": ((tuned_attention,), {}, False),
    "attention tuned, in bfloat16": ((tuned_attention, narrowed), {}, False),
    "another rope": ((), {"rope_theta": 5.0, "rope_parameters": None}, False),
    "another rope, in bfloat16": ((narrowed,), {"rope_theta": 5.0, "rope_parameters": None}, False),
    "in bfloat16": ((narrowed,), {"dtype": "bfloat16"}, True),
    "in float16": ((to_half,), {"torch_dtype": "float16", "dtype": None}, True),
    "fused experts": ((fused,), {}, True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_distillation_takes_the_same_model_in_another_format_and_no_tuned_one(
    name: str, both_runs: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = both_runs[0]
    changes, config, taken = OTHERS[name]
    other = edited(one["teacher"], tmp_path / "other", lambda t: [change(t) for change in changes])
    edit_config(other, **config)
    command = ["distill", one["student"], other, tmp_path / "out", "--tokens", one["tokens"]]
    assert run(*command, *DISTILL) == (0 if taken else 2)
    assert ("--any-teacher" in capsys.readouterr().err) is not taken
    if not taken:
        assert not (tmp_path / "out").exists()
        assert run(*command, *DISTILL, "--any-teacher") == 0
    record = read_json(tmp_path / "out" / "m2d.json")
    assert record["teacher"]["fingerprint"] == fingerprint(one["teacher"])
    assert record["distillation"]["teacher_fingerprint"] == fingerprint(other)


def test_m2d_json_says_of_which_weights_a_student_is(own_run: Run) -> None:
    record = read_json(own_run["refit"] / "m2d.json")
    assert record["teacher"]["fingerprint"] == fingerprint(own_run["teacher"])
    assert "model.safetensors" in record["files_sha256"]
    about = json.loads(pq.read_schema(own_run["stats"]).metadata[b"m2d"])
    assert about["computed_on"]["device"] == "cpu"
    assert about["computed_on"]["threads"] >= 1


def results_of(one: Run, folder: Path) -> Run:
    """A run's results where the workflow has them."""
    student = folder / "t/students/s/merged"
    shutil.copytree(one["student"], student)
    files: Run = {"grid": folder / "t/grid/sf.parquet", "record": student / "m2d.json"}
    files |= {"perplexity": student.with_name("merged.perplexity.json")}
    files |= {"teacher's": folder / "t/perplexity.json", "student": student}
    files |= {"evaluation": student.with_name("merged.eval") / "arc_easy.json"}
    files |= {name: folder / "t" / one[name].name for name in ("stats", "gram")}
    shutil.copy(one["stats"], files["stats"])
    shutil.copy(one["gram"], files["gram"])
    with_tokens = ("--tokens", one["tokens"], "--dtype", "float32")
    grid = ("grid", one["teacher"], files["grid"], *chosen(one)[:6], *with_tokens, "--keeps", 2)
    assert run(*grid) == 0
    for model, out in ((student, "perplexity"), (one["teacher"], "teacher's")):
        assert run("perplexity", model, *with_tokens, "--out", files[out]) == 0
    score = {"results": {"arc_easy": {"acc,none": 0.5}}, "model_fingerprint": fingerprint(student)}
    files["evaluation"].parent.mkdir()
    files["evaluation"].write_text(json.dumps(score))
    return files


def reports(files: Run, out: Path) -> list[list[Any]]:
    """The commands that put results together."""
    grid = ["--grid", files["grid"], "--provenance", files["record"]]
    scores = ["--evaluation", files["evaluation"]]
    both = ["--perplexity", files["perplexity"], files["teacher's"], *scores]
    pictures = ["--statistics", files["stats"], "--gram", files["gram"]]
    card = ["card", files["student"], "--perplexity", files["perplexity"], *scores]
    return [["tables", out, *grid, *both], ["figures", out, *grid, *both, *pictures], card]


def test_results_of_two_runs_are_not_put_together(
    both_runs: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = map(results_of, both_runs, (tmp_path / "a", tmp_path / "b"))
    for command in reports(ours, tmp_path / "out"):
        assert run(*command) == 0
    mixed = 0
    for name in ours:
        for command in reports(ours | {name: theirs[name]}, tmp_path / "other"):
            if theirs[name] in command:
                capsys.readouterr()
                assert run(*command) == 2, (name, command[0])
                assert "other weights than" in capsys.readouterr().err
                mixed += 1
    assert mixed == 15
    assert not (tmp_path / "other").exists()
