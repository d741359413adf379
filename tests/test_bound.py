"""Artifacts are bound to the teacher that made them, and to their own bytes."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_teacher, write_tokens
from family_quantized import edit_config
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from m2d.artifacts import read_json, sha256_of
from m2d.cli import main
from m2d.errors import UserError
from m2d.models.fingerprint import fingerprint
from m2d.pipeline.best import best_configuration
from m2d.report.results import read_grid
from m2d.statistics.files import read_gram, read_routing, write_gram, write_routing
from m2d.statistics.neurons import read_neurons

Run = dict[str, Path]


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def make_run(folder: Path, seed: int, source: Path) -> Run:
    """Everything that is made from one teacher."""
    teacher = make_teacher(folder / "teacher", seed=seed)
    tokens = Path(shutil.copy(source, folder / "tokens.safetensors"))
    names = ("stats.parquet", "gram.safetensors", "rank.json", "neurons.safetensors")
    found: Run = {"teacher": teacher, "tokens": tokens}
    found |= {name.partition(".")[0]: folder / name for name in names}
    found |= {name: folder / name for name in ("student", "refit", "logits", "fold.safetensors")}
    found["fold"] = found.pop("fold.safetensors")
    with_tokens = ("--tokens", tokens, "--dtype", "float32")
    for command in ("stats", "gram", "neurons", "fold"):
        assert run(command, teacher, found[command], *with_tokens) == 0
    pair = ("--statistics", found["stats"], "--gram", found["gram"])
    assert run("rank", found["rank"], *pair, "--scoring", "SF") == 0
    assert run("merge", teacher, found["student"], *chosen(found)) == 0
    assert run("refit", found["student"], teacher, found["refit"], *with_tokens) == 0
    assert run("teacher-logits", teacher, found["logits"], *with_tokens, "--rows", 4) == 0
    found["plan"] = found["student"] / "plan.json"
    return found


def chosen(one: Run) -> list[Any]:
    files = {"--statistics": one["stats"], "--gram": one["gram"], "--ranking": one["rank"]}
    methods = ["--grouping", "RR", "--scaling", "uniform", "--keep", 4]
    return [*(word for pair in files.items() for word in pair), *methods]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("bound")
    ids = torch.randint(1, 300, (8, 12), generator=torch.Generator().manual_seed(0))
    write_tokens(folder / "tokens", ids.int(), {"source": "random"})
    return make_run(folder / "a", 1, folder / "tokens"), make_run(
        folder / "b", 2, folder / "tokens"
    )


DISTILL = ("--steps", 1, "--batch", 4, "--device-batch", 4, "--precision", "fp32")
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
    name: str, runs: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = runs
    keys, command = MIXTURES[name]
    mixed = ours | {key: theirs[key] for key in keys}
    out = tmp_path / "out.parquet"
    assert run(*command(mixed, out)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fingerprint" in error
    assert len(error) < 500
    assert not out.exists()


def test_logits_of_another_dtype_do_not_mix(
    runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    one = runs[0]
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
    name: str, runs: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = runs[0]
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


def flip(file: Path, place: float) -> None:
    """Flip one bit of a file, at that share of its length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 4
    file.write_bytes(content)


@pytest.fixture
def copy(runs: tuple[Run, Run], tmp_path: Path) -> Run:
    """A run that a test may spoil; the paths of its artifacts."""
    shutil.copytree(runs[0]["teacher"].parent, tmp_path / "a")
    return {key: tmp_path / "a" / path.relative_to(runs[0]["teacher"].parent)
            for key, path in runs[0].items()}  # fmt: skip


def edit(file: Path, key: str) -> None:
    """Another number in m2d.json than was written."""
    text = file.read_text()
    changed = re.sub(rf'("{key}": )(\d+)', r"\g<1>7\2", text, count=1)
    assert changed != text
    file.write_text(changed)


