"""Structured pruning: choices by hand, and students that equal hand-built smaller models."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_teacher, make_tokenizer
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from m2d.baselines.dense import open_dense
from m2d.baselines.importance import Importance, Shape, choose_cut
from m2d.baselines.prune import measure_importance
from m2d.cli import main
from m2d.errors import UserError
from m2d.models.stream import StreamedTeacher
from m2d.students.spelling import both_spellings

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "qwen3": lambda **c: Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 6, **c})),
    "llama": lambda **c: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "attention_bias": True, "mlp_bias": True, **c})
    ),
    "mistral": lambda **c: MistralForCausalLM(MistralConfig(**{**SIZES, **c})),
    "qwen2": lambda **c: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **c})),
}
AXES = {
    "layers": ["--layers", "2"],
    "hidden": ["--hidden-size", "24"],
    "heads": ["--heads", "4"],
    "groups": ["--heads", "4", "--kv-heads", "2"],
    "neurons": ["--intermediate-size", "29"],
    "all": [
        *("--layers", "3", "--hidden-size", "24", "--heads", "3", "--kv-heads", "3"),
        *("--intermediate-size", "40"),
    ],
}


def randomise(model: PreTrainedModel) -> None:
    """Norms and biases that differ from one another, which an initialisation leaves at 1 and 0."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense teacher of every family and 6 sequences of 16 tokens."""
    folder = tmp_path_factory.mktemp("prune")
    for name, make in FAMILIES.items():
        torch.manual_seed(3)
        model = make()
        randomise(model)
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    ids = torch.randint(0, 300, (6, 16), generator=torch.Generator().manual_seed(4))
    save_file({"input_ids": ids}, folder / "tokens.safetensors", {"source": "random"})
    return folder


def prune(place: Path, name: str, out: Path, *options: str) -> int:
    tokens = str(place / "tokens.safetensors")
    command = ["prune", str(place / name), str(out), "--tokens", tokens, "--batch", "4"]
    return main([*command, "--device", "cpu", *options])


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# --- choices ----------------------------------------------------------------------------


def test_choice_by_hand() -> None:
    """Two groups of two heads: a head to each group, or the group with the best heads."""
    importance = Importance(
        layers=np.array([0.5, 0.1, 0.3]),
        hidden=np.array([1.0, 4.0, 4.0, 2.0]),
        heads=np.array([[5.0, 1.0, 3.0, 3.0], [9.0, 9.0, 9.0, 9.0], [1.0, 2.0, 4.0, 3.0]]),
        neurons=np.array([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0], [3.0, 2.0, 1.0]]),
    )
    old = Shape(layers=3, hidden_size=4, heads=4, kv_heads=2, intermediate_size=3)
    cut = choose_cut(importance, old, Shape(2, 2, 2, 2, 2))
    assert cut.layers == [0, 2]
    assert cut.hidden == [1, 2]
    assert cut.kv_heads == [[0, 1], [0, 1]]
    assert cut.heads == [[0, 2], [1, 2]]
    assert cut.neurons == [[1, 2], [0, 1]]
    cut = choose_cut(importance, old, Shape(3, 4, 2, 1, 3))
    assert cut.kv_heads == [[0], [0], [1]]  # 5 + 1 = 3 + 3: of equal groups the first
    assert cut.heads == [[0, 1], [0, 1], [2, 3]]
    # One head to a group: 5 against 3, although both groups are worth 6 in all.
    assert choose_cut(importance, old, Shape(1, 4, 1, 1, 3)).heads == [[0]]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(5, 4, 4, 2, 3), "--layers 5: must lie between 1 and the teacher's own 3"),
        (Shape(3, 4, 4, 2, 4), "--intermediate-size 4: must lie between 1 and"),
        (Shape(3, 4, 3, 2, 3), "--heads 3: must be a multiple of --kv-heads 2"),
        (Shape(3, 4, 4, 1, 3), "4 query heads to a key and value head, but the teacher has 2"),
    ],
)
def test_shapes_that_cannot_be_made(shape: Shape, message: str) -> None:
    importance = Importance(np.ones(3), np.ones(4), np.ones((3, 4)), np.ones((3, 3)))
    with pytest.raises(UserError, match=message):
        choose_cut(importance, Shape(3, 4, 4, 2, 3), shape)


