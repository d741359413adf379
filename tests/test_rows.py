"""Experts of a layer whose rows are one matrix (DBRX), a config that nests its keys, and a decoder
that calls its layers blocks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, DbrxConfig, DbrxForCausalLM

import m2d
from m2d.choose.plan import Group, LayerPlan, Plan
from m2d.cli import main
from m2d.errors import UserError
from m2d.models.load import load_model
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher, read_config
from m2d.models.visit import Visit
from m2d.students.grid import GridStudent
from m2d.students.merge import write_student
from m2d.students.rewrite import rewrite_student

EXPERTS, TOP_K, WIDTH, HIDDEN, LAYERS = 8, 3, 16, 32, 2
CPU = torch.device("cpu")
IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))


def make(folder: Path, top_k: int = TOP_K, uniform: bool = False, **ffn: Any) -> Path:
    """A tiny DBRX as its class saves it. uniform: its router's weights are zero."""
    torch.manual_seed(0)
    config = DbrxConfig(
        d_model=HIDDEN, n_heads=4, n_layers=LAYERS, max_seq_len=128, vocab_size=VOCABULARY,
        eos_token_id=0, initializer_range=0.2,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 2.0},
        ffn_config={"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": top_k,
                    "moe_jitter_eps": 0.1, **ffn},
    )  # fmt: skip
    model = DbrxForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name and tensor.dim() == 1:
                tensor.add_(torch.randn(tensor.shape) * 0.2)
            if "router" in name:
                tensor.copy_(torch.zeros_like(tensor) if uniform else torch.randn(tensor.shape))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """By the stock class, without anything of m2d's."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dbrx") / "teacher")


def ffn(model: nn.Module, layer: int, expert: int, x: Tensor) -> Tensor:
    """One expert by hand, from the rows that are its own."""
    own = slice(expert * WIDTH, (expert + 1) * WIDTH)
    mlp: Any = model.transformer.blocks[layer].ffn.experts.mlp
    return (functional.silu(x @ mlp.w1[own].T) * (x @ mlp.v1[own].T)) @ mlp.w2[own]


def plan_of(groups: tuple[Group, ...]) -> Plan:
    return Plan("x", "x", "x", None, tuple(LayerPlan(i, groups) for i in range(LAYERS)))


@torch.no_grad()
@pytest.mark.parametrize("p_norm", [1.0, 2.0, None])
def test_a_uniform_router_gives_an_exact_student(
    p_norm: float | None, tmp_path: Path, tiny_text: Path
) -> None:
    """Whatever norm divides the weights: of one expert the weight is 1 in each."""
    folder = make(tmp_path / "teacher", EXPERTS, uniform=True, moe_normalize_expert_weights=p_norm)
    out = m2d.convert(folder, tmp_path / "student", text=[tiny_text], sequences=2, length=12)
    student = load(out)
    assert type(student) is DbrxForCausalLM
    inner = json.loads((out / "config.json").read_text())["ffn_config"]
    assert (inner["moe_num_experts"], inner["moe_top_k"]) == (1, 1)
    assert inner["ffn_hidden_size"] == EXPERTS * WIDTH
    assert inner["moe_normalize_expert_weights"] == p_norm
    assert inner["moe_jitter_eps"] == 0  # there is nothing to choose, and so nothing to disturb
    assert relative_error(student(IDS).logits, load(folder)(IDS).logits) < 5e-6


@torch.no_grad()
def test_both_readers_give_the_stock_classs_logits(teacher: Path) -> None:
    expected = load(teacher)(IDS).logits
    opened = open_teacher(teacher)
    assert (opened.num_experts, opened.top_k, opened.expert_width) == (EXPERTS, TOP_K, WIDTH)
    assert (opened.family.router, opened.family.probabilities) == ("ffn.router.layer", "softmax")
    stream = StreamedTeacher(opened, torch.float32, CPU)
    (hidden,) = stream.run(IDS, 2)
    torch.testing.assert_close(
        stream.logits(IDS, hidden, slice(None)), expected, rtol=1e-5, atol=1e-5
    )
    whole = load_model(teacher, read_config(teacher)[1], torch.float32, CPU)
    assert torch.equal(whole(IDS).logits, expected)


@torch.no_grad()
def test_what_statistics_see_is_what_the_experts_compute(teacher: Path) -> None:
    stock = load(teacher)
    taken: dict[int, tuple[Tensor, Tensor]] = {}
    for index, block in enumerate(stock.transformer.blocks):
        block.ffn.register_forward_hook(
            lambda _m, args, out, i=index: taken.__setitem__(i, (args[0], out))
        )
    stock(IDS)
    seen = []

    def visit(batch: Visit) -> None:
        x, y = (t.flatten(0, 1) for t in taken[batch.layer])
        torch.testing.assert_close(batch.hidden, x, rtol=1e-4, atol=1e-5)
        outputs = torch.stack([ffn(stock, batch.layer, e, x) for e in range(EXPERTS)])
        chosen = outputs[batch.index, torch.arange(len(x))[:, None]]
        torch.testing.assert_close(batch.norms, chosen.norm(dim=-1), rtol=1e-4, atol=1e-5)
        total = (chosen * batch.weights[..., None]).sum(1)
        torch.testing.assert_close(total, y, rtol=1e-4, atol=1e-5)
        seen.append(batch.layer)

    StreamedTeacher(open_teacher(teacher), torch.float32, CPU).run(IDS, 2, visit)
    assert seen == list(range(LAYERS))


@torch.no_grad()
def test_a_merged_ffn_is_the_sum_of_its_groups(teacher: Path, tmp_path: Path) -> None:
    """An average of two experts, one expert, and a part of one, each with its scale."""
    groups = (
        Group((0, 3), (0.25, 0.75), 0.5),
        Group((5,), (1.0,), -0.3),
        Group((1,), (1.0,), 0.7, neurons=(4, 9, 15)),
    )
    student = load(write_student(open_teacher(teacher), plan_of(groups), tmp_path / "student"))
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    for layer in range(LAYERS):
        stock = load(teacher)
        expected = -0.3 * ffn(stock, layer, 5, x)
        mlp = stock.transformer.blocks[layer].ffn.experts.mlp
        for weights in (mlp.w1, mlp.v1, mlp.w2):
            experts = weights.view(EXPERTS, WIDTH, HIDDEN)
            experts[0] = 0.25 * experts[0] + 0.75 * experts[3]
        mlp.w2.view(EXPERTS, WIDTH, HIDDEN)[1, [i for i in range(WIDTH) if i not in (4, 9, 15)]] = 0
        expected = expected + 0.5 * ffn(stock, layer, 0, x) + 0.7 * ffn(stock, layer, 1, x)
        found = student.transformer.blocks[layer].ffn(x[None])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_grids_student_is_the_merged_one(teacher: Path, tmp_path: Path) -> None:
    """And its files have the names that the class itself writes."""
    opened = open_teacher(teacher)
    first, second = (
        plan_of((Group((i, i + 1), (0.5, 0.5), 0.4), Group((i + 3,), (1.0,), 0.7))) for i in (0, 2)
    )
    grid = GridStudent(opened, first, 2 * WIDTH, torch.float32, CPU)
    found = grid.become(second)(IDS).logits
    merged = load(out := write_student(opened, second, tmp_path / "student"))
    assert opened.raw_config["ffn_config"]["moe_num_experts"] == EXPERTS  # the teacher's stays
    torch.testing.assert_close(found, merged(IDS).logits, rtol=0, atol=1e-6)
    merged.save_pretrained(tmp_path / "again")
    ours, stock = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert set(ours) == set(stock)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)


@torch.no_grad()
def test_an_ffn_is_rewritten_in_its_own_form(teacher: Path, tmp_path: Path) -> None:
    opened = open_teacher(teacher)
    groups = (Group((2,), (1.0,), 1.0), Group((6,), (1.0,), 1.0))
    student = write_student(opened, plan_of(groups), tmp_path / "student")
    generator = torch.Generator().manual_seed(2)
    gate, up = (torch.randn(2 * WIDTH, HIDDEN, generator=generator) for _ in range(2))
    down = torch.randn(HIDDEN, 2 * WIDTH, generator=generator)
    parts = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    before = load(student)
    after = load(rewrite_student(student, tmp_path / "other", opened.family, {1: parts}))
    x = torch.randn(5, HIDDEN, generator=generator)
    expected = (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    blocks = after.transformer.blocks
    torch.testing.assert_close(blocks[1].ffn(x[None])[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(blocks[0].ffn(x[None]), before.transformer.blocks[0].ffn(x[None]))


def test_every_command_takes_it(teacher: Path, tmp_path: Path, tiny_text: Path) -> None:
    """From statistics to a distilled student, each a stock model of finite perplexity."""
    text = ["--text", str(tiny_text), "--sequences", "4", "--length", "12"]
    data = ["--tokens", str(tmp_path / "t"), "--device", "cpu"]
    out = {name: str(tmp_path / name) for name in ("best", "grid", "refit", "distilled")}

    def run(*words: Any) -> None:
        assert main([*map(str, words)]) == 0

    run("tokenize", teacher, tmp_path / "t", *text)
    run("convert", teacher, out["best"], *data, "--recipe", "best", "--multiple", "8")
    run("convert", teacher, out["grid"], *data, "--keep", "5")
    run("refit", out["grid"], teacher, out["refit"], *data)
    run("distill", out["refit"], teacher, out["distilled"], "--tokens", tmp_path / "t", "--steps",
        "2", "--batch", "2", "--device-batch", "1", "--learning-rate", "1e-3", "--warmup-steps",
        "0", "--decay-steps", "1")  # fmt: skip
    run("verify", *out.values())
    before, after = (load(Path(out[name])).state_dict() for name in ("refit", "distilled"))
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert "transformer.blocks.0.ffn.experts.mlp.w2" in moved


def test_rows_that_are_not_of_whole_experts_are_one_line(teacher: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.blocks.1.ffn.experts.mlp.v1"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"mlp\.v1 is \[127, 32\].*not the rows of 8 experts"):
        open_teacher(folder)


@torch.no_grad()
def test_the_rotation_is_that_of_the_published_config(tmp_path: Path, tiny_text: Path) -> None:
    """It has its base in attn_config alone, where transformers 5.23 does not look for it."""
    folder = make(tmp_path / "teacher", EXPERTS, uniform=True)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    published = {k: v for k, v in config.items() if k != "rope_parameters"}
    published["attn_config"] = {**config["attn_config"], "rope_theta": 500000}
    file.write_text(json.dumps({**published, "rope_theta": 500000}))
    expected = load(folder)(IDS).logits
    file.write_text(json.dumps(published))
    assert relative_error(load(folder)(IDS).logits, expected) > 1e-3
    out = m2d.convert(folder, tmp_path / "student", text=[tiny_text], sequences=2, length=12)
    assert relative_error(load(out)(IDS).logits, expected) < 5e-6
    for other in ({"rope_theta": 1e4}, {"rope_parameters": config["rope_parameters"]}):
        file.write_text(json.dumps({**published, **other}))
        with pytest.raises(UserError, match=r"rope_theta is 500000 in attn_config but 10000\.0"):
            open_teacher(folder)


# databricks/dbrx-base, as its config.json has it.
DBRX: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "d_model": 6144, "n_heads": 48,
    "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352, "emb_pdrop": 0.0,
    "resid_pdrop": 0.0, "initializer_range": 0.02, "output_router_logits": False,
    "router_aux_loss_coef": 0.05, "tie_word_embeddings": False, "use_cache": True,
    "torch_dtype": "bfloat16",
    "attn_config": {"model_type": "", "clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {"model_type": "", "ffn_hidden_size": 10752, "moe_jitter_eps": 0.01,
                   "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4},
}  # fmt: skip
# By hand: q, k and v; the output; two norms. Beside the layers embedding, head and last norm.
REST = 2 * 100352 * 6144 + 6144 + 40 * (6144 * (6144 + 2 * 8 * 128) + 6144**2 + 2 * 6144)
EXPERT = 3 * 10752 * 6144


def test_inspect_counts_a_real_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """132B parameters, of which a token uses 36B."""
    (tmp_path / "config.json").write_text(json.dumps(DBRX))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["teacher_parameters"] == REST + 40 * 16 * (EXPERT + 6144) == 131_596_523_520
    assert facts["active_parameters"] == REST + 40 * (4 * EXPERT + 16 * 6144)
    assert facts["expert_parameters"] == EXPERT
    assert facts["student_parameters"] == REST + 40 * (4 * EXPERT + 6144)
    assert {row["intermediate_size"] for row in facts["students"]} == {4 * 10752}
    for sizes in (facts["footprint"], facts["student_footprint"]):
        assert sizes["kv_cache_bytes"] == 40 * 2 * 8 * 128 * 2 * 1000
    assert [row["keep"] for row in facts["students"]] == [4, 8, 16]
    (tmp_path / "config.json").write_text(json.dumps({**DBRX, "n_layers": 10**9}))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "n_layers is 1000000000; no model has more" in capsys.readouterr().err
