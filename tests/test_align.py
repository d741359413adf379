"""Alignment: against a plain training loop, never worse, resumable, in every family."""

import json
from pathlib import Path
from typing import Any

import family_teachers
import pytest
import torch
from conftest import VOCABULARY, forget_digests, write_tokens
from family_teachers import MAKERS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import m2d
from m2d.cli import main
from m2d.errors import UserError
from m2d.models import resume
from m2d.models.teacher import open_teacher
from m2d.refit import align as module
from m2d.refit import training
from m2d.refit.align import AlignSettings, align, align_student
from m2d.refit.muon import Muon, orthogonalise

TOKENS = torch.randint(0, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(5))
OPTIONS = {"dtype": torch.float32, "device": torch.device("cpu"), "batch": 5}
FEW = AlignSettings(steps=3, tokens=128)


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_teacher, tiny_text) -> Path:  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp("students") / "plain"
    return m2d.convert(tiny_teacher, out, text=[tiny_text], sequences=4, length=16)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def streams(folder: Path, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of layer `index`: the FFN's input, the stream before its output is added, and after."""
    model, seen = load(folder), {}
    layer = model.model.layers[index]
    layer.mlp.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    layer.register_forward_hook(lambda _, args, out: seen.update(z=out))
    with torch.no_grad():
        model(TOKENS)
    x, y, z = (seen[key].flatten(0, 1) for key in "xyz")
    return x, z - y, z


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_layer_is_trained_as_a_plain_loop_would(
    optimiser: str, student: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[dict[str, torch.Tensor]] = []
    own = training.train_block

    def keep(*args):  # type: ignore[no-untyped-def]
        block = own(*args)
        trained.append({n: p.detach().clone() for n, p in block.named_parameters()})
        return block

    monkeypatch.setattr(training, "train_block", keep)
    tokens = 21 * 16  # all that are not held out, so that their order does not matter
    settings = AlignSettings(steps=4, tokens=tokens, optimiser=optimiser, learning_rate=0.1)
    align(open_teacher(tiny_teacher), student, TOKENS, settings, **OPTIONS)

    x, before, _ = streams(student, 0)  # the first layer: nothing is changed before it
    goal = streams(tiny_teacher, 0)[2]
    fit = (torch.arange(24) % 8 != 7).repeat_interleave(16)
    mlp = load(student).model.layers[0].mlp
    parameters = list(mlp.parameters())
    rates = [0.1 * float(p.detach().square().mean().sqrt()) for p in parameters]
    optimisers = []
    for parameter, rate in zip(parameters, rates, strict=True):
        if optimiser == "adamw":
            made = torch.optim.AdamW([parameter], rate, betas=(0.9, 0.95), weight_decay=0)
        else:
            made = Muon([{"params": [parameter], "scale": 1.0}], rate)
        optimisers.append(made)
    for step in range(4):
        factor = min(step + 1, 1 - 0.98 * step / 3)
        error = before + mlp(x) - goal
        loss = (error.square().sum(1) / goal.square().sum(1))[fit].mean()
        for made, rate in zip(optimisers, rates, strict=True):
            made.zero_grad()
            made.param_groups[0]["lr"] = rate * factor
        loss.backward()
        for made in optimisers:
            made.step()
    for name, parameter in mlp.named_parameters():
        torch.testing.assert_close(trained[0][name], parameter.detach(), rtol=1e-3, atol=1e-4)


def test_reported_errors_are_those_of_the_streams(
    student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    align_student(open_teacher(tiny_teacher), student, out, TOKENS, FEW, **OPTIONS)
    held = (torch.arange(24) % 8 == 7).repeat_interleave(16)
    layers = json.loads((out / "m2d.json").read_text())["align"]["layers"]
    for index, report in enumerate(layers):
        ours, goal = streams(out, index)[2][held], streams(tiny_teacher, index)[2][held]
        error = ((ours - goal).square().sum(1) / goal.square().sum(1)).mean()
        assert report["after"] == pytest.approx(float(error), rel=1e-3)
        assert report["after"] < report["before"]
    first = streams(student, 0)[2][held], streams(tiny_teacher, 0)[2][held]
    error = ((first[0] - first[1]).square().sum(1) / first[1].square().sum(1)).mean()
    assert layers[0]["before"] == pytest.approx(float(error), rel=1e-3)


def test_experts_that_are_always_taken_are_aligned_together(tmp_path: Path) -> None:
    """Students of Solar Open have as many experts as a token of the teacher takes."""
    experts = {"n_routed_experts": 8, "moe_intermediate_size": 16, "n_shared_experts": 1}
    changes = {**experts, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    teacher = family_teachers.save_stock(tmp_path / "t", "SolarOpen", changes)
    write_tokens(tmp_path / "tokens.safetensors", TOKENS, {"source": "random"})
    tokens, settings = tmp_path / "tokens.safetensors", AlignSettings(steps=8, tokens=128)
    student = m2d.convert(teacher, tmp_path / "s", tokens=tokens, keep=8, grouping="RR")
    opened = open_teacher(teacher)
    assert opened.family.student_experts == opened.top_k > 1
    out = align_student(opened, student, tmp_path / "a", TOKENS, settings, **OPTIONS)
    held = (torch.arange(24) % 8 == 7).repeat_interleave(16)
    for index, report in enumerate(json.loads((out / "m2d.json").read_text())["align"]["layers"]):
        ours, goal = streams(out, index)[2][held], streams(teacher, index)[2][held]
        error = ((ours - goal).square().sum(1) / goal.square().sum(1)).mean()
        assert report["kept"]
        assert report["after"] == pytest.approx(float(error), rel=1e-3)
        assert report["after"] < report["before"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_is_left_worse(dtype: torch.dtype, student: Path, tiny_teacher: Path) -> None:
    """A rate that ruins everything: the training is thrown away."""
    wild = AlignSettings(steps=4, tokens=64, learning_rate=5.0)
    options = {**OPTIONS, "dtype": dtype}
    found = align(open_teacher(tiny_teacher), student, TOKENS, wild, **options)
    original = load_file(student / "model.safetensors")
    for report in found.reports:
        assert report.trained > report.before >= report.after
        assert not report.kept
        kept = found.layers[report.layer]["gate_proj.weight"]
        name = f"model.layers.{report.layer}.mlp.gate_proj.weight"
        torch.testing.assert_close(kept.float(), original[name].to(dtype).float())


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_family_comes_nearer_to_its_teacher(
    name: str, tmp_path: Path, tiny_text: Path
) -> None:
    """An exact student whose FFNs are disturbed: alignment brings them back, the file loads."""
    folder = family_teachers.make_uniform(name, tmp_path / "t")
    keep = open_teacher(folder).top_k
    exactly: Any = {"student_class": "same"} if open_teacher(folder).family.approximated else {}
    settings: Any = {"text": [tiny_text], "sequences": 2, "length": 8, **exactly}
    made = m2d.convert(folder, tmp_path / "s", keep=keep, **settings)
    exact = load_file(made / "model.safetensors")
    tensors = {k: v.clone() for k, v in exact.items()}
    generator = torch.Generator().manual_seed(1)
    moe = [f".layers.{i}." for i in open_teacher(folder).moe_layers]
    parts = ("gate_proj", "up_proj", "gate_up", "down_proj", ".w1.", ".w3.", ".w2.", "put_linear")
    changed = set()
    for key, tensor in tensors.items():
        inside = any(layer in key for layer in moe) and "shared" not in key
        if inside and any(part in key for part in parts):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += 0.3 * noise * tensor.square().mean().sqrt()
            changed.add(key)
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    forget_digests(made)
    tokens = torch.randint(0, VOCABULARY, (64, 16), generator=torch.Generator().manual_seed(6))
    how = AlignSettings(steps=20, tokens=256, learning_rate=0.05)
    teacher = open_teacher(folder, student=made)
    out = align_student(teacher, made, tmp_path / "a", tokens, how, **OPTIONS)
    layers = json.loads((out / "m2d.json").read_text())["align"]["layers"]
    assert all(layer["kept"] and layer["after"] < 0.8 * layer["before"] for layer in layers)
    after = load_file(out / "model.safetensors")
    assert {key for key in after if not torch.equal(after[key], tensors[key])} == changed
    with torch.no_grad():
        expected, before, ours = (
            AutoModelForCausalLM.from_pretrained(f).eval()(tokens[:8]).logits
            for f in (folder, made, out)
        )
    assert (ours - expected).square().mean() < 0.8 * (before - expected).square().mean()


def test_it_goes_on_where_it_was_stopped(
    student: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path, settings: AlignSettings = FEW) -> bytes:
        align_student(open_teacher(tiny_teacher), student, out, TOKENS, settings, **OPTIONS)
        return (out / "model.safetensors").read_bytes()

    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    whole = run(tmp_path / "whole")
    own, calls = module.fit_block, []

    def stopped(*args):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(module, "fit_block", stopped)
    out = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        run(out)
    assert not out.exists()
    (work,) = tmp_path.glob(".a.layers-*")
    assert [file.name for file in work.glob("layer-*")] == ["layer-0.safetensors"]
    assert run(out) == whole
    assert len(calls) == 3  # the second layer alone was done again
    assert not work.exists()
    # Layers of other settings are not taken over.
    calls.clear()
    other = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        run(other, AlignSettings(steps=2, tokens=128))
    calls.append(1)
    assert run(other) == whole
    assert len(calls) == 5
    # A damaged one is one line.
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c")
    (kept_layer,) = tmp_path.glob(".c.layers-*/layer-*")
    kept_layer.write_bytes(kept_layer.read_bytes()[:-5])
    with pytest.raises(UserError, match="begin anew"):
        run(tmp_path / "c")


def test_the_command(
    student: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokens = tmp_path / "tokens.safetensors"
    write_tokens(tokens, TOKENS, {})
    arguments = ["align", str(student), str(tiny_teacher), str(tmp_path / "a")]
    arguments += ["--tokens", str(tokens), "--steps", "2", "--optimiser", "adamw"]
    assert main(arguments) == 0
    section = json.loads((tmp_path / "a" / "m2d.json").read_text())["align"]
    assert (section["steps"], section["optimiser"]) == (2, "adamw")
    assert "layer 1: relative error" in capsys.readouterr().err
    assert "Aligned" in (tmp_path / "a" / "README.md").read_text()
    assert main(arguments) == 2  # the folder is there


def test_bad_settings() -> None:
    for wrong in ({"optimiser": "sgd"}, {"steps": 0}, {"learning_rate": 0.0}):
        with pytest.raises(UserError):
            AlignSettings(**wrong)


def test_muon_takes_stacked_halves_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(1, 12, 8, generator=generator)
    gradient = torch.randn(1, 12, 8, generator=generator)
    whole = torch.nn.Parameter(both.clone())
    halves = [torch.nn.Parameter(half.clone()) for half in both[0].chunk(2)]
    whole.grad = gradient
    for half, own in zip(halves, gradient[0].chunk(2), strict=True):
        half.grad = own.clone()
    Muon([{"params": [whole], "halves": 2}], 0.1).step()
    Muon([{"params": halves}], 0.1).step()
    torch.testing.assert_close(whole[0], torch.cat(list(halves)))
    update = (both[0] - whole[0].detach())[:6]  # of RMS 0.2 x 0.1, roughly
    assert 0.01 < update.square().mean().sqrt() < 0.025


def test_orthogonalised_directions_are_those_of_the_svd() -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    singular = u.T @ orthogonalise(matrix) @ v.T
    assert singular.diagonal().min() > 0.6
    assert singular.diagonal().max() < 1.3
    assert (singular - torch.diag(singular.diagonal())).abs().max() < 1e-4