def test_importances_are_those_of_the_loaded_model(place: Path) -> None:
    """Against hooks on the whole model in memory, all tokens at once."""
    ids = load_file(place / "tokens.safetensors")["input_ids"]
    stream = StreamedTeacher(open_dense(place / "qwen3"), torch.float32, torch.device("cpu"))
    found = measure_importance(stream, ids, 4)
    model = AutoModelForCausalLM.from_pretrained(place / "qwen3", dtype=torch.float32)
    taken: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, out, name=name: taken.update(
                {f"{name} in": args[0] if args else out, f"{name} out": out}
            )
        )
    logits_of(model, ids)
    hidden = torch.zeros(32)
    for i in range(4):
        layer = f"model.layers.{i}"
        before, after = taken[f"{layer} in"].flatten(0, 1), taken[f"{layer} out"].flatten(0, 1)
        cosine = functional.cosine_similarity(before, after, dim=-1)
        assert found.layers[i] == pytest.approx(float((1 - cosine).mean()), rel=1e-5)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            hidden += taken[f"{layer}.{norm} out"].abs().mean((0, 1))
        heads = taken[f"{layer}.self_attn.o_proj in"].reshape(-1, 8, 6).norm(dim=-1).mean(0)
        np.testing.assert_allclose(found.heads[i], heads, rtol=1e-5)
        neurons = taken[f"{layer}.mlp.down_proj in"].abs().mean((0, 1))
        np.testing.assert_allclose(found.neurons[i], neurons, rtol=1e-5)
    np.testing.assert_allclose(found.hidden, hidden, rtol=1e-5)
    assert len(set(found.layers)) == 4