def test_verify_finds_nothing_in_what_was_not_touched(
    copy: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", copy["teacher"].parent) == 0
    assert "7 of 7 artifacts are as they were written" in capsys.readouterr().err
    assert run("verify", copy["student"], copy["gram"], "--teacher", copy["teacher"]) == 0
    own = (copy["refit"], copy["teacher"], copy["student"].with_name("distilled"))
    assert run("distill", *own, "--tokens", copy["tokens"], *DISTILL) == 0
    capsys.readouterr()
    assert run("verify", copy["teacher"].parent) == 0
    assert "8 of 8 artifacts are as they were written" in capsys.readouterr().err
    plain = Path(shutil.copy(copy["stats"], copy["stats"].with_name("statistics")))
    assert run("verify", plain) == 0  # whatever it is called


@pytest.mark.parametrize(
    ("key", "spoil", "said"),
    [
        ("gram", lambda p: flip(p, 0.9), "was changed or damaged"),
        ("neurons", lambda p: flip(p, 0.9), "was changed or damaged"),
        ("fold", lambda p: flip(p, 0.9), "was changed or damaged"),
        ("student", lambda p: flip(p / "model.safetensors", 0.9), "model.safetensors was changed"),
        ("student", lambda p: flip(p / "config.json", 0.5), "config.json was changed"),
        ("student", lambda p: (p / "plan.json").unlink(), "plan.json is missing"),
        ("refit", lambda p: flip(p / "model.safetensors", 0.5), "model.safetensors was changed"),
        ("logits", lambda p: flip(p / "shard-00000.safetensors", 0.9), "shard-00000.safetensors"),
        ("logits", lambda p: (p / "shard-00001.safetensors").unlink(), "is missing"),
        ("stats", lambda p: p.write_bytes(p.read_bytes()[:-9]), "cut off, or damaged"),
        (
            "student",
            lambda p: edit(p / "m2d.json", "parameters"),
            "m2d.json was changed or damaged",
        ),
        ("student", lambda p: (p / "m2d.json").write_text("{"), "m2d.json is not readable"),
    ],
)
def test_verify_names_what_was_changed(
    key: str,
    spoil: Callable[[Path], Any],
    said: str,
    copy: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(copy[key])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run("verify", copy["teacher"].parent)
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(str(copy[key]))
    assert said in lines[0]


def test_verify_names_what_is_of_another_run(
    copy: Run, runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(runs[1]["gram"], copy["gram"])
    with pytest.raises(SystemExit):
        run("verify", copy["teacher"].parent)
    assert "gram.safetensors: belongs to another run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("verify", copy["student"], "--teacher", runs[1]["teacher"])
    assert "belongs to another run" in capsys.readouterr().out


def test_a_result_is_of_the_weights_beside_it(
    copy: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    student, tokens = copy["student"], copy["tokens"]
    file = student.with_name("student.perplexity.json")
    measure = ("perplexity", student, "--tokens", tokens, "--out", file, "--dtype", "float32")
    assert run(*measure) == 0
    result = read_json(file)
    ids = load_file(tokens)["input_ids"].long().numpy()
    assert result["tokens_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert result["model_fingerprint"] == fingerprint(student)
    assert (result["dtype"], result["computed_on"]["device"]) == ("float32", "cpu")
    assert result["computed_on"]["threads"] == torch.get_num_threads()
    assert verify(capsys, copy["teacher"].parent)[0] == 0
    shutil.rmtree(student)
    assert run("merge", copy["teacher"], student, *chosen(copy)[:-1], 2) == 0
    shutil.rmtree(copy["refit"])  # of the student that was there
    code, said, _ = verify(capsys, copy["teacher"].parent)
    assert code == 1
    assert "student.perplexity.json was measured on other weights" in said
    assert run(*measure) == 0
    assert verify(capsys, copy["teacher"].parent)[0] == 0


def verify(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    try:
        code = run("verify", *words)
    except SystemExit as stopped:
        code = int(str(stopped.code))
    return code, *capsys.readouterr()


def test_verify_names_a_student_made_from_other_files_than_lie_there(
    copy: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same teacher, so that the fingerprint is the same."""
    folder = copy["teacher"].parent
    layers, about = read_routing(copy["stats"])
    layers[0].prob_sum[0] *= 1.5
    write_routing(copy["stats"], layers, {k: v for k, v in about.items() if k != "sha256"})
    code, out, _ = verify(capsys, folder)
    assert code == 1
    said = "was made from other statistics than lie there (stats.parquet)"
    assert out == f"{copy['refit']}: {said}\n{copy['student']}: {said}\n"
    copy["stats"].unlink()  # of what is not there, nothing can be said
    assert verify(capsys, folder)[0] == 0
    copy["rank"].write_text(json.dumps(read_json(copy["rank"]) | {"scoring": "mine"}))
    assert "was made from other ranking than lie there (rank.json)" in verify(capsys, folder)[1]
    copy["rank"].unlink()
    record = read_json(copy["student"] / "m2d.json")
    record["files_sha256"]["model.safetensors"] = "0" * 64
    (copy["student"] / "m2d.json").write_text(json.dumps(record))
    out = verify(capsys, folder)[1]
    assert (
        f"{copy['refit']}: was made from another student than the one of its plan beside it" in out
    )


def test_verify_names_what_has_no_fingerprint(
    copy: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    grams, about = read_gram(copy["gram"])
    for key in ("sha256", "teacher_fingerprint"):
        about.pop(key)
    write_gram(copy["gram"], grams, about)
    copy["student"].rename(copy["student"].with_name("elsewhere"))
    code, _, said = verify(capsys, copy["gram"])
    assert code == 0
    assert f"no fingerprint of a teacher, so of any: {copy['gram']}" in said
    code, out, _ = verify(capsys, copy["gram"], "--teacher", copy["teacher"])
    assert code == 1
    assert out == f"{copy['gram']}: has no fingerprint of its teacher; make it again to know\n"


def test_verify_compares_every_byte_of_a_teacher_on_request(
    copy: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, digests = copy["teacher"], tmp_path / "teacher.sha256"
    full = (copy["fold"], "--teacher", teacher, "--full", digests)
    code, _, said = verify(capsys, *full)
    assert code == 0
    assert "teacher.sha256: digests of 2 files" in said
    assert f"{sha256_of(teacher / 'model.safetensors')}  model.safetensors" in digests.read_text()
    assert verify(capsys, *full)[0] == 0
    file = teacher / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    names = json.loads(content[8 : 8 + header])
    begin, end = max((v["data_offsets"] for k, v in names.items() if k != "__metadata__"),
                     key=lambda place: place[1] - place[0])  # fmt: skip
    content[8 + header + begin + 1000] ^= 1  # where the fingerprint takes no sample
    assert end - begin > 20_000
    before = fingerprint(teacher)
    file.write_bytes(content)
    assert fingerprint(teacher) == before
    code, out, _ = verify(capsys, *full)
    assert (code, out.count("\n")) == (1, 1)
    assert "model.safetensors: was changed or damaged" in out
    notes = teacher / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "model.safetensors.metadata").write_text(f"{'a' * 40}\n{'b' * 64}\n1.5\n")
    digests.unlink()
    code, out, _ = verify(capsys, *full)
    assert code == 1
    assert "model.safetensors: was changed or damaged: not of the digest that the hub" in out
    assert not digests.exists()
    digests.write_text("nonsense\n")
    assert verify(capsys, *full)[0] == 2
    assert verify(capsys, copy["fold"], "--full", digests)[0] == 2


def test_swapped_shards_are_refused(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (copy["logits"] / f"shard-{i:05}.safetensors" for i in range(2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    command = ["distill", copy["student"], copy["teacher"], copy["tokens"].parent / "out"]
    options = ["--tokens", copy["tokens"], *DISTILL, "--teacher-logits", copy["logits"]]
    assert run(*command, *options) == 2
    assert "is a shard of other outputs" in capsys.readouterr().err


def test_a_changed_grid_is_noticed_on_reading_and_by_verify(
    copy: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = copy["stats"].with_name("grid") / "sf.parquet"
    grid.parent.mkdir()
    words = ("grid", copy["teacher"], grid, *chosen(copy)[:6], "--tokens", copy["tokens"])
    assert run(*words, "--keeps", 2) == 0
    assert run("verify", grid) == 0
    best = best_configuration([grid])
    assert len(read_grid([grid])) > 1
    table = pq.read_table(grid)
    worst = table.column("perplexity").to_numpy().copy()
    worst[-1] = np.nextafter(worst[-1], 0)
    place = table.schema.names.index("perplexity")
    changed = table.set_column(place, table.schema.field("perplexity"), [worst])
    pq.write_table(changed, grid)
    for reader in (lambda: best_configuration([grid]), lambda: read_grid([grid])):
        with pytest.raises(UserError, match="not those that were written"):
            reader()
    with pytest.raises(SystemExit):
        run("verify", grid)
    assert "was changed or damaged" in capsys.readouterr().out
    assert best["keep"] == 2


def test_a_flipped_bit_is_noticed_on_reading(copy: Run) -> None:
    flip(copy["gram"], 0.9)
    with pytest.raises(UserError, match="not those that were written"):
        read_gram(copy["gram"])
    table = pq.read_table(copy["stats"])
    column = table.column("prob_sum").to_numpy().copy()
    column[3] = np.nextafter(column[3], 0)
    names = table.schema.names
    changed = table.set_column(names.index("prob_sum"), table.schema.field("prob_sum"), [column])
    pq.write_table(changed, copy["stats"])
    with pytest.raises(UserError, match="not those that were written"):
        read_routing(copy["stats"])


def test_statistics_that_cannot_be_are_refused(
    copy: Run, runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Files with a digest that is right, of numbers that no routing and no inner products give."""
    layers, about = read_routing(copy["stats"])
    about.pop("sha256")
    layers[1].n_selected[:2] += (1, -1)  # still k of every token, so it is read
    write_routing(copy["stats"], layers, about)
    assert read_routing(copy["stats"])[0][1].n_selected[0] == layers[1].n_selected[0]
    layers[1].n_selected[0] += 1
    write_routing(copy["stats"], layers, about)
    with pytest.raises(UserError, match=r"layer 1: 96 tokens select 2 experts each, but .* 193 "):
        read_routing(copy["stats"])
    layers[1].n_selected[0] -= 1 + 97
    layers[1].n_selected[1] += 97
    write_routing(copy["stats"], layers, about)
    with pytest.raises(UserError, match="layer 1: 96 tokens select"):
        read_routing(copy["stats"])
    grams, about = read_gram(copy["gram"])
    about.pop("sha256")
    grams[0].gram[0, 1] += 1e-6 * grams[0].gram.max()  # rounding
    write_gram(copy["gram"], grams, about)
    read_gram(copy["gram"])
    grams[0].gram[0, 1] += 1e-3 * grams[0].gram.max()
    write_gram(copy["gram"], grams, about)
    capsys.readouterr()
    pair = ("--statistics", runs[0]["stats"], "--gram", copy["gram"])
    assert run("rank", copy["rank"].with_name("new"), *pair, "--scoring", "SF") == 2
    assert "gram.safetensors: layer 0: gram is not symmetric" in capsys.readouterr().err
    grams[0].gram[0, 1] = grams[0].gram[1, 0]
    grams[0].weight_gram[2, 2] = -1
    write_gram(copy["gram"], grams, about)
    with pytest.raises(UserError, match="weight_gram has a square below zero"):
        read_gram(copy["gram"])


@pytest.mark.parametrize(
    ("part", "spoil", "said"),
    [
        ("down_square_norm", lambda a: np.where(a == a.max(), -1, a), "a square below zero"),
        ("down_square_norm", lambda a: a[:, :-1].copy(), "down_square_norm has shape"),
        ("weighted_square_sum", lambda a: np.where(a == a.max(), np.nan, a), "NaN or infinity"),
        ("mean_weight", lambda a: a[:-1].copy(), "mean_weight has shape"),
        ("greedy", lambda a: np.array([[0, 1], [0, 1]], np.int32), "each once"),
        ("greedy", lambda a: np.array([[0, 1], [8, 1]], np.int32), "each once"),
        ("greedy", lambda a: np.array([[0, 1], [7, 1]], np.int32), None),
    ],
)
def test_neuron_statistics_that_cannot_be_are_refused(
    part: str, spoil: Callable[[Any], Any], said: str | None, copy: Run
) -> None:
    with safe_open(copy["neurons"], "np") as file:
        about = json.loads(file.metadata()["m2d"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about.pop("sha256")  # as something else would write it
    name = f"layers.1.{part}"
    tensors[name] = spoil(tensors.get(name))
    if part == "greedy":
        tensors["layers.1.greedy_gain"] = np.ones(2, np.float32)
    save_numpy(tensors, copy["neurons"], {"m2d": json.dumps(about)})
    if said is None:
        assert read_neurons(copy["neurons"])[0][1].greedy is not None
        return
    with pytest.raises(UserError, match=said):
        read_neurons(copy["neurons"])


def test_what_is_not_finite_is_not_written(copy: Run, tmp_path: Path) -> None:
    layers, about = read_gram(copy["gram"])
    layers[0].gram[1, 1] = np.nan
    with pytest.raises(UserError, match="holds NaN or infinity"):
        write_gram(tmp_path / "new", layers, about)
    assert not (tmp_path / "new").exists()


def spoiled_head(copy: Run, value: float) -> Path:
    file = copy["teacher"] / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][5, 5] = value
    save_file(tensors, file, {"format": "pt"})
    for name in ("stats", "gram", "neurons"):
        copy[name].unlink()
    return copy["teacher"]


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_no_student_with_numbers_that_its_dtype_cannot_hold(
    value: float, copy: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = spoiled_head(copy, value)
    plan = read_json(copy["plan"]) | {"teacher_fingerprint": None}
    copy["plan"].write_text(json.dumps(plan))
    command = ["merge", teacher, tmp_path / "new", "--plan", copy["plan"]]
    assert run(*command, "--dtype", "float16") == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_statistics_of_overflowing_experts_are_not_written(
    copy: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy["teacher"] / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "experts" in name:
            tensor.mul_(1e4)
    save_file(tensors, file, {"format": "pt"})
    for command in ("stats", "gram", "neurons"):
        out = tmp_path / command
        options = ["--tokens", copy["tokens"], "--dtype", "float16"]
        assert run(command, copy["teacher"], out, *options) == 2, command
        assert not out.exists(), command
        capsys.readouterr()


def test_perplexity_of_a_model_that_gives_no_numbers_is_refused(
    copy: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy["student"] / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 1e30
    tensors["model.norm.weight"] *= 1e30
    save_file(tensors, file, {"format": "pt"})
    assert run("perplexity", copy["student"], "--tokens", copy["tokens"]) == 2
    assert "which is no perplexity" in capsys.readouterr().err


def test_a_grid_s_row_without_a_number_is_never_the_best(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = [
        {"scoring": "sf", "grouping": g, "scaling": "uniform", "keep": 4, "perplexity": p}
        for g, p in (("a", None), ("c", 7.0), ("d", 6.0))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "g.parquet")
    assert best_configuration([tmp_path / "g.parquet"])["grouping"] == "d"
    with pytest.raises(UserError, match="no row with a finite perplexity"):
        best_configuration([tmp_path / "g.parquet"], grouping="a")


def test_m2d_json_says_of_which_weights_a_student_is(copy: Run) -> None:
    record = read_json(copy["refit"] / "m2d.json")
    assert record["teacher"]["fingerprint"] == fingerprint(copy["teacher"])
    assert "model.safetensors" in record["files_sha256"]
    about = json.loads(pq.read_schema(copy["stats"]).metadata[b"m2d"])
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
    runs: tuple[Run, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = (results_of(one, tmp_path / name) for one, name in zip(runs, "ab", strict=True))
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


def test_tables_leave_out_what_gave_no_number_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa

    file = tmp_path / "teacher" / "grid" / "sf.parquet"
    file.parent.mkdir(parents=True)
    common = {"scoring": "selection_freq", "scaling": "uniform", "keep": 4, "stderr": 0.1}
    rows = [
        {**common, "grouping": "round_robin", "plan": "a", "perplexity": None},
        {**common, "grouping": "output_cluster", "plan": "b", "perplexity": 8.0},
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert read_grid([file])["relative"].tolist() == [1.0]
    assert "1 of 2 rows have no perplexity" in capsys.readouterr().err
