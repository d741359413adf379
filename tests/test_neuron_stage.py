"""Single neurons from a teacher on disk: their statistics, plans, students and sizes."""

import argparse
import json
from pathlib import Path

import family_teachers
import numpy as np
import pytest
import torch
from conftest import VOCABULARY, make_teacher, write_tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import m2d
from m2d.artifacts import sha256_of
from m2d.choose.neuron_statistics import CHOICES
from m2d.cli import main
from m2d.errors import UserError
from m2d.inspect import inspect
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import count_parameters, open_teacher
from m2d.models.widths import chosen_width, number_of_parameters, parameters_of, width_for
from m2d.statistics.neurons import collect, read_neurons, write_neurons

TOKENS = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(3))
EXPERTS, WIDTH, TOP_K, HIDDEN = 8, 16, 2, 32  # of conftest's teacher


def stream_of(folder: Path) -> StreamedTeacher:
    return StreamedTeacher(open_teacher(folder), torch.float32, torch.device("cpu"))


def reference(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Per layer: activations h [N, E, I], routing weights w [N, E] and the output y [N, H]."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    found: list[dict[str, torch.Tensor]] = []

    def look(mlp: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        hidden = args[0].flatten(0, 1)
        probabilities = (hidden @ mlp.gate.weight.T).softmax(-1)
        top, index = probabilities.topk(TOP_K, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(1, index, top / top.sum(-1, True))
        gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)
        h = torch.nn.functional.silu(torch.einsum("nh,eih->nei", hidden, gate))
        h = h * torch.einsum("nh,eih->nei", hidden, up)
        found.append(
            {"h": h, "w": weights, "y": output.flatten(0, 1), "d": mlp.experts.down_proj.detach()}
        )

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    with torch.no_grad():
        model(TOKENS)
    return found


def test_statistics_are_their_definitions(tiny_teacher: Path) -> None:
    layers = collect(stream_of(tiny_teacher), TOKENS, 4)
    for layer, expected in zip(layers, reference(tiny_teacher), strict=True):
        assert layer.n_tokens == TOKENS.numel()
        weighted = (expected["w"][:, :, None] * expected["h"]).square().sum(0)
        np.testing.assert_allclose(layer.weighted_square_sum, weighted, rtol=1e-4)
        norms = expected["d"].square().sum(1)
        np.testing.assert_allclose(layer.down_square_norm, norms, rtol=1e-5)
        np.testing.assert_allclose(layer.mean_weight, expected["w"].mean(0), rtol=1e-4)
        assert layer.greedy is None


def test_the_greedy_order_lowers_the_error_as_it_says(tiny_teacher: Path) -> None:
    count = EXPERTS * WIDTH
    layers = collect(stream_of(tiny_teacher), TOKENS, 4, greedy=8, candidates=count)
    for layer, expected in zip(layers, reference(tiny_teacher), strict=True):
        neurons, gains = CHOICES["greedy"](layer, 8), layer.greedy_gain
        assert neurons.shape == (8, 2)
        assert gains is not None
        # The first is the one that alone explains most (the ridge is small).
        h = expected["h"].flatten(1)
        alone = (h.T @ expected["y"]).square().sum(1) / (
            h.square().sum(0) + 1e-2 * h.square().sum(0).mean()
        )
        assert int(alone.argmax()) == neurons[0, 0] * WIDTH + neurons[0, 1]
        assert gains[0] == pytest.approx(
            float(alone.max() / expected["y"].square().sum()), rel=1e-4
        )
        assert 0 < gains.sum() < 1
        assert CHOICES["greedy"](layer, 3).tolist() == neurons[:3].tolist()
        with pytest.raises(UserError, match="have 8 neurons in greedy order, not 9"):
            CHOICES["greedy"](layer, 9)


def test_file_holds_what_was_collected(tiny_teacher: Path, tmp_path: Path) -> None:
    layers = collect(stream_of(tiny_teacher), TOKENS, 4, greedy=5)
    write_neurons(tmp_path / "n.safetensors", layers, {"model_type": "qwen3_moe"})
    again, metadata = read_neurons(tmp_path / "n.safetensors")
    assert metadata["model_type"] == "qwen3_moe"
    for before, after in zip(layers, again, strict=True):
        assert (before.layer, before.n_tokens) == (after.layer, after.n_tokens)
        np.testing.assert_allclose(after.weighted_square_sum, before.weighted_square_sum, 1e-6)
        assert after.greedy is not None
        assert after.greedy.tolist() == CHOICES["greedy"](before, 5).tolist()
        assert CHOICES["contribution"](after, 40).tolist() == (
            CHOICES["contribution"](before, 40).tolist()
        )


@pytest.mark.parametrize("choice", CHOICES)
def test_stages_write_the_student_of_these_neurons(
    choice: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    write_tokens(tmp_path / "tokens.safetensors", TOKENS, {"source": "random"})
    teacher, tokens = str(tiny_teacher), str(tmp_path / "tokens.safetensors")
    calls = [
        ["neurons", teacher, "n.safetensors", "--tokens", tokens],
        ["merge", teacher, "s", "--neurons", "n.safetensors", "--width", "40", "--multiple", "8"],
        ["merge", teacher, "again", "--plan", "s/plan.json"],
    ]
    calls[0] += ["--choice", "greedy", "--width", "40", "--multiple", "8"]
    calls[1] += ["--choice", choice]
    here = {"n.safetensors", "s", "again", "s/plan.json"}
    for call in calls:
        words = [str(tmp_path / word) if word in here else word for word in call]
        assert main(words) == 0, call
    plan = json.loads((tmp_path / "s/plan.json").read_text())
    assert plan["keep"] is None
    original = load_file(tiny_teacher / "model.safetensors")
    assert sha256_of(tmp_path / "again/model.safetensors") == sha256_of(
        tmp_path / "s/model.safetensors"
    )
    student = load_file(tmp_path / "s/model.safetensors")
    assert json.loads((tmp_path / "s/config.json").read_text())["intermediate_size"] == 40
    layers, _ = read_neurons(tmp_path / "n.safetensors")
    for index, layer in enumerate(plan["layers"]):
        kept = {(g["experts"][0], n) for g in layer["groups"] for n in g["neurons"]}
        assert kept == {tuple(pair) for pair in CHOICES[choice](layers[index], 40).tolist()}
        column = 0
        for group in layer["groups"]:
            (expert,) = group["experts"]
            assert group["scale"] == pytest.approx(float(layers[index].mean_weight[expert]))
            for neuron in group["neurons"]:
                ours, theirs = f"model.layers.{index}.mlp.", f"experts.{expert}."
                for name in ("gate_proj.weight", "up_proj.weight"):
                    row = original[f"{ours}{theirs}{name}"][neuron]
                    assert torch.equal(student[ours + name][column], row)
                down = original[f"{ours}{theirs}down_proj.weight"][:, neuron] * group["scale"]
                torch.testing.assert_close(student[f"{ours}down_proj.weight"][:, column], down)
                column += 1
        assert column == 40


def test_options_of_merge_that_do_not_go_together(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        ("--neurons", "n", "--keep", "4"): "--keep: does not go with --neurons",
        ("--plan", "p", "--width", "8"): "--width: does not go with --plan",
        ("--ranking", "r", "--width", "8"): "missing --statistics, --gram, --grouping",
        ("--width", "8"): "missing --ranking",
        ("--neurons", "n", "--width", "8", "--params", "1B"): "give one of --width and --params",
        ("--neurons", str(tmp_path / "none")): "no such file",
    }
    for options, message in cases.items():
        assert main(["merge", str(tiny_teacher), str(tmp_path / "s"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    call = ["neurons", str(tiny_teacher), str(tmp_path / "n"), "--tokens", "c"]
    assert main([*call, "--width", "8"]) == 2
    assert "--width: is of use with --choice greedy alone" in capsys.readouterr().err


def test_greedy_neurons_in_one_call_are_those_of_the_stages(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    write_tokens(tmp_path / "tokens.safetensors", TOKENS, {"source": "random"})
    tokens = str(tmp_path / "tokens.safetensors")
    out = m2d.convert(
        tiny_teacher, tmp_path / "s", tokens=tokens, dtype="float32",
        granularity="neurons", choice="greedy", width=40, multiple=8, refit="layer",
        weighting="relative",
    )  # fmt: skip
    layers = collect(stream_of(tiny_teacher), TOKENS, 8, greedy=40)
    plan = json.loads((out / "plan.json").read_text())
    for layer, found in zip(layers, plan["layers"], strict=True):
        kept = {(g["experts"][0], n) for g in found["groups"] for n in g["neurons"]}
        assert kept == {tuple(pair) for pair in CHOICES["greedy"](layer, 40).tolist()}
    assert json.loads((out / "m2d.json").read_text())["refit"]["weighting"] == "relative"


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt_oss", "qwen2_moe", "emo"])
def test_other_families_keep_neurons_beside_their_shared_experts(
    name: str, tmp_path: Path, tiny_text: Path
) -> None:
    folder = family_teachers.make(name, tmp_path / "t")
    out = m2d.convert(
        folder, tmp_path / "s", text=[tiny_text], sequences=60, length=16,
        granularity="neurons", width=48, multiple=8, refit="layer",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(out)
    teacher = open_teacher(folder)
    assert count_parameters(model) == parameters_of(teacher, 48)
    assert torch.isfinite(model(TOKENS).logits).all()
    about = json.loads((out / "m2d.json").read_text())
    assert all(layer["after"] < layer["before"] for layer in about["refit"]["layers"])


def test_all_neurons_of_a_uniform_teacher_are_the_teacher(tmp_path: Path, tiny_text: Path) -> None:
    folder = family_teachers.make_uniform("qwen3_moe", tmp_path / "t")
    out = m2d.convert(
        folder, tmp_path / "s", text=[tiny_text], sequences=4, length=16,
        granularity="neurons", width=family_teachers.EXPERTS * family_teachers.WIDTH,
    )  # fmt: skip
    with torch.no_grad():
        expected, got = (
            AutoModelForCausalLM.from_pretrained(f)(TOKENS).logits for f in (folder, out)
        )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_parameters_give_the_width(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = open_teacher(tiny_teacher)
    for width in (8, 40, EXPERTS * WIDTH):
        exact = parameters_of(teacher, width)
        assert width_for(teacher, exact, 8) == width
        if width > 8:
            assert width_for(teacher, exact - 1, 8) == width - 8
    per_neuron = 2 * 3 * HIDDEN  # two layers; gate, up and down
    assert width_for(teacher, parameters_of(teacher, 40) + per_neuron, multiple=1) == 41
    with pytest.raises(UserError, match=r"--params 1,000: too few; .* has at least"):
        width_for(teacher, 1000)
    with pytest.raises(UserError, match="too many; with all 128 neurons"):
        width_for(teacher, 10**9)
    row = inspect(teacher, width=40)["students"][-1]
    assert row == {
        "keep": None,
        "groups": None,
        "intermediate_size": 40,
        "parameters": parameters_of(teacher, 40),
    }
    # A layer that is dense in the teacher sets a least width, below which nothing is saved.
    mixed = open_teacher(make_teacher(tmp_path / "t", mlp_only_layers=[0], intermediate_size=64))
    assert width_for(mixed, parameters_of(mixed, 64), 8) == 64
    with pytest.raises(UserError, match="too few"):
        width_for(mixed, parameters_of(mixed, 64) - 1, 8)


def test_widths_are_what_quantised_types_want(tmp_path: Path) -> None:
    teacher = open_teacher(make_teacher(tmp_path / "t", moe_intermediate_size=300))
    exact = parameters_of(teacher, 512)
    assert width_for(teacher, exact) == 512
    assert width_for(teacher, exact - 1) == 256
    assert chosen_width(teacher, 768, None) == 768
    assert chosen_width(teacher, None, None) == 2 * 300  # whole experts, whatever their width
    with pytest.raises(
        UserError, match=r"--width 300: not a multiple of 256.* give 256 or 512, or"
    ):
        chosen_width(teacher, 300, None)
    assert chosen_width(teacher, 300, None, 4) == 300
    with pytest.raises(UserError, match=r"not a multiple of 256.* give 2304, or --multiple 2"):
        chosen_width(teacher, 2398, None)
    # Shared experts of 64 are appended: 192 neurons make 256.
    shared = open_teacher(family_teachers.make("deepseek_v2", tmp_path / "d"))
    assert shared.shared_width == 64
    assert width_for(shared, parameters_of(shared, 192)) == 192
    assert chosen_width(shared, 192, None) == 192
    with pytest.raises(UserError, match="with the shared experts' 64 not a multiple of 256"):
        chosen_width(shared, 256, None)


@pytest.mark.parametrize(
    ("text", "value"), [("2.5B", 2_500_000_000), ("700m", 700_000_000), ("90k", 90_000), ("12", 12)]
)
def test_numbers_of_parameters(text: str, value: int) -> None:
    assert number_of_parameters(text) == value


@pytest.mark.parametrize("text", ["", "B", "-1", "0", "2.5G", "two"])
def test_what_is_no_number_of_parameters(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number such as 2\.5B"):
        number_of_parameters(text)


def test_options_that_do_not_go_together(tiny_teacher: Path, tiny_text: Path, tmp_path) -> None:
    wrong: list[tuple[dict, str]] = [
        ({"granularity": "neurons", "keep": 4}, "--keep counts experts"),
        ({"granularity": "neurons", "width": 129}, "width is 129; it must lie between 1 and 128"),
        ({"granularity": "neurons", "width": 8, "params": 9}, "one of --width and --params"),
        ({"width": 64}, "the width of a student of whole experts goes by --groups"),
        ({"granularity": "layers"}, "unknown granularity 'layers'; known: experts, neurons"),
        ({"refit": "all"}, "unknown refit 'all'; known: layer, sequential"),
        ({"refit": "layer", "sequences": 1}, "at least 2 sequences"),
    ]
    for options, message in wrong:
        call = {"text": [tiny_text], "sequences": 2, "length": 8, **options}
        with pytest.raises(UserError, match=message):
            m2d.convert(tiny_teacher, tmp_path / "s", **call)
    assert not list(tmp_path.iterdir())