# --- students ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_pruned_is_the_teacher(place: Path, tmp_path: Path, name: str) -> None:
    assert prune(place, name, tmp_path / "student") == 0
    before = load_file(place / name / "model.safetensors")
    after = load_file(tmp_path / "student" / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    own = both_spellings(json.loads((place / name / "config.json").read_text()))
    assert {k: config[k] for k in config} == {k: own[k] for k in config}


def hand_built(teacher: PreTrainedModel, cut: dict, **changes: int) -> PreTrainedModel:
    """The smaller model, its parameters filled in by slicing, layer by layer."""
    config = type(teacher.config)(**{**teacher.config.to_dict(), **changes})
    model = type(teacher)(config)
    size = getattr(teacher.config, "head_dim", None) or 4
    hidden = torch.tensor(cut["hidden"])
    rows = {
        name: [
            torch.tensor([h * size + d for h in kept for d in range(size)]) for kept in cut[name]
        ]
        for name in ("heads", "kv_heads")
    }
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight[:, hidden])
        model.lm_head.weight.copy_(teacher.lm_head.weight[:, hidden])
        model.model.norm.weight.copy_(teacher.model.norm.weight[hidden])
        for place, source in enumerate(cut["layers"]):
            new, old = model.model.layers[place], teacher.model.layers[source]
            neurons = torch.tensor(cut["neurons"][place])
            for norm in ("input_layernorm", "post_attention_layernorm"):
                getattr(new, norm).weight.copy_(getattr(old, norm).weight[hidden])
            for norm in ("q_norm", "k_norm"):
                if hasattr(old.self_attn, norm):
                    getattr(new.self_attn, norm).weight.copy_(getattr(old.self_attn, norm).weight)
            outputs = {
                new.self_attn.q_proj: (old.self_attn.q_proj, rows["heads"][place], hidden),
                new.self_attn.k_proj: (old.self_attn.k_proj, rows["kv_heads"][place], hidden),
                new.self_attn.v_proj: (old.self_attn.v_proj, rows["kv_heads"][place], hidden),
                new.self_attn.o_proj: (old.self_attn.o_proj, hidden, rows["heads"][place]),
                new.mlp.gate_proj: (old.mlp.gate_proj, neurons, hidden),
                new.mlp.up_proj: (old.mlp.up_proj, neurons, hidden),
                new.mlp.down_proj: (old.mlp.down_proj, hidden, neurons),
            }
            for linear, (origin, out, inside) in outputs.items():
                linear.weight.copy_(origin.weight[out][:, inside])
                if linear.bias is not None:
                    linear.bias.copy_(origin.bias[out])
    return model


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_axis_gives_the_hand_built_smaller_model(
    place: Path, tmp_path: Path, name: str, axis: str
) -> None:
    assert prune(place, name, tmp_path / "student", *AXES[axis]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    teacher = AutoModelForCausalLM.from_pretrained(place / name)
    cut = json.loads((tmp_path / "student" / "pruning.json").read_text())
    options = dict(zip(AXES[axis][::2], map(int, AXES[axis][1::2]), strict=True))
    keys = {"--layers": "num_hidden_layers", "--hidden-size": "hidden_size"}
    keys |= {"--heads": "num_attention_heads", "--kv-heads": "num_key_value_heads"}
    keys |= {"--intermediate-size": "intermediate_size"}
    changes = {keys[option]: value for option, value in options.items()}
    kinds = getattr(teacher.config, "layer_types", None)
    if kinds:
        changes["layer_types"] = [kinds[layer] for layer in cut["layers"]]
    changes["head_dim"] = 6 if name == "qwen3" else 4
    reference = hand_built(teacher, cut, **changes)
    ids = load_file(place / "tokens.safetensors")["input_ids"]
    ours, theirs = logits_of(student, ids), logits_of(reference, ids)
    assert torch.equal(ours, theirs)
    assert ours.shape == (6, 16, 300)
    assert not torch.allclose(ours, logits_of(teacher, ids), rtol=0.01)


def test_the_folder_is_that_of_a_student(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    assert prune(place, "qwen3", out, "--layers", "3", "--heads", "4") == 0
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"
    record = json.loads((out / "m2d.json").read_text())
    assert record["teacher"]["model_type"] == "qwen3"
    assert record["baseline"]["kind"] == "d2d"
    assert (record["baseline"]["layers"], record["baseline"]["of"]["layers"]) == (3, 4)
    assert record["calibration"] | {"sha256": ""} == {
        "source": "random",
        "compute_dtype": "float32",
        "sequences": 6,
        "length": 16,
        "sha256": "",
    }
    weights = load_file(out / "model.safetensors")
    assert record["student"]["parameters"] == sum(map(torch.numel, weights.values()))
    card = (out / "README.md").read_text()
    assert "structured pruning" in card
    assert "3 of 4 layers" in card


def test_what_does_nothing_goes_first(tmp_path: Path, place: Path) -> None:
    """Half of the neurons and one layer do nothing; pruned away, the logits stay."""
    torch.manual_seed(5)
    model = FAMILIES["qwen3"]()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[::2] = 0
    idle = model.model.layers[2]
    idle.self_attn.o_proj.weight.data.zero_()
    idle.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "teacher")
    out = tmp_path / "student"
    tokens = str(place / "tokens.safetensors")
    command = ["prune", str(tmp_path / "teacher"), str(out), "--tokens", tokens]
    assert main([*command, "--layers", "3", "--intermediate-size", "24", "--device", "cpu"]) == 0
    ids = load_file(tokens)["input_ids"]
    student = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits_of(student, ids), logits_of(model, ids), rtol=0, atol=1e-4)
    assert json.loads((out / "pruning.json").read_text())["layers"] == [0, 1, 3]


# --- sizes and mistakes -----------------------------------------------------------------

QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "max_position_embeddings": 40960,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def test_parameters_of_the_papers_student(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_32B))
    shape = ["--layers", "48", "--hidden-size", "2048", "--heads", "32", "--kv-heads", "8"]
    command = ["prune", str(tmp_path), "--dry-run", *shape, "--intermediate-size", "6144"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 3_441_113_088
    assert facts["head_dim"] == 128
    assert math.isclose(facts["teacher_parameters"], 32.76e9, rel_tol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def test_bad_input_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_teacher(tmp_path / "moe")
    capsys.readouterr()
    out = tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    tokens = ["--tokens", str(place / "tokens.safetensors")]
    dense = str(place / "qwen3")
    for command, message in (
        ([str(tmp_path / "moe"), str(out), *tokens], "knows dense models of qwen3, llama"),
        ([dense, str(out)], "give the folder to write and --tokens"),
        ([dense, str(out), *tokens, "--layers", "5"], "--layers 5: must lie between 1 and"),
        ([str(place / "llama"), str(out), *tokens, "--hidden-size", "20"], "not a multiple of"),
        ([dense, str(tmp_path / "full"), *tokens], "exists already"),
        ([dense, str(out), "--tokens", dense], "not a regular file; make a token file"),
    ):
        assert main(["prune", *command]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert not out.exists()
