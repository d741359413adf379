"""Refit: against dense least squares, on students that can and cannot represent their teacher."""

import json
from pathlib import Path

import family_teachers
import pytest
import torch
from conftest import VOCABULARY, forget_digests, make_teacher, write_tokens
from family_teachers import MAKERS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import m2d
from m2d.cli import main
from m2d.errors import UserError
from m2d.models.teacher import open_teacher
from m2d.refit.refit import refit, write_refitted
from m2d.refit.splits import held_out_sequences
from m2d.students.rewrite import as_on_disk

TOKENS = torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(5))
OPTIONS = {"dtype": torch.float64, "device": torch.device("cpu"), "batch": 5}


def load(folder: Path) -> torch.nn.Module:
    # The default for experts, a grouped product, knows no float64.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder)(TOKENS).logits


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_teacher, tiny_text) -> Path:  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp("students") / "plain"
    return m2d.convert(tiny_teacher, out, text=[tiny_text], sequences=4, length=16)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    write_tokens(file, TOKENS, {"source": "random"})
    return file


def scramble(folder: Path) -> None:
    """Replace every FFN's down projection by noise."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        # Shared experts that stay apart, and dense layers of the teacher, are no target of a refit.
        down = "down_proj" in name or ".w2." in name or "output_linear" in name
        if down and "shared" not in name:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    forget_digests(folder)


@pytest.mark.parametrize("variant", ["layer", "sequential"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_student_that_can_represent_its_teacher_recovers_it(
    name: str, variant: str, tmp_path: Path, tiny_text: Path
) -> None:
    """In every family: scramble the down projections of an exact student; refit; same logits."""
    folder = family_teachers.make_uniform(name, tmp_path / "t")
    made = m2d.convert(
        folder, tmp_path / "s", text=[tiny_text], sequences=2, length=8,
        keep=open_teacher(folder).top_k,
    )  # fmt: skip
    exact = load_file(made / "model.safetensors")
    teacher = open_teacher(folder)
    scramble(made)
    dense = set(range(teacher.config.num_hidden_layers)) - set(teacher.moe_layers)
    tensors = load_file(made / "model.safetensors")
    for key, tensor in tensors.items():
        if any(f".layers.{i}." in key for i in dense):
            tensor.copy_(exact[key])
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    tokens = torch.randint(0, VOCABULARY, (80, 16), generator=torch.Generator().manual_seed(6))
    found = refit(teacher, made, tokens, variant, ridges=[1e-11], **OPTIONS)
    out = write_refitted(made, tmp_path / "r", teacher.family, found, {})
    assert {layer.layer for layer in found.layers} == set(teacher.moe_layers)
    for layer in found.layers:
        assert layer.after < 1e-9 * layer.target < layer.before
    with torch.no_grad():
        expected, got = (AutoModelForCausalLM.from_pretrained(f).eval()(TOKENS).logits
                         for f in (folder, out))  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def blocks(model: torch.nn.Module) -> tuple[list[torch.Tensor], ...]:
    """Inputs and outputs of every FFN, and the residual stream after every layer, [N, ...]."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    streams: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda module, args, out: (inputs.append(args[0]), outputs.append(out), None)[-1]
        )
        layer.register_forward_hook(lambda module, args, out: streams.append(out))
    with torch.no_grad():
        model(TOKENS)
    return tuple([t.flatten(0, 1) for t in part] for part in (inputs, outputs, streams))


def inner(mlp: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)


def ridge_by_lstsq(h: torch.Tensor, y: torch.Tensor, towards: torch.Tensor, ridge: float):
    """Dense float64 least squares with the ridge as rows below."""
    root = (ridge * h.square().sum(0).mean()).sqrt() * torch.eye(h.shape[1], dtype=h.dtype)
    return torch.linalg.lstsq(torch.cat([h, root]), torch.cat([y, root @ towards])).solution


def mean_square(error: torch.Tensor) -> float:
    return float(error.square().sum(1).mean())


