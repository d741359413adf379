"""A model in memory and a streamed one are the same weights, or neither starts."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import forget_digests, make_teacher, write_tokens
from family_formats import FORMATS, quantise
from family_quantized import edit_config, slow_fp8, to_fp8, to_mxfp4
from family_teachers import MAKERS, make
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import m2d
from m2d.cli import main
from m2d.errors import UserError
from m2d.models.checkpoint import INDEX_NAME, Checkpoint
from m2d.models.load import load_model
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher, read_config

CPU = torch.device("cpu")
KEPT = ("gate.weight", "embed_tokens", "lm_head", "norm")
Tensors = dict[str, torch.Tensor]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, read_config(folder)[1], dtype, CPU)


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_loaded_model_has_the_parameters_that_transformers_loads(
    name: str, tmp_path: Path
) -> None:
    folder = make(name, tmp_path / "teacher")
    if name.startswith("emo"):
        open_teacher(folder)  # transformers is told of the class
    ours, theirs = loaded(folder), stock(folder)
    state = ours.state_dict()
    assert set(state) == set(theirs.state_dict())
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(state[key], tensor), key
    ids = torch.arange(30)[None]
    logits = ours(ids).logits, theirs(ids).logits
    assert torch.allclose(*logits, rtol=0, atol=1e-6 * float(logits[1].abs().max()))
    assert {p.requires_grad for p in ours.parameters()} == {True}


@torch.no_grad()
def test_in_half_precision_it_keeps_what_transformers_keeps_in_float32(tmp_path: Path) -> None:
    folder = make("deepseek_v3", tmp_path / "teacher")
    ours = loaded(folder, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert {str(t.dtype) for t in theirs.state_dict().values()} == {
        "torch.float32",
        "torch.bfloat16",
    }
    for key, tensor in theirs.state_dict().items():
        assert ours.state_dict()[key].dtype == tensor.dtype, key
        assert torch.equal(ours.state_dict()[key], tensor), key


def fp8(folder: Path) -> tuple[Path, Tensors]:
    to_fp8(make_teacher(folder), (16, 16), KEPT)
    return folder, slow_fp8(folder, (16, 16))


def mxfp4(folder: Path) -> tuple[Path, Tensors]:
    to_mxfp4(make("gpt_oss", folder))
    edit_config(folder, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, {k: v.float().clone() for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("kind", ["block fp8", "mxfp4", *FORMATS])
def test_losses_do_not_know_how_the_teacher_was_packed(kind: str, tmp_path: Path) -> None:
    """Distillation, stored outputs and perplexity of a quantised teacher and of its plain twin."""
    packed = tmp_path / "packed"
    if kind in FORMATS:
        tensors = quantise(make_teacher(packed), kind)
    else:
        _, tensors = fp8(packed) if kind == "block fp8" else mxfp4(packed)
    plain = tmp_path / "plain"
    shutil.copytree(packed, plain)
    edit_config(plain, quantization_config=None)
    (plain / "hf_quant_config.json").unlink(missing_ok=True)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    tokens = tmp_path / "tokens.safetensors"
    ids = torch.randint(1, 300, (8, 16), generator=torch.Generator().manual_seed(0))
    write_tokens(tokens, ids.int(), {"source": "random"})
    student = m2d.convert(plain, tmp_path / "student", tokens=tokens, dtype="float32")
    found = {}
    for teacher in (plain, packed):
        out, name = tmp_path / f"out-{teacher.name}", teacher.name
        options = ["--tokens", tokens, "--steps", 2, "--batch", 4, "--device-batch", 4]
        options += ["--precision", "fp32", "--seed", 1, "--device", "cpu"]
        assert main(list(map(str, ["distill", student, teacher, out, *options]))) == 0
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        file = tmp_path / f"{name}.json"
        command = ["perplexity", teacher, "--tokens", tokens, "--out", file]
        assert main(list(map(str, command))) == 0
        stored = tmp_path / f"logits-{name}"
        assert main(["teacher-logits", str(teacher), str(stored), "--tokens", str(tokens)]) == 0
        nll = json.loads(file.read_text())["nll"]
        found[name] = [*losses, nll], load_file(stored / "shard-00000.safetensors")["log_p"]
    (one, one_p), (other, other_p) = found.values()
    assert one == pytest.approx(other, rel=1e-4)
    assert torch.allclose(one_p.float(), other_p.float(), atol=1e-2)


MIDDLE = "model.layers.1.self_attn.k_proj.weight"


def rename_all(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


SPOILERS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(MIDDLE), f"1 tensor is missing ({MIDDLE})"),
    "extra": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
        "1 tensor is more than the model has (model.layers.0.self_attn.q_proj.bias)",
    ),
    "renamed": (rename_all, "tensors are missing"),
    "misshaped": (lambda t: t.update({MIDDLE: torch.zeros(3, 32)}), "is [3, 32] on disk"),
    "unscaled": (
        lambda t: t.update({MIDDLE: t[MIDDLE].to(torch.float8_e4m3fn)}),
        "without its scale it is no weight",
    ),
    "integers": (
        lambda t: t.update({MIDDLE: t[MIDDLE].to(torch.int32)}),
        "int32, which is no weight without a scale",
    ),
}
# Command -> its arguments, where {} is the spoiled folder.
COMMANDS = {
    "inspect": ["inspect", "{teacher}"],
    "stats": ["stats", "{teacher}", "{out}", "--tokens", "{tokens}"],
    "gram": ["gram", "{teacher}", "{out}", "--tokens", "{tokens}"],
    "neurons": ["neurons", "{teacher}", "{out}", "--tokens", "{tokens}"],
    "convert": ["convert", "{teacher}", "{out}", "--tokens", "{tokens}"],
    "teacher-logits": ["teacher-logits", "{teacher}", "{out}", "--tokens", "{tokens}"],
    "perplexity": ["perplexity", "{teacher}", "--tokens", "{tokens}"],
    "perplexity of a student": ["perplexity", "{student}", "--tokens", "{tokens}"],
    "distill a student": ["distill", "{student}", "{whole}", "{out}", "--tokens", "{tokens}"],
    "distill from": ["distill", "{whole student}", "{teacher}", "{out}", "--tokens", "{tokens}"],
    "refit": ["refit", "{student}", "{whole}", "{out}", "--tokens", "{tokens}"],
    "evaluate": ["evaluate", "{student}", "{out}", "--task", "arc_easy"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    teacher, tokens = make_teacher(folder / "teacher"), folder / "tokens.safetensors"
    ids = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    write_tokens(tokens, ids.int(), {"source": "random"})
    student = m2d.convert(teacher, folder / "student", tokens=tokens)
    return {"whole": teacher, "tokens": tokens, "whole student": student}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_tensors_that_are_not_the_class_s_are_refused_by_every_command(
    spoiler: str,
    whole: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, said = SPOILERS[spoiler]
    places = {**whole, "out": tmp_path / "out"}
    for name in ("teacher", "student"):
        source = whole["whole" if name == "teacher" else "whole student"]
        places[name] = tmp_path / name
        shutil.copytree(source, places[name])
        edit_tensors(places[name], change)
    forget_digests(places["student"])
    monkeypatch.setattr("m2d.evaluate.lm_eval._load_task", lambda *_: [])
    for command, words in COMMANDS.items():
        arguments = [word.format_map(places) for word in words]
        if command == "distill a student" or command == "distill from":
            arguments += ["--steps", "1", "--batch", "4", "--device-batch", "4"]
        assert main(arguments) == 2, command
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error, command
        assert len(error) < 500
        assert not places["out"].exists(), command


def test_a_whole_file_counts_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    old = make_teacher(tmp_path / "teacher", seed=1)
    stock(old).save_pretrained(old, max_shard_size="60KB")
    (old / "model.safetensors").unlink(missing_ok=True)
    new = make_teacher(tmp_path / "new", seed=2)
    assert (old / INDEX_NAME).exists()
    shutil.copy(new / "model.safetensors", old / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(Checkpoint(old).read(name), stock(new).state_dict()[name])
    assert torch.equal(stock(old).state_dict()[name], stock(new).state_dict()[name])
    for shard in old.glob("model-*.safetensors"):
        shard.unlink()  # an index of files that are gone hurts no more
    assert torch.equal(Checkpoint(old).read(name), stock(old).state_dict()[name])


def test_an_index_of_other_files_is_refused(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    model = stock(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="index and shards are not of one model"):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_that_of_transformers_or_refused(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    norm = {"model.norm.weight": tensors.pop("model.norm.weight")}
    save_file(tensors, folder / first, {"format": "pt"})
    save_file({MIDDLE: tensors[MIDDLE] * 2, **norm}, folder / second, {"format": "pt"})
    weight_map = dict.fromkeys(tensors, first) | {MIDDLE: second, "model.norm.weight": second}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert torch.equal(Checkpoint(folder).read(MIDDLE), stock(folder).state_dict()[MIDDLE])
    assert torch.equal(Checkpoint(folder).read(MIDDLE), tensors[MIDDLE] * 2)
    weight_map[MIDDLE] = first
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="index and shards are not of one model"):
        Checkpoint(folder)


def test_a_tied_head_may_be_there_if_it_is_the_same(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert torch.equal(loaded(folder).lm_head.weight, stock(folder).lm_head.weight)
    open_teacher(folder)
    edit_tensors(folder, lambda t: t["lm_head.weight"][0, 0].add_(1.0))
    with pytest.raises(UserError, match=r"ties lm_head.weight to .* the two differ"):
        open_teacher(folder)
    with pytest.raises(UserError, match="the two differ"):
        loaded(folder)


def test_numbers_that_are_not_finite_are_no_weights(tmp_path: Path) -> None:
    folder = edit_tensors(make_teacher(tmp_path / "t"), lambda t: t[MIDDLE][0, 0].fill_(torch.nan))
    with pytest.raises(UserError, match=r"k_proj\.weight: 1 of its 512 numbers are not finite"):
        loaded(folder)


NUMBERS_OF = {
    "an expert": "model.layers.0.mlp.experts.5.down_proj.weight",
    "a router": "model.layers.1.mlp.gate.weight",
    "a norm": "model.norm.weight",
}
# As in COMMANDS, of those that once took them.
OF_NUMBERS = {
    "convert": COMMANDS["convert"],
    "neurons": COMMANDS["neurons"],
    "teacher-logits": COMMANDS["teacher-logits"],
    "in greedy order": [*COMMANDS["neurons"], "--choice", "greedy", "--width", "16",
                        "--multiple", "16"],
    "of neurons": [*COMMANDS["convert"], "--granularity", "neurons", "--width", "16",
                   "--multiple", "16"],
    "fold-report": ["fold-report", "{teacher}", "--tokens", "{tokens}", "--json", "{out}"],
}  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", NUMBERS_OF)
def test_a_teacher_with_a_number_that_is_not_finite_is_refused(
    place: str,
    value: float,
    whole: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, name = make_teacher(tmp_path / "teacher"), NUMBERS_OF[place]
    edit_tensors(teacher, lambda t: t[name].view(-1)[-1:].fill_(value))
    out = tmp_path / "out"
    for command, words in OF_NUMBERS.items():
        assert main([w.format(**whole, teacher=teacher, out=out) for w in words]) == 2, command
        *_, line = capsys.readouterr().err.splitlines()
        assert "1 of its " in line
        assert "numbers are not finite" in line
        assert {path.name for path in tmp_path.iterdir()} == {"teacher"}


def test_layers_that_overflow_are_named(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, name = make_teacher(tmp_path / "teacher"), "model.layers.0.self_attn.o_proj.weight"
    edit_tensors(teacher, lambda t: t[name].fill_(3e38))
    for command in ("stats", "neurons", "convert", "teacher-logits"):
        words = [
            w.format(**whole, teacher=teacher, out=tmp_path / "out") for w in COMMANDS[command]
        ]
        assert main(words) == 2
        assert "not finite" in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"teacher"}


def test_what_a_class_knows_and_leaves_is_no_extra(tmp_path: Path) -> None:
    folder = make("deepseek_v3", tmp_path / "teacher")
    edit_config(folder, num_nextn_predict_layers=1)
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    edit_tensors(folder, lambda t: t.update(extra))
    open_teacher(folder)
    loaded(folder)


@torch.no_grad()
def test_flags_of_what_is_returned_do_not_reach_the_stream(tmp_path: Path) -> None:
    folder = make("mixtral", tmp_path / "teacher")
    ids = torch.arange(20)[None]

    def hidden() -> torch.Tensor:
        return StreamedTeacher(open_teacher(folder), torch.float32, CPU).run(ids, 1)[0]

    expected = hidden()
    edit_config(
        folder,
        output_router_logits=True,
        output_attentions=True,
        output_hidden_states=True,
        return_dict=False,
    )
    assert torch.equal(hidden(), expected)


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1_000_000}, "no model has more than"),
        ({"num_hidden_layers": 0}, "every model has at least 1"),
        ({"num_hidden_layers": 9_000}, "but the tensors are of 2 layers"),
        ({"num_local_experts": 10_000_000}, "no model has more than"),
        ({"vocab_size": 10**9}, "is [300, 32] on disk, but the config implies [1000000000, 32]"),
        ({"hidden_size": 10**7}, "no model has more than"),
        ({"hidden_size": 64}, "on disk, but the config implies"),
        ({"num_local_experts": 16}, "tensors are missing"),
    ],
)
def test_sizes_that_the_tensors_contradict_are_refused_at_once(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edit_config(make_teacher(tmp_path / "teacher"), **changes)
    assert main(["inspect", str(folder)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.timeout(90)
def test_labels_of_a_classifier_are_not_made(tmp_path: Path) -> None:
    folder = edit_config(make_teacher(tmp_path / "teacher"), num_labels=10**8)
    assert open_teacher(folder).num_experts == 8


def test_a_teacher_of_float64_is_converted(tmp_path: Path, whole: dict[str, Path]) -> None:
    folder = edit_config(make_teacher(tmp_path / "teacher"), dtype="float64")
    student = m2d.convert(folder, tmp_path / "student", tokens=whole["tokens"])
    assert torch.isfinite(loaded(student)(torch.arange(9)[None]).logits).all()
