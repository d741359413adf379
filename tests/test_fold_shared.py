"""The gate of a shared expert, folded: exact where it can be, brute force elsewhere."""

import json
from pathlib import Path

import family_teachers
import pytest
import torch
from conftest import VOCABULARY, write_tokens
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

import m2d
from m2d.cli import main
from m2d.models.folded import read_folds, write_folds
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.refit.fold import collect_folds
from m2d.refit.fold_choice import SHARED_ALPHAS
from m2d.refit.splits import held_out_sequences

TOKENS = torch.randint(0, VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    ).eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder)(TOKENS).logits


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.safetensors"
    write_tokens(file, TOKENS, {})
    return file


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A Qwen2-MoE: two MoE layers and a dense one between them."""
    return family_teachers.make("qwen2_moe", tmp_path / "teacher")


def stream_of(folder: Path) -> StreamedTeacher:
    return StreamedTeacher(open_teacher(folder), torch.float32, CPU)


@torch.no_grad()
def by_hand(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Per MoE layer, float64, of the shared expert: z and u [N, I], v x [N, 1] and d [H, I]."""
    model, found = load(folder, torch.float64), []

    def look(block: torch.nn.Module, args: tuple, _: object) -> None:
        x, ffn = args[0].flatten(0, 1), block.shared_expert
        found.append(
            {"z": ffn.gate_proj(x), "u": ffn.up_proj(x),
             "logit": block.shared_expert_gate(x), "d": ffn.down_proj.weight}
        )  # fmt: skip

    for layer in model.model.layers:
        if hasattr(layer.mlp, "shared_expert"):
            layer.mlp.register_forward_hook(look)
    model(TOKENS)
    return found


@torch.no_grad()
def test_r2_scale_and_choice_are_their_definitions(teacher: Path) -> None:
    folds = collect_folds(stream_of(teacher), TOKENS, 5, "layer")
    held = held_out_sequences(len(TOKENS), 8).repeat_interleave(TOKENS.shape[1])
    for fold, layer in zip(folds.values(), by_hand(teacher), strict=True):
        energy = layer["d"].square().sum(0)
        t = layer["logit"].sigmoid() * silu(layer["z"]) * layer["u"]

        def left(alpha, where, layer=layer, t=t, energy=energy):
            """The error that each neuron's best constant leaves; the whole expert's constant."""
            f = silu(layer["z"] + alpha * layer["logit"]) * layer["u"]
            tf, ff = (t * f)[~held].sum(0), f[~held].square().sum(0)
            error = ((t - tf / ff * f)[where].square().sum(0) * energy).sum()
            return float(error), float((energy * tf).sum() / (energy * ff).sum())

        best = min((0.0, *SHARED_ALPHAS), key=lambda alpha: left(alpha, ~held)[0])
        total = float((t[held].square().sum(0) * energy).sum())
        report = fold.shared.report
        assert report.choice == "layer"
        assert report.alpha == pytest.approx(best)
        assert report.r2_before == pytest.approx(1 - left(0.0, held)[0] / total, abs=1e-4)
        assert report.r2_after == pytest.approx(1 - left(best, held)[0] / total, abs=1e-4)
        assert float(fold.shared.scale) == pytest.approx(left(best, ~held)[1], rel=1e-3)


def test_the_file_says_all_of_it(teacher: Path, tmp_path: Path) -> None:
    folds = collect_folds(stream_of(teacher), TOKENS, 5, "neuron")
    write_folds(tmp_path / "fold.safetensors", folds, {"mode": "neuron"})
    again, about = read_folds(tmp_path / "fold.safetensors")
    for index, fold in folds.items():
        assert again[index].report == fold.report
        assert again[index].shared.report == fold.shared.report
        for part in ("alpha", "rows", "offset", "shift", "scale"):
            assert torch.equal(getattr(again[index].shared, part), getattr(fold.shared, part))
    assert [layer["shared"]["choice"] for layer in about["layers"]] == ["neuron", "neuron"]


