"""Folding: exact where it can be, brute force elsewhere, and nothing at all where alpha is 0."""

import json
from pathlib import Path

import family_teachers
import pytest
import torch
from conftest import VOCABULARY, make_teacher, write_tokens
from family_teachers import EXPERTS, MAKERS, STOCK
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import m2d
from m2d.choose.plan import Group, LayerPlan, Plan
from m2d.cli import main
from m2d.errors import UserError
from m2d.models.folded import read_folds, with_shared_scales
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import Teacher, open_teacher
from m2d.refit import fold_choice
from m2d.refit.fold import collect_folds
from m2d.refit.fold_choice import ALPHAS, LEAST_GAIN, MODES
from m2d.refit.splits import held_out_sequences
from m2d.statistics.gram import GramTotals
from m2d.statistics.neurons import CandidateMoments
from m2d.students.merge import write_student

TOKENS = torch.randint(0, VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")


def stream_of(folder: Path) -> StreamedTeacher:
    return StreamedTeacher(open_teacher(folder), torch.float32, CPU)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder)(TOKENS).logits


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.safetensors"
    write_tokens(file, TOKENS, {})
    return file


def zero_gates(folder: Path) -> None:
    """Gate rows of 0: with a sigmoid for activation, a gate is then 1/2 whatever the token."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name and "gate_proj" in name and "shared" not in name:
            tensor.zero_()
        elif name.endswith("experts.gate_up_proj"):
            tensor[:, : tensor.shape[1] // 2] = 0
        elif name.endswith("e_score_correction_bias"):
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SIGMOID_ROUTER = {
    "num_experts_per_tok": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": False, "routed_scaling_factor": 1.0, "hidden_act": "sigmoid",
}  # fmt: skip


@pytest.mark.parametrize("granularity", ["experts", "neurons"])
@pytest.mark.parametrize(("kind", "alpha"), [("softmax", 2.0), ("sigmoid", 1.0)])
def test_a_weight_that_a_gate_row_can_express_folds_exactly(
    kind: str, alpha: float, granularity: str, tmp_path: Path, calibration: Path
) -> None:
    """Two experts, both always taken. Softmax: w_1 = sigmoid((r_1 - r_2) x), twice centred."""
    if kind == "softmax":
        folder = make_teacher(tmp_path / "t", num_experts=2, hidden_act="sigmoid")
    else:
        folder = family_teachers.make("deepseek_v3", tmp_path / "t", **SIGMOID_ROUTER)
    zero_gates(folder)
    teacher = open_teacher(folder)
    width = 2 * teacher.expert_width
    options = {"scaling": "least_squares"}
    if granularity == "neurons":
        options = {"granularity": "neurons", "choice": "greedy", "width": width, "multiple": 8}
    out = m2d.convert(
        folder, tmp_path / "s", tokens=calibration, fold="fixed", alpha=alpha, **options
    )
    folds = collect_folds(stream_of(folder), TOKENS, 4, "fixed", alpha)
    for found in folds.values():
        assert found.report.choice == "fixed"
        assert found.report.centred == (kind == "softmax")
        assert found.report.r2_after == pytest.approx(1.0, abs=1e-5)
        assert found.report.r2_before < 0.98
        torch.testing.assert_close(found.scale, torch.full((2,), 0.5), rtol=1e-4, atol=0)
    expected = logits(folder)
    close = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
    torch.testing.assert_close(logits(out), expected, **close)
    plain = m2d.convert(folder, tmp_path / "p", tokens=calibration, **options)
    assert not torch.allclose(logits(plain), expected, **close)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 4, "grouping": "WC", "scaling": "least_squares", "refit": "sequential"},
        {"granularity": "neurons", "choice": "greedy", "refit": "sequential"},
    ],
)
def test_alpha_0_is_the_unfolded_student_bit_for_bit(
    options: dict, tmp_path: Path, tiny_teacher: Path, calibration: Path
) -> None:
    for name, more in (("plain", {}), ("zero", {"fold": "fixed", "alpha": 0.0})):
        m2d.convert(tiny_teacher, tmp_path / name, tokens=calibration, **options, **more)
    plain, zero = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "zero"))
    assert plain == zero


def a_plan(teacher: Teacher) -> Plan:
    """Merged, whole and single neurons of experts, in every layer."""
    groups = (
        Group((1, 3), (0.25, 0.75), 0.5),
        Group((0,), (1.0,), 0.7),
        Group((4,), (1.0,), 0.3, (0, 5, 7)),
    )
    layers = tuple(LayerPlan(layer, groups) for layer in teacher.moe_layers)
    return Plan("by_hand", "by_hand", "by_hand", None, layers)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(set(MAKERS) & set(STOCK)))
def test_a_folded_student_is_that_of_a_teacher_with_other_gates(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every family: the same as editing the teacher's gates by hand and folding nothing."""
    monkeypatch.setattr(fold_choice, "LEAST_GAIN", -9.0)  # fold whatever the tokens say
    folder = family_teachers.make(name, tmp_path / "t")
    teacher = open_teacher(folder)
    family = teacher.family
    folds = collect_folds(stream_of(folder), TOKENS, 4, "fixed", 1.5)
    student = write_student(open_teacher(folder), a_plan(teacher), tmp_path / "s", folds=folds)
    model = load(folder)
    for index in teacher.moe_layers:
        layer = model.get_submodule(family.layers)[index]
        router, experts = layer.get_submodule(family.router), layer.get_submodule(family.experts)
        rows, bias = router.weight, getattr(router, "bias", None)
        if folds[index].report.centred:
            rows = rows - rows.mean(0)
            bias = None if bias is None else bias - bias.mean()
        gate_up, gate_up_bias = experts.gate_up_proj, getattr(experts, "gate_up_proj_bias", None)
        for expert in range(EXPERTS):
            own = gate_up[expert].T if family.transposed else gate_up[expert]
            half = len(own) // 2
            place = slice(0, None, 2) if family.interleaved else slice(0, half)
            own[place] += 1.5 * rows[expert]
            if gate_up_bias is not None and bias is not None:
                gate_up_bias[expert, place] += 1.5 * bias[expert]
        if (shared := folds[index].shared) is not None:
            gate = layer.get_submodule(family.shared).gate_proj.weight
            gate += 1.5 * layer.get_submodule(family.shared_gate).weight
            assert shared.report.choice == "fixed"
    model.save_pretrained(tmp_path / "edited")
    edited = open_teacher(tmp_path / "edited")
    plan = with_shared_scales(a_plan(edited), folds)
    assert all((fold.shared is None) == (family.shared_gate is None) for fold in folds.values())
    expected = write_student(edited, plan, tmp_path / "e")
    ours, theirs = (load_file(f / "model.safetensors") for f in (student, expected))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=1e-6)


