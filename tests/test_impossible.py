"""Numbers that cannot be are refused where they are read, and not written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bound import DISTILL, Run, flip, run
from conftest import forget_digests
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.pipeline.best import best_configuration
from m2d.report.results import read_grid
from m2d.statistics.files import read_gram, read_routing, write_gram, write_routing
from m2d.statistics.neurons import read_neurons


def test_swapped_shards_are_refused(own_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (own_run["logits"] / f"shard-{i:05}.safetensors" for i in range(2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    command = ["distill", own_run["student"], own_run["teacher"], own_run["tokens"].parent / "out"]
    options = ["--tokens", own_run["tokens"], *DISTILL, "--teacher-logits", own_run["logits"]]
    assert run(*command, *options) == 2
    assert "is a shard of other outputs" in capsys.readouterr().err


def test_a_flipped_bit_is_noticed_on_reading(own_run: Run) -> None:
    flip(own_run["gram"], 0.9)
    with pytest.raises(UserError, match="not those that were written"):
        read_gram(own_run["gram"])
    table = pq.read_table(own_run["stats"])
    column = table.column("prob_sum").to_numpy().copy()
    column[3] = np.nextafter(column[3], 0)
    names = table.schema.names
    changed = table.set_column(names.index("prob_sum"), table.schema.field("prob_sum"), [column])
    pq.write_table(changed, own_run["stats"])
    with pytest.raises(UserError, match="not those that were written"):
        read_routing(own_run["stats"])


def test_statistics_that_cannot_be_are_refused(
    own_run: Run, both_runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Files with a digest that is right, of numbers that no routing and no inner products give."""
    layers, about = read_routing(own_run["stats"])
    about.pop("sha256")
    layers[1].n_selected[:2] += (1, -1)  # still k of every token, so it is read
    write_routing(own_run["stats"], layers, about)
    assert read_routing(own_run["stats"])[0][1].n_selected[0] == layers[1].n_selected[0]
    layers[1].n_selected[0] += 1
    write_routing(own_run["stats"], layers, about)
    with pytest.raises(UserError, match=r"layer 1: 96 tokens select 2 experts each, but .* 193 "):
        read_routing(own_run["stats"])
    layers[1].n_selected[0] -= 1 + 97
    layers[1].n_selected[1] += 97
    write_routing(own_run["stats"], layers, about)
    with pytest.raises(UserError, match="layer 1: 96 tokens select"):
        read_routing(own_run["stats"])
    grams, about = read_gram(own_run["gram"])
    about.pop("sha256")
    grams[0].gram[0, 1] += 1e-6 * grams[0].gram.max()  # rounding
    write_gram(own_run["gram"], grams, about)
    read_gram(own_run["gram"])
    grams[0].gram[0, 1] += 1e-3 * grams[0].gram.max()
    write_gram(own_run["gram"], grams, about)
    capsys.readouterr()
    pair = ("--statistics", both_runs[0]["stats"], "--gram", own_run["gram"])
    assert run("rank", own_run["rank"].with_name("new"), *pair, "--scoring", "SF") == 2
    assert "gram.safetensors: layer 0: gram is not symmetric" in capsys.readouterr().err
    grams[0].gram[0, 1] = grams[0].gram[1, 0]
    grams[0].weight_gram[2, 2] = -1
    write_gram(own_run["gram"], grams, about)
    with pytest.raises(UserError, match="weight_gram has a square below zero"):
        read_gram(own_run["gram"])


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
    part: str, spoil: Callable[[Any], Any], said: str | None, own_run: Run
) -> None:
    with safe_open(own_run["neurons"], "np") as file:
        about = json.loads(file.metadata()["m2d"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about.pop("sha256")  # as something else would write it
    name = f"layers.1.{part}"
    tensors[name] = spoil(tensors.get(name))
    if part == "greedy":
        tensors["layers.1.greedy_gain"] = np.ones(2, np.float32)
    save_numpy(tensors, own_run["neurons"], {"m2d": json.dumps(about)})
    if said is None:
        assert read_neurons(own_run["neurons"])[0][1].greedy is not None
        return
    with pytest.raises(UserError, match=said):
        read_neurons(own_run["neurons"])


def test_what_is_not_finite_is_not_written(own_run: Run, tmp_path: Path) -> None:
    layers, about = read_gram(own_run["gram"])
    layers[0].gram[1, 1] = np.nan
    with pytest.raises(UserError, match="holds NaN or infinity"):
        write_gram(tmp_path / "new", layers, about)
    assert not (tmp_path / "new").exists()


def spoiled_head(own_run: Run, value: float) -> Path:
    file = own_run["teacher"] / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][5, 5] = value
    save_file(tensors, file, {"format": "pt"})
    for name in ("stats", "gram", "neurons"):
        own_run[name].unlink()
    return own_run["teacher"]


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_no_student_with_numbers_that_its_dtype_cannot_hold(
    value: float, own_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = spoiled_head(own_run, value)
    plan = read_json(own_run["plan"]) | {"teacher_fingerprint": None}
    own_run["plan"].write_text(json.dumps(plan))
    command = ["merge", teacher, tmp_path / "new", "--plan", own_run["plan"]]
    assert run(*command, "--dtype", "float16") == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_statistics_of_overflowing_experts_are_not_written(
    own_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_run["teacher"] / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "experts" in name:
            tensor.mul_(1e4)
    save_file(tensors, file, {"format": "pt"})
    for command in ("stats", "gram", "neurons"):
        out = tmp_path / command
        options = ["--tokens", own_run["tokens"], "--dtype", "float16"]
        assert run(command, own_run["teacher"], out, *options) == 2, command
        assert not out.exists(), command
        capsys.readouterr()


def test_perplexity_of_a_model_that_gives_no_numbers_is_refused(
    own_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_run["student"] / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 1e30
    tensors["model.norm.weight"] *= 1e30
    save_file(tensors, file, {"format": "pt"})
    forget_digests(own_run["student"])
    assert run("perplexity", own_run["student"], "--tokens", own_run["tokens"]) == 2
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
