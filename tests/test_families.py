"""Every family, from files on disk in the hub's layout to a student that stock libraries load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY
from family_quantized import edit_config
from family_reference import Block, slow_emo, stock_blocks
from family_teachers import (
    EXPERTS,
    MAKERS,
    STOCK,
    TOP_K,
    WIDTH,
    load,
    make,
    make_uniform,
    relative_error,
)
from safetensors.torch import load_file

import m2d
from m2d.choose.plan import Group, LayerPlan, Plan
from m2d.cli import main
from m2d.inspect import inspect
from m2d.models import checkpoint
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.models.visit import Visit
from m2d.statistics.files import SUMS
from m2d.statistics.together import collect_statistics
from m2d.students.grid import GridStudent
from m2d.students.merge import write_student
from m2d.students.tensors import StudentTensors
from m2d.tokens.tokenize import tokens_from

CPU = torch.device("cpu")
STUDENTS = {
    "qwen3_moe": "Qwen3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "mixtral": "MistralForCausalLM",
    "granitemoe": "GraniteForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2ForCausalLM",
    "emo": "LlamaForCausalLM",
    "emo_always_active": "LlamaForCausalLM",
}
ONE_EXPERT = {"gpt_oss", "olmoe"}
# Their students' gate and up projections are rows that lie together on disk.
COPIED = {"qwen3_moe", "deepseek_v2", "glm4_moe", "mixtral", "granitemoe"}


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_uniform_router_over_all_experts_converts_exactly(
    name: str, tmp_path: Path, tiny_text: Path
) -> None:
    folder = make_uniform(name, tmp_path / "teacher")
    out = m2d.convert(folder, tmp_path / "student", text=[tiny_text], sequences=2, length=12)
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    student = load(out)
    assert type(student).__name__ == STUDENTS[name]
    logits = student(ids).logits
    assert relative_error(logits, load(folder)(ids).logits) < 5e-6

    generated = student.generate(ids[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)
    student.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again")(ids).logits, logits, rtol=0, atol=1e-6)

    tensors = load_file(out / "model.safetensors")
    promised = inspect(open_teacher(folder))["student_parameters"]
    assert sum(tensor.numel() for tensor in tensors.values()) == promised
    assert sum(p.numel() for p in student.parameters()) == promised
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in again.items()}
    config = json.loads((out / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & set(config)


def reference_blocks(name: str, folder: Path, tokens: torch.Tensor) -> dict[int, Block]:
    if not name.startswith("emo"):
        return stock_blocks(load(folder), open_teacher(folder).family, tokens)
    parts = [slow_emo(folder, ids)[1] for ids in tokens]
    joined = {}
    for layer, first in parts[0].items():
        fields = {
            key: value
            if key in ("parameters", "router")
            else torch.cat([getattr(part[layer], key) for part in parts], int(key == "outputs"))
            for key, value in vars(first).items()
        }
        joined[layer] = Block(**fields)
    return joined


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_statistics_equal_brute_force_over_the_stock_model(name: str, teachers: Any) -> None:
    folder = teachers(name)
    tokens = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    blocks = reference_blocks(name, folder, tokens)
    teacher = open_teacher(folder)
    assert teacher.moe_layers == sorted(blocks)
    layers = collect_statistics(StreamedTeacher(teacher, torch.float32, CPU), tokens, batch=2)
    for found in layers:
        block = blocks[found.layer]
        p, w, s = block.probabilities.double(), block.weights.double(), block.selected
        f = block.outputs.double()
        norms, y = f.norm(dim=-1).T, torch.einsum("ne,enh->nh", w, f)
        torch.testing.assert_close((y + block.rest).float(), block.output, rtol=1e-4, atol=1e-5)
        n = len(y)
        expected = {
            "n_selected": s.sum(0),
            "prob_sum": p.sum(0),
            "prob_sum_selected": (p * s).sum(0),
            "weight_sum": w.sum(0),
            "out_norm_sum_selected": (norms * s).sum(0),
            "weighted_out_norm_sum": (norms * w).sum(0),
            "out_sq_norm_sum_selected": (norms.square() * s).sum(0),
            "gram": torch.einsum("inh,jnh->ij", f, f) / n,
            "output_dot": torch.einsum("inh,nh->i", f, y) / n,
            "output_sq_norm": y.square().sum() / n,
            "weight_gram": block.parameters.double() @ block.parameters.double().T,
            "router_gram": block.router.double() @ block.router.double().T,
        }
        assert found.routing.n_tokens == n
        assert found.routing.n_selected.sum() == n * found.top_k
        assert {*SUMS, "n_selected"} < set(expected)
        for key, value in expected.items():
            part = found.routing if hasattr(found.routing, key) else found.gram
            np.testing.assert_allclose(
                getattr(part, key), value, rtol=5e-5, atol=1e-5, err_msg=f"{found.layer} {key}"
            )


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_visit_tells_the_routing_that_was_used(name: str, teachers: Any) -> None:
    """The routed sum from what the visitor is told, and the shared experts, is the output."""
    tokens = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(2))
    blocks = reference_blocks(name, teachers(name), tokens)
    seen = []

    def visit(batch: Visit) -> None:
        block = blocks[batch.layer]
        torch.testing.assert_close(batch.hidden, block.hidden, rtol=1e-4, atol=1e-5)
        rows = torch.arange(len(batch.hidden))[:, None]
        chosen = block.outputs[batch.index, rows]
        torch.testing.assert_close(batch.norms, chosen.norm(dim=-1), rtol=1e-4, atol=1e-5)
        total = (chosen * batch.weights[..., None]).sum(1) + block.rest
        torch.testing.assert_close(total, block.output, rtol=1e-4, atol=1e-5)
        seen.append(batch.layer)

    teacher = open_teacher(teachers(name))
    StreamedTeacher(teacher, torch.float32, CPU).run(tokens, 2, visit)
    assert seen == teacher.moe_layers


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_streamed_logits_equal_the_loaded_models(name: str, teachers: Any) -> None:
    folder = teachers(name)
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))
    stream = StreamedTeacher(open_teacher(folder), torch.float32, CPU)
    (hidden,) = stream.run(ids, 2)
    expected = load(folder)(ids).logits
    if name.startswith("emo"):
        slow = torch.stack([slow_emo(folder, row)[0] for row in ids])
        torch.testing.assert_close(expected, slow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        stream.logits(ids, hidden, slice(None)), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_merged_ffn_is_the_sum_of_its_groups(name: str, tmp_path: Path, teachers: Any) -> None:
    """An average of two experts, one expert, and a part of one, each with its scale."""
    folder = teachers(name)
    teacher = open_teacher(folder, student_class="same" if name == "qwen2_moe" else "sibling")
    groups = (
        Group((0, 3), (0.25, 0.75), 0.5),
        Group((5,), (1.0,), -0.3),
        Group((1,), (1.0,), 0.7, neurons=(4, 9, 31)),
    )
    plan = Plan("x", "x", "x", None, tuple(LayerPlan(i, groups) for i in teacher.moe_layers))
    student = load(write_student(teacher, plan, tmp_path / "student"))
    ids = torch.randint(0, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(3))
    stock = load(folder)
    family = teacher.family
    for index in teacher.moe_layers:
        experts = stock.base_model.layers[index].get_submodule(family.experts)
        blocks = {i: b for i, b in stock_blocks(stock, family, ids).items() if i == index}
        block = blocks[index]
        x = block.hidden
        rest = block.rest
        if name == "emo":
            rest = experts(x, torch.full((len(x), 1), EXPERTS - 1), torch.ones(len(x), 1))
        averaged = [[(0, 0.25), (3, 0.75)], [(5, 1.0)], [(1, 1.0)]]
        state = {k: v.clone() for k, v in experts.state_dict().items()}
        for key, value in state.items():
            for slot, members in enumerate(averaged):
                value[slot] = sum(weight * experts.state_dict()[key][e] for e, weight in members)
        down = state["down_proj"][2]  # [H, I], or its transpose
        dropped = [i for i in range(WIDTH) if i not in (4, 9, 31)]
        if family.transposed:
            down[dropped] = 0
        else:
            down[:, dropped] = 0
        experts.load_state_dict(state)
        expected = rest
        for slot, scale in enumerate((0.5, -0.3, 0.7)):
            one = torch.full((len(x), 1), slot)
            expected = expected + experts(x, one, torch.full((len(x), 1), scale))
        path = family.experts.rpartition(".")[0] if family.student_experts else family.dense
        output = student.base_model.layers[index].get_submodule(path)(x[None])
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(output.view_as(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v2", "emo", "granitemoe", *sorted(ONE_EXPERT)])
@torch.no_grad()
def test_the_grids_student_is_the_merged_one(name: str, tmp_path: Path, teachers: Any) -> None:
    """The student whose FFNs change in memory, against the one on disk, after a change."""
    teacher = open_teacher(teachers(name))

    def plan(first: int) -> Plan:
        groups = (Group((first, first + 1), (0.5, 0.5), 0.4), Group((first + 3,), (1.0,), 0.7))
        layers = tuple(LayerPlan(i, groups) for i in teacher.moe_layers)
        return Plan("x", "x", "x", None, layers)

    student = GridStudent(teacher, plan(0), 2 * WIDTH, torch.float32, CPU)
    ids = torch.randint(0, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(3))
    found = student.become(plan(2))(ids).logits
    merged = load(write_student(teacher, plan(2), tmp_path / "student"))
    torch.testing.assert_close(found, merged(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_copied_bytes_are_those_of_the_computed_tensors(
    name: str, dtype: torch.dtype | None, tmp_path: Path, teachers: Any, monkeypatch: Any
) -> None:
    """What merging copies from file to file, part by part, against reading and concatenating."""
    monkeypatch.setattr(checkpoint, "COPY_BYTES", 100)
    groups = (Group((3,), (1.0,), 0.7), Group((1,), (1.0,), 0.4))
    folder = teachers(name)
    layers = tuple(LayerPlan(i, groups) for i in open_teacher(folder).moe_layers)
    plan = Plan("x", "x", "x", None, layers)
    copied: list[str] = []
    original = StudentTensors.copied

    def note(self: StudentTensors, tensor: str, plan: Plan) -> Any:
        found = original(self, tensor, plan)
        copied.extend([tensor] if found else [])
        return found

    monkeypatch.setattr(StudentTensors, "copied", note)
    fast = write_student(open_teacher(folder), plan, tmp_path / "fast", dtype)
    monkeypatch.setattr(StudentTensors, "copied", lambda *_: None)
    slow = write_student(open_teacher(folder), plan, tmp_path / "slow", dtype)
    for file in slow.glob("*.safetensors"):
        assert (fast / file.name).read_bytes() == file.read_bytes()
    if dtype is None:
        assert any("embed_tokens" in tensor for tensor in copied)
    if dtype is None and name in COPIED:
        assert any("up_proj" in tensor for tensor in copied)


# What reading the class must find: the router's path, p_t, and whether logits are float32 always.
ROUTERS = {
    "qwen3_moe": ("mlp.gate", "softmax", False),
    "deepseek_v2": ("mlp.gate", "softmax", True),
    "deepseek_v3": ("mlp.gate", "sigmoid", True),
    "glm4_moe": ("mlp.gate", "sigmoid", True),
    "gpt_oss": ("mlp.router", "softmax", False),
    "mixtral": ("mlp.gate", "softmax", False),
    "granitemoe": ("block_sparse_moe.router", "softmax", True),
    "olmoe": ("mlp.gate", "softmax", False),
    "qwen2_moe": ("mlp.gate", "softmax", False),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_description_finds_router_and_experts(name: str, teachers: Any) -> None:
    teacher = open_teacher(teachers(name))
    family = teacher.family
    assert (family.router, family.probabilities, family.router_float32) == ROUTERS[name]
    assert (teacher.num_experts, teacher.top_k, teacher.expert_width) == (EXPERTS, TOP_K, WIDTH)
    gpt = name == "gpt_oss"
    assert (family.biases, family.transposed, family.interleaved) == (gpt, gpt, gpt)
    assert family.gated
    assert not family.scales_input


@torch.no_grad()
def test_the_teachers_own_class_keeps_a_gate_that_depends_on_the_token(
    tmp_path: Path, tiny_text: Path
) -> None:
    """Exact with one expert, and the error of a constant in a dense student's place is said."""
    folder = make_uniform("qwen2_moe", tmp_path / "teacher", zero=(".gate.weight",))
    settings: Any = {"text": [tiny_text], "sequences": 2, "length": 12}
    same = m2d.convert(folder, tmp_path / "same", student_class="same", **settings)
    dense = m2d.convert(folder, tmp_path / "dense", **settings)
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = load(folder)(ids).logits
    assert type(load(same)).__name__ == "Qwen2MoeForCausalLM"
    assert relative_error(load(same)(ids).logits, expected) < 5e-6
    assert relative_error(load(dense)(ids).logits, expected) > 1e-3
    assert "gate" in json.loads((dense / "m2d.json").read_text())["approximated"]
    plan = json.loads((dense / "plan.json").read_text())
    teacher = open_teacher(folder)
    gates = [layer["shared_scale"] for layer in plan["layers"]]
    assert len(gates) == len(teacher.moe_layers)
    # By hand: the mean of the gate over the calibration tokens, in the stock model.
    tokens = tokens_from(folder, [tiny_text], None, 12, 2)
    found: list[float] = []
    model = load(folder)
    for layer in teacher.moe_layers:
        gate = model.model.layers[layer].mlp.shared_expert_gate
        gate.register_forward_hook(lambda _m, _a, out: found.append(float(out.sigmoid().mean())))
    model(tokens)
    np.testing.assert_allclose(gates, found, rtol=1e-5)
    # The dense student is the teacher with these constants for gates, and nothing else differs.
    model = load(folder)
    for layer, gate in zip(teacher.moe_layers, gates, strict=True):
        logit = torch.tensor(gate).logit()
        model.model.layers[layer].mlp.shared_expert_gate.register_forward_hook(
            lambda _m, _a, out, logit=logit: torch.full_like(out, float(logit))
        )
    assert relative_error(load(dense)(ids).logits, model(ids).logits) < 5e-6


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"model_type": "no_such_model"}, "'no_such_model' is not known"),
        ("qwen3_moe", {"model_type": "qwen3"}, "not a Mixture-of-Experts model"),
        ("emo", {"num_shared_experts": 2}, "num_shared_experts is 2"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "hqq"}}, "quantised with 'hqq'"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "must lie between 1 and the 8 experts"),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(
    name: str, changes: dict, message: str, tmp_path: Path, tiny_text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = edit_config(make(name, tmp_path / "teacher"), **changes)
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--text", str(tiny_text)]
    assert main([*arguments, "--sequences", "2", "--length", "8"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()