def reference(folder: Path, alpha: float) -> list[dict[str, torch.Tensor]]:
    """Per layer: h and folded h [N, E, I], w [N, E], d [E, H, I] and y [N, H]."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    found = []

    def look(mlp: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        x = args[0].flatten(0, 1)
        rows = mlp.gate.weight
        top, index = (x @ rows.T).softmax(-1).topk(2, dim=-1)
        w = torch.zeros(len(x), len(rows), dtype=x.dtype).scatter(1, index, top / top.sum(-1, True))
        gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)
        z, u = torch.einsum("nh,eih->nei", x, gate), torch.einsum("nh,eih->nei", x, up)
        share = (x @ (rows - rows.mean(0)).T)[:, :, None]
        silu = torch.nn.functional.silu
        d = mlp.experts.down_proj.detach()
        h = silu(z) * u
        y = torch.einsum("ne,nei,ehi->nh", w, h, d)
        found.append({"h": h, "f": silu(z + alpha * share) * u, "w": w, "d": d, "y": y})

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    with torch.no_grad():
        model(TOKENS)
    return found


@pytest.fixture
def folds(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(fold_choice, "LEAST_GAIN", -9.0)
    return collect_folds(stream_of(tiny_teacher), TOKENS, 3, "fixed", 1.0)


def test_r2_is_its_definition(folds: dict, tiny_teacher: Path) -> None:
    held = held_out_sequences(len(TOKENS), 8).repeat_interleave(TOKENS.shape[1])
    for found, expected in zip(folds.values(), reference(tiny_teacher, 1.0), strict=True):
        t = expected["w"][:, :, None] * expected["h"]
        energy = expected["d"].square().sum(1)
        report = found.report
        for part, r2 in (("h", report.r2_before), ("f", report.r2_after)):
            f = expected[part]
            scale = (t * f)[~held].sum(0) / f[~held].square().sum(0)
            left = ((t - scale * f)[held].square().sum(0) * energy).sum()
            own = 1 - float(left / (t[held].square().sum(0) * energy).sum())
            assert r2 == pytest.approx(own, abs=1e-4)
        f = expected["f"]
        own = (energy * (t * f)[~held].sum(0)).sum(1) / (energy * f[~held].square().sum(0)).sum(1)
        torch.testing.assert_close(found.scale.double(), own, rtol=1e-3, atol=1e-5)


def test_statistics_of_folded_experts_are_brute_force(folds: dict, tiny_teacher: Path) -> None:
    gram = GramTotals(folds)
    stream_of(tiny_teacher).run(TOKENS, 5, gram.visit)
    every = torch.cartesian_prod(torch.arange(8), torch.arange(16)).numpy()
    moments = CandidateMoments({0: every, 1: every}, folds)
    stream_of(tiny_teacher).run(TOKENS, 5, moments.visit)
    for index, expected in enumerate(reference(tiny_teacher, 1.0)):
        outputs = torch.einsum("nei,ehi->neh", expected["f"], expected["d"])
        tokens = len(outputs)
        found = gram.result()[index]
        close = {"rtol": 1e-3, "atol": 1e-4}
        own = torch.einsum("nih,njh->ij", outputs, outputs) / tokens
        torch.testing.assert_close(torch.from_numpy(found.gram), own, **close)
        own = torch.einsum("nih,nh->i", outputs, expected["y"]) / tokens
        torch.testing.assert_close(torch.from_numpy(found.output_dot), own, **close)
        columns = expected["f"].flatten(1)
        torch.testing.assert_close(moments.moments[index].hth, columns.T @ columns, **close)
        torch.testing.assert_close(moments.moments[index].hty, columns.T @ expected["y"], **close)


def test_fitted_alphas_are_no_worse_than_any_of_them(tiny_teacher: Path) -> None:
    stream = stream_of(tiny_teacher)
    layer = collect_folds(stream, TOKENS, 4, "layer")
    neuron = collect_folds(stream, TOKENS, 4, "neuron")
    for index in layer:
        assert layer[index].report.r2_after >= layer[index].report.r2_before
        assert neuron[index].report.r2_after >= layer[index].report.r2_after
        assert set(layer[index].alpha.unique().tolist()) <= {0.0, *ALPHAS}
        assert len(layer[index].alpha.unique()) == 1


def test_a_layer_that_gains_nothing_is_left(tmp_path: Path) -> None:
    folder = family_teachers.make_uniform("qwen3_moe", tmp_path / "t")
    for mode in MODES:
        for found in collect_folds(stream_of(folder), TOKENS, 4, mode).values():
            assert found.report.choice == "none"
            assert not found.alpha.any()
            assert found.report.r2_after == found.report.r2_before == pytest.approx(1.0)


def test_the_report_is_what_folding_finds(
    tiny_teacher: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "report.json"
    words = ["fold-report", str(tiny_teacher), "--tokens", str(calibration), "--json", str(out)]
    assert main(words) == 0
    rows = json.loads(out.read_text())["layers"]
    fixed = collect_folds(stream_of(tiny_teacher), TOKENS, 8, "fixed", 1.0)
    neuron = collect_folds(stream_of(tiny_teacher), TOKENS, 8, "neuron")
    for row in rows:
        report = fixed[row["layer"]].report
        assert row["unfolded"] == pytest.approx(report.r2_before, abs=1e-6)
        assert row["alpha 1"] == pytest.approx(report.r2_after, abs=1e-6)
        best = max(row[way] for way in ("unfolded", "per layer", "per neuron"))
        assert best == pytest.approx(neuron[row["layer"]].report.r2_after, abs=LEAST_GAIN)
    assert "alpha 1 helps in 2 of 2 layers" in capsys.readouterr().out


def test_step_by_step_is_the_best_recipe(
    tiny_teacher: Path, calibration: Path, tmp_path: Path
) -> None:
    """Fold, choose, merge, refit and align by hand give the bytes of one call."""
    teacher, tokens = str(tiny_teacher), ["--tokens", str(calibration)]
    one = m2d.convert(tiny_teacher, tmp_path / "one", tokens=calibration, recipe="best", align=2)
    about = json.loads((one / "m2d.json").read_text())
    assert about["recipe"] == "best"
    assert {"fold", "refit", "align"} <= about.keys()
    card = (one / "README.md").read_text()
    assert "Folded:" in card
    assert "Aligned:" in card
    fold_file, neurons = str(tmp_path / "fold"), str(tmp_path / "neurons")
    merged, refitted, last = (str(tmp_path / name) for name in ("merged", "refitted", "last"))
    for words in (
        ["fold", teacher, fold_file, *tokens],  # by neuron, as the recipe does
        ["neurons", teacher, neurons, *tokens, "--choice", "greedy", "--fold", fold_file],
        ["merge", teacher, merged, "--neurons", neurons, "--choice", "greedy", "--fold", fold_file],
        ["refit", merged, teacher, refitted, *tokens],
        ["align", refitted, teacher, last, *tokens, "--steps", "2"],
    ):
        assert main(words) == 0
    last_bytes, one_bytes = (
        (Path(folder) / "model.safetensors").read_bytes() for folder in (last, one)
    )
    assert last_bytes == one_bytes
    words = ["merge", teacher, str(tmp_path / "x"), "--neurons", neurons, "--choice", "greedy"]
    assert main(words) == 2  # chosen with a fold, and merged without one


def test_gram_statistics_of_a_fold_file(
    tiny_teacher: Path, calibration: Path, tmp_path: Path
) -> None:
    words = [str(tiny_teacher), str(tmp_path / "fold"), "--tokens", str(calibration)]
    assert main(["fold", *words]) == 0
    for name, more in (("plain", []), ("folded", ["--fold", str(tmp_path / "fold")])):
        words[1] = str(tmp_path / name)
        assert main(["gram", *words, *more]) == 0
    plain, folded = (load_file(tmp_path / name) for name in ("plain", "folded"))
    key = next(k for k in plain if k.endswith("gram") and "weight" not in k and "router" not in k)
    assert not torch.allclose(plain[key], folded[key], rtol=1e-2)


def test_files_and_bad_input(tmp_path: Path, tiny_teacher: Path, calibration: Path) -> None:
    out = tmp_path / "fold.safetensors"
    main(["fold", str(tiny_teacher), str(out), "--tokens", str(calibration), "--mode", "neuron"])
    folds, about = read_folds(out)
    again = collect_folds(stream_of(tiny_teacher), TOKENS, 8, "neuron")
    assert about["mode"] == "neuron"
    for index, found in again.items():
        assert folds[index].report == found.report
        assert torch.equal(folds[index].alpha, found.alpha)
    with pytest.raises(UserError, match="not a fold file"):
        read_folds(calibration)
    with pytest.raises(UserError, match="at least 2 sequences"):
        collect_folds(stream_of(tiny_teacher), TOKENS[:1], 4)
    with pytest.raises(UserError, match="unknown fold 'all'"):
        m2d.convert(tiny_teacher, tmp_path / "s", tokens=calibration, fold="all")