def test_a_gate_that_a_gate_row_can_express_folds_exactly(
    tmp_path: Path, calibration: Path
) -> None:
    """Gate rows of 0 and a sigmoid for activation: sigmoid(v x) u is the shared expert itself."""
    folder = family_teachers.make(
        "qwen2_moe", tmp_path / "t", hidden_act="sigmoid", num_experts=2, num_experts_per_tok=2
    )
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ("expert" in name and "gate_proj" in name) or "gate_up_proj" in name:
            rows = len(tensor) if tensor.dim() == 2 else tensor.shape[1] // 2
            (tensor if tensor.dim() == 2 else tensor[:, :rows]).zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expected = logits(folder)
    close = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
    options = {"tokens": calibration, "scaling": "least_squares"}
    out = m2d.convert(folder, tmp_path / "s", fold="layer", **options)
    for layer in json.loads((out / "m2d.json").read_text())["fold"]["layers"]:
        assert (layer["shared"]["alpha"], layer["shared"]["choice"]) == (1.0, "layer")
        assert layer["shared"]["r2_before"] < 0.98
        assert layer["shared"]["r2_after"] == pytest.approx(1.0, abs=1e-5)
    for layer in json.loads((out / "plan.json").read_text())["layers"]:
        assert layer["shared_scale"] == pytest.approx(0.5, rel=1e-4)  # what a gate of 0 gives
    torch.testing.assert_close(logits(out), expected, **close)
    plain = m2d.convert(folder, tmp_path / "p", **options)
    assert not torch.allclose(logits(plain), expected, **close)


def test_alpha_0_is_the_unfolded_student_bit_for_bit(
    teacher: Path, tmp_path: Path, calibration: Path
) -> None:
    for name, more in (("plain", {}), ("zero", {"fold": "fixed", "alpha": 0.0})):
        m2d.convert(teacher, tmp_path / name, tokens=calibration, **more)
    plain, zero = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "zero"))
    assert plain == zero
    plans = [json.loads((tmp_path / n / "plan.json").read_text()) for n in ("plain", "zero")]
    assert plans[0]["layers"] == plans[1]["layers"]


def test_the_teachers_own_class_keeps_its_gate(
    teacher: Path, tmp_path: Path, calibration: Path
) -> None:
    out = m2d.convert(
        teacher, tmp_path / "s", tokens=calibration, fold="neuron", student_class="same"
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, teacher))
    for name in theirs:
        if "shared_expert" in name:
            assert torch.equal(ours[name], theirs[name])
    record = json.loads((out / "m2d.json").read_text())
    assert all("shared" not in layer for layer in record["fold"]["layers"])


def test_refit_and_align_begin_at_the_folded_shared_expert(
    teacher: Path, tmp_path: Path, calibration: Path
) -> None:
    """Its rows are columns of the dense FFN like any other."""
    more = {"tokens": calibration, "granularity": "neurons", "width": 32, "multiple": 8}
    out = m2d.convert(teacher, tmp_path / "s", fold="neuron", **more)
    fold = collect_folds(stream_of(teacher), TOKENS, 8, "neuron")[0].shared
    gate = load_file(teacher / "model.safetensors")[
        "model.layers.0.mlp.shared_expert.gate_proj.weight"
    ]
    ours = load_file(out / "model.safetensors")
    # After the 32 neurons; zeros fill up to the dense layer's width.
    rows = ours["model.layers.0.mlp.gate_proj.weight"][32 : 32 + len(gate)]
    torch.testing.assert_close(rows, fold.gate(0, gate))
    for name, steps in (
        ("refit", {"refit": "sequential"}),
        ("all", {"recipe": "best", "align": 4}),
    ):
        student = m2d.convert(teacher, tmp_path / name, fold="neuron", **more, **steps)
        assert type(load(student)).__name__ == "Qwen2ForCausalLM"
        for layer in json.loads((student / "m2d.json").read_text())["refit"]["layers"]:
            assert layer["held_out_after"] <= layer["held_out_before"]


def test_the_report_has_the_shared_expert_too(
    teacher: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    assert (
        main(["fold-report", str(teacher), "--tokens", str(calibration), "--json", str(out)]) == 0
    )
    folds = collect_folds(stream_of(teacher), TOKENS, 8, "neuron")
    for row, fold in zip(json.loads(out.read_text())["layers"], folds.values(), strict=True):
        report = fold.shared.report
        assert row["shared, unfolded"] == pytest.approx(report.r2_before)
        assert row["shared, per neuron"] == pytest.approx(report.r2_after)
    assert "shared expert's gate: R2" in capsys.readouterr().out