@torch.no_grad()
@pytest.mark.parametrize("variant", ["layer", "sequential"])
def test_it_is_dense_least_squares(variant: str, student: Path, tiny_teacher: Path) -> None:
    ridge = 1e-2
    found = refit(open_teacher(tiny_teacher), student, TOKENS, variant, ridges=[ridge], **OPTIONS)
    assert [layer.ridge for layer in found.layers] == [ridge, ridge]
    inputs, targets, streams = blocks(load(tiny_teacher))
    dense = load(student)
    for index, layer in enumerate(dense.model.layers):
        if variant == "sequential":
            inputs, _, own = blocks(dense)
            # The student's stream before its FFN adds to it: after it, less what it added.
            before = own[index] - layer.mlp(inputs[index])
            target = streams[index] - before
        else:
            target = targets[index]
        h = inner(layer.mlp, inputs[index])
        towards = layer.mlp.down_proj.weight.T
        expected = ridge_by_lstsq(h, target, towards, ridge)
        rows = found.rows[index]
        # float32 on disk rounds them.
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
        report = found.layers[index]
        assert report.target == pytest.approx(mean_square(target), rel=1e-9)
        assert report.before == pytest.approx(mean_square(target - h @ towards), rel=1e-6)
        assert report.after == pytest.approx(mean_square(target - h @ rows), rel=1e-6)
        if variant == "sequential":
            layer.mlp.down_proj.weight.copy_(rows.T)


@torch.no_grad()
def test_relative_weighting_is_weighted_least_squares(student: Path, tiny_teacher: Path) -> None:
    found = refit(
        open_teacher(tiny_teacher), student, TOKENS, "layer",
        ridges=[1e-2], weighting="relative", **{**OPTIONS, "batch": len(TOKENS)},
    )  # fmt: skip
    inputs, targets, streams = blocks(load(tiny_teacher))
    for index, layer in enumerate(load(student).model.layers):
        weights = 1 / streams[index].square().sum(1, keepdim=True)
        root = (weights / weights.mean()).sqrt()
        h = root * inner(layer.mlp, inputs[index])
        towards = layer.mlp.down_proj.weight.T
        expected = ridge_by_lstsq(h, root * targets[index], towards, 1e-2)
        torch.testing.assert_close(found.rows[index], expected, rtol=1e-5, atol=1e-5)


def test_the_first_layer_is_the_same_in_both_variants(student, tiny_teacher) -> None:
    found = [
        refit(open_teacher(tiny_teacher), student, TOKENS, v, **OPTIONS)
        for v in ("layer", "sequential")
    ]
    assert torch.equal(found[0].rows[0], found[1].rows[0])
    assert found[0].layers[0] == found[1].layers[0]
    assert not torch.equal(found[0].rows[1], found[1].rows[1])


