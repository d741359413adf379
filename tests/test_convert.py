"""From teacher to student, through files on disk."""

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, make_teacher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import m2d
from m2d.cli import main


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()


def uniform_router(folder: Path) -> Path:
    """Zero the router's weights, so that every expert has the same weight."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp_only_layers": [1]}, {"mlp_only_layers": [0], "intermediate_size": 200}],
    ids=["all layers sparse", "a narrower dense layer", "a wider dense layer"],
)
def test_a_uniform_router_over_all_experts_converts_exactly(
    tmp_path: Path, tiny_text: Path, changes: dict
) -> None:
    folder = uniform_router(make_teacher(tmp_path / "t", num_experts_per_tok=8, **changes))
    out = m2d.convert(folder, tmp_path / "s", text=[tiny_text], sequences=4, length=16)
    student = load(out)
    assert type(student) is Qwen3ForCausalLM
    ids = torch.randint(0, VOCABULARY, (2, 24))
    expected = load(folder)(ids).logits
    error = (student(ids).logits - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_pure_pruning_keeps_every_activation(tmp_path: Path, tiny_teacher, tiny_text) -> None:
    """The student's intermediate activations are the kept experts', bit for bit."""
    out = m2d.convert(tiny_teacher, tmp_path / "s", text=[tiny_text], sequences=4, length=16)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["keep"] == 2
    teacher, student = load(tiny_teacher), load(out)
    hidden = torch.randn(7, 32)
    for layer in plan["layers"]:
        experts = teacher.model.layers[layer["layer"]].mlp.experts
        mlp = student.model.layers[layer["layer"]].mlp
        gate = torch.cat([experts.gate_up_proj[g["experts"][0]][:16] for g in layer["groups"]])
        up = torch.cat([experts.gate_up_proj[g["experts"][0]][16:] for g in layer["groups"]])
        assert torch.equal(mlp.gate_proj.weight, gate)
        assert torch.equal(mlp.up_proj.weight, up)
        inner = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        assert torch.equal(inner, mlp.act_fn(hidden @ gate.T) * (hidden @ up.T))
        for group, down in zip(layer["groups"], mlp.down_proj.weight.split(16, 1), strict=True):
            assert group["scale"] == pytest.approx(0.5)  # m / k, renormalised top-2
            torch.testing.assert_close(down, 0.5 * experts.down_proj[group["experts"][0]])


@pytest.mark.parametrize(("groups", "keep"), [(1, 3), (5, 5), (8, 8)])
def test_a_student_of_any_number_of_experts(
    groups: int, keep: int, tmp_path: Path, tiny_teacher, tiny_text
) -> None:
    """Narrower and wider than the router's top-k of 2."""
    out = m2d.convert(
        tiny_teacher, tmp_path / "s", groups=groups, keep=keep, text=[tiny_text],
        sequences=4, length=16,
    )  # fmt: skip
    student, plan = load(out), json.loads((out / "plan.json").read_text())
    assert student.config.intermediate_size == 16 * groups
    assert json.loads((out / "m2d.json").read_text())["plan"]["groups"] == groups
    hidden = torch.randn(7, 32)
    for layer in plan["layers"]:
        assert [len(layer["groups"]), sum(len(g["experts"]) for g in layer["groups"])] == [
            groups,
            keep,
        ]
        experts = load(tiny_teacher).model.layers[layer["layer"]].mlp.experts
        expected = torch.zeros(7, 32)
        for group in layer["groups"]:
            gate_up, down = (
                sum(w * tensor[e] for w, e in zip(group["weights"], group["experts"], strict=True))
                for tensor in (experts.gate_up_proj, experts.down_proj)
            )
            gate, up = (hidden @ gate_up.T).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            expected += group["scale"] * inner @ down.T
        found = student.model.layers[layer["layer"]].mlp(hidden)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_merged_groups_are_weighted_averages(tmp_path: Path, tiny_teacher, tiny_text) -> None:
    out = m2d.convert(
        tiny_teacher, tmp_path / "s", keep=8, grouping="WC", scaling="proportional",
        scoring="CP", text=[tiny_text], sequences=4, length=16,
    )  # fmt: skip
    plan = json.loads((out / "plan.json").read_text())
    student, teacher = load_file(out / "model.safetensors"), load_file(
        tiny_teacher / "model.safetensors"
    )  # fmt: skip
    for layer in plan["layers"]:
        prefix = f"model.layers.{layer['layer']}.mlp"
        assert sum(len(group["experts"]) for group in layer["groups"]) == 8
        for name in ("gate", "up", "down"):
            axis = 1 if name == "down" else 0
            parts = student[f"{prefix}.{name}_proj.weight"].split(16, axis)
            for part, group in zip(parts, layer["groups"], strict=True):
                expected = sum(
                    weight * teacher[f"{prefix}.experts.{expert}.{name}_proj.weight"].double()
                    for expert, weight in zip(group["experts"], group["weights"], strict=True)
                )
                if name == "down":
                    expected = group["scale"] * expected
                torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-6)