@pytest.mark.parametrize("variant", ["layer", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [2, 24])
def test_the_calibration_error_never_rises(
    variant: str, dtype: torch.dtype, sequences: int, student, tiny_teacher
) -> None:
    options = {**OPTIONS, "dtype": dtype}
    found = refit(open_teacher(tiny_teacher), student, TOKENS[:sequences], variant, **options)
    for layer in found.layers:
        assert layer.after <= layer.before
        assert layer.held_out_after <= layer.held_out_before
        assert (layer.ridge is None) == (layer.after == layer.before)


def test_dense_layers_of_the_teacher_stay(tmp_path: Path, tiny_text: Path) -> None:
    folder = make_teacher(
        tmp_path / "t", num_hidden_layers=3, mlp_only_layers=[1], intermediate_size=40
    )
    made = m2d.convert(folder, tmp_path / "s", text=[tiny_text], sequences=2, length=8)
    teacher = open_teacher(folder)
    found = refit(teacher, made, TOKENS, "sequential", **OPTIONS)
    assert sorted(found.rows) == [0, 2]
    out = write_refitted(made, tmp_path / "r", teacher.family, found, {})
    before, after = (load_file(f / "model.safetensors") for f in (made, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)}
    # Columns of zeros, which a narrower layer is padded with, are of no account.
    assert before["model.layers.0.mlp.down_proj.weight"].shape == (32, 40)
    assert not after["model.layers.0.mlp.down_proj.weight"][:, 32:].any()


def test_command(student: Path, tiny_teacher: Path, calibration: Path, tmp_path: Path) -> None:
    call = ["refit", str(student), str(tiny_teacher), str(tmp_path / "r")]
    assert main([*call, "--tokens", str(calibration), "--variant", "layer"]) == 0
    about = json.loads((tmp_path / "r/m2d.json").read_text())
    assert about["refit"]["variant"] == "layer"
    assert about["refit"]["sequences"] == 24
    assert [layer["layer"] for layer in about["refit"]["layers"]] == [0, 1]
    assert about["plan"] == json.loads((student / "m2d.json").read_text())["plan"]
    assert "down projections" in (tmp_path / "r/README.md").read_text()
    for name in ("config.json", "plan.json", "tokenizer.json"):
        assert (tmp_path / "r" / name).read_bytes() == (student / name).read_bytes()
    # Closer to the teacher than before, on the tokens of its calibration.
    expected = logits(tiny_teacher).log_softmax(-1)
    divergences = [
        float((expected.exp() * (expected - logits(folder).log_softmax(-1))).sum(-1).mean())
        for folder in (student, tmp_path / "r")
    ]
    assert divergences[1] < 0.8 * divergences[0]


def test_bad_input_is_one_line(
    student: Path, tiny_teacher: Path, calibration: Path, tmp_path: Path, capsys
) -> None:
    out = str(tmp_path / "r")
    few = tmp_path / "few.safetensors"
    write_tokens(few, TOKENS[:1], {})
    other = make_teacher(tmp_path / "other", hidden_size=16)
    deeper = make_teacher(tmp_path / "deeper", num_hidden_layers=3)
    wrong = [
        ([str(student), str(tiny_teacher), str(student)], calibration, "exists already"),
        ([str(student), str(tiny_teacher), out], few, "at least 2 sequences"),
        ([str(student), str(other), out], calibration, "hidden_size is 32, the teacher's is 16"),
        ([str(student), str(deeper), out], calibration, "num_hidden_layers is 2"),
        ([str(tiny_teacher), str(tiny_teacher), out], calibration, "has 8 experts; students of"),
        ([str(student), str(student), out], calibration, "not a Mixture-of-Experts model"),
        ([str(student), str(tiny_teacher), out], student / "model.safetensors", "input_ids"),
    ]
    capsys.readouterr()
    for words, tokens, message in wrong:
        assert main(["refit", *words, "--tokens", str(tokens)]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert message in errors[0]
    assert not Path(out).exists()


def test_an_unknown_variant_is_refused(student: Path, tiny_teacher: Path) -> None:
    with pytest.raises(UserError, match="unknown refit 'both'; known: layer, sequential"):
        refit(open_teacher(tiny_teacher), student, TOKENS, "both", **OPTIONS)
    with pytest.raises(UserError, match="unknown weighting 'none'; known: equal, relative"):
        refit(open_teacher(tiny_teacher), student, TOKENS, "layer", weighting="none", **OPTIONS)


def test_held_out_sequences() -> None:
    assert held_out_sequences(10, 4).nonzero().flatten().tolist() == [3, 7]
    assert held_out_sequences(3, 8).tolist() == [False, False, True]
    assert held_out_sequences(2, 8).tolist() == [False, True]


def test_forms_on_disk() -> None:
    weight, bias = torch.arange(6.0).view(2, 3), torch.arange(2.0)
    assert torch.equal(as_on_disk(weight, (2, 3), True), weight)
    assert torch.equal(as_on_disk(weight, (1, 2, 3), False), weight[None])
    assert torch.equal(as_on_disk(weight, (1, 3, 2), True), weight.T[None])
    assert torch.equal(as_on_disk(bias, (2,), True), bias)
    assert torch.equal(as_on_disk(bias, (1, 2), True), bias[None])