def test_everything_but_the_experts_is_copied(tmp_path: Path, tiny_teacher, tiny_text) -> None:
    out = m2d.convert(tiny_teacher, tmp_path / "s", text=[tiny_text], sequences=2, length=8)
    student, teacher = (load_file(f / "model.safetensors") for f in (out, tiny_teacher))
    shared = set(student) & set(teacher)
    assert set(teacher) - shared == {n for n in teacher if ".experts." in n or ".mlp.gate." in n}
    assert all(torch.equal(student[name], teacher[name]) for name in shared)
    tokenizer = (out / "tokenizer.json").read_bytes()
    assert tokenizer == (tiny_teacher / "tokenizer.json").read_bytes()
    assert not any("expert" in key for key in json.loads((out / "config.json").read_text()))


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tiny_teacher, tiny_text) -> Path:  # type: ignore[no-untyped-def]
    """The stages up to a ranking, run by hand."""
    folder = tmp_path_factory.mktemp("stages")
    tokens = str(folder / "tokens.safetensors")
    teacher = str(tiny_teacher)
    calls = [
        ["tokenize", teacher, tokens, "--text", tiny_text, "--sequences", "8", "--length", "16"],
        ["stats", teacher, folder / "statistics.parquet", "--tokens", tokens],
        ["gram", teacher, folder / "gram.safetensors", "--tokens", tokens],
        ["rank", folder / "reap.json", *inputs(folder), "--scoring", "ACP"],
    ]
    for call in calls:
        assert main([str(word) for word in call]) == 0, call
    return folder


def inputs(folder: Path) -> list[str]:
    files = (folder / "statistics.parquet", folder / "gram.safetensors")
    return ["--statistics", str(files[0]), "--gram", str(files[1])]


def merge_call(stages: Path, teacher: Path, out: Path, keep: int = 4) -> list[str]:
    ranking = ["--ranking", str(stages / "reap.json")]
    choice = ["--grouping", "OC", "--scaling", "proportional", "--keep", str(keep)]
    return ["merge", str(teacher), str(out), *inputs(stages), *ranking, *choice]


@pytest.mark.parametrize("groups", [None, 3])
def test_stages_and_convert_give_the_same_student(
    groups: int | None, stages: Path, tiny_teacher, tmp_path
) -> None:
    wide = ["--groups", str(groups)] if groups else []
    assert main([*merge_call(stages, tiny_teacher, tmp_path / "a"), *wide]) == 0
    m2d.convert(
        tiny_teacher, tmp_path / "b", tokens=stages / "tokens.safetensors",
        scoring="reap", grouping="output_cluster", scaling="proportional", keep=4, groups=groups,
    )  # fmt: skip
    by_hand, at_once = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert by_hand.keys() == at_once.keys()
    for name, tensor in by_hand.items():
        torch.testing.assert_close(tensor, at_once[name], rtol=1e-5, atol=1e-6)


def test_a_plan_makes_the_same_student_again(stages: Path, tiny_teacher, tmp_path) -> None:
    assert main(merge_call(stages, tiny_teacher, tmp_path / "a")) == 0
    again = [
        "merge",
        str(tiny_teacher),
        str(tmp_path / "b"),
        "--plan",
        str(tmp_path / "a/plan.json"),
    ]
    assert main(again) == 0
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]


def test_grid_and_written_students_agree(stages: Path, tiny_teacher, tmp_path, capsys) -> None:
    """Every configuration's row; a written student's perplexity equals its row's."""
    import pandas as pd

    tokens, grid = str(stages / "tokens.safetensors"), tmp_path / "grid.parquet"
    ranking = ["--ranking", str(stages / "reap.json"), "--tokens", tokens]
    call = ["grid", str(tiny_teacher), str(grid), *inputs(stages), *ranking, "--keeps", "2,3,4,6,8"]
    assert main(call) == 0
    rows = pd.read_parquet(grid)
    assert len(rows) == 50
    assert not rows.duplicated(["grouping", "scaling", "keep"]).any()
    pure = rows[(rows.keep == 2) & (rows.scaling == "uniform")]
    assert pure.plan.nunique() == 1  # with K = k, all groupings are one student
    assert (rows.groupby("plan").perplexity.nunique() == 1).all()
    for keep in (2, 4):
        assert main(merge_call(stages, tiny_teacher, tmp_path / f"s{keep}", keep)) == 0
        capsys.readouterr()
        assert main(["perplexity", str(tmp_path / f"s{keep}"), "--tokens", tokens, "--json"]) == 0
        written = json.loads(capsys.readouterr().out)
        row = rows.query(f"grouping=='output_cluster' and scaling=='proportional' and keep=={keep}")
        assert written["perplexity"] == pytest.approx(row.perplexity.item(), rel=1e-6)
        assert written["n_tokens"] == row.n_tokens.item() == 8 * 15


def test_a_grid_of_other_widths(stages: Path, tiny_teacher, tmp_path) -> None:
    """--groups of the grid: K from the groups on; a K below them is one line."""
    import pandas as pd

    tokens, grid = str(stages / "tokens.safetensors"), str(tmp_path / "grid.parquet")
    ranking = ["--ranking", str(stages / "reap.json"), "--tokens", tokens, "--groups", "3"]
    call = ["grid", str(tiny_teacher), grid, *inputs(stages), *ranking, "--groupings", "RR"]
    assert main([*call, "--keeps", "2"]) == 2
    assert main(call) == 0
    assert sorted(set(pd.read_parquet(grid).keep)) == [3, 6, 8]


def test_perplexity_by_hand(tiny_teacher: Path, stages: Path, capsys) -> None:
    """Streamed for a teacher, loaded for a student; both equal the plain formula."""
    ids = load_file(stages / "tokens.safetensors")["input_ids"]
    with torch.no_grad():
        logits = load(tiny_teacher)(ids).logits.double()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    expected = torch.exp(-chosen.mean()).item()
    windows = -chosen[:, :, 0].mean(1)
    error = expected * (windows.var() / len(windows)).sqrt().item()
    call = ["perplexity", str(tiny_teacher), "--tokens", str(stages / "tokens.safetensors")]
    assert main([*call, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert result["stderr"] == pytest.approx(error, rel=1e-5)
