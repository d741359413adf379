"""Ernie 4.5 VL, whose images have experts of their own beside the text's: it becomes a text model.

On disk, as transformers writes it for the hub, text and images share one list of experts and one
correction bias, and their routers lie transposed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Ernie4_5_VLMoeConfig

import m2d
from m2d.cli import main
from m2d.errors import UserError
from m2d.evaluate.perplexity import measure
from m2d.inspect import inspect
from m2d.models.load import load_model
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher, read_config
from m2d.models.visit import Visit
from tests.conftest import VOCABULARY, make_tokenizer
from tests.family_teachers import randomise, relative_error

EXPERTS, LAYERS, WIDTH, OF_IMAGES, SHARED = 4, 3, 16, 8, 2
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48,
    "moe_num_experts": EXPERTS, "moe_intermediate_size": [WIDTH, OF_IMAGES],
    "moe_num_shared_experts": SHARED, "initializer_range": 0.2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 8,
}  # fmt: skip
IDS = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


def make_ernie(folder: Path, top_k: int, uniform: bool) -> Path:
    torch.manual_seed(0)
    config = Ernie4_5_VLMoeConfig(text_config={**TEXT, "moe_k": top_k}, vision_config=VISION)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        randomise(model)
        for name, parameter in model.named_parameters():
            if uniform and "moe.gate." in name:
                parameter.zero_()
            elif "e_score_correction_bias" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With routers that choose; not to be written to."""
    return make_ernie(tmp_path_factory.mktemp("ernie") / "teacher", 2, uniform=False)


def stock(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_the_file_is_in_the_hubs_layout(teacher: Path) -> None:
    """What the other tests rest on."""
    shapes = {n: tuple(t.shape) for n, t in load_file(teacher / "model.safetensors").items()}
    path = "model.layers.1.mlp"
    assert shapes[f"{path}.gate.weight"] == shapes[f"{path}.gate.weight_1"] == (32, EXPERTS)
    assert shapes[f"{path}.moe_statics.e_score_correction_bias"] == (2, EXPERTS)
    widths = [shapes[f"{path}.experts.{e}.up_proj.weight"][0] for e in range(2 * EXPERTS)]
    assert widths == [WIDTH] * EXPERTS + [OF_IMAGES] * EXPERTS
    assert not any("_moe." in name for name in shapes)


def test_every_tensor_is_read_as_the_stock_class_reads_it(teacher: Path) -> None:
    """Those of images too, which a distillation's teacher holds."""
    ours = load_model(teacher, read_config(teacher)[1], torch.float32, "cpu").state_dict()
    theirs = stock(teacher).state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@torch.no_grad()
def test_the_streamed_teacher_is_the_stock_model(teacher: Path) -> None:
    stream = StreamedTeacher(open_teacher(teacher), torch.float32, CPU)
    model, told = stock(teacher), []
    expected = model(input_ids=IDS).logits
    outputs: dict[int, torch.Tensor] = {}
    layers = model.model.language_model.layers
    for index in range(1, LAYERS):
        layers[index].mlp.text_moe.register_forward_hook(
            lambda _m, _a, out, index=index: outputs.update({index: out[0]})
        )
    model(input_ids=IDS)

    def visit(seen: Visit) -> None:
        """The sum of the chosen experts, from the stock model's weights, is what its block gave."""
        experts = layers[seen.layer].mlp.text_moe.experts
        total = torch.zeros_like(seen.hidden)
        for place in range(2):
            for token, expert in enumerate(seen.index[:, place].tolist()):
                gate, up = (experts.gate_up_proj[expert] @ seen.hidden[token]).chunk(2)
                out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                total[token] += seen.weights[token, place] * out
        torch.testing.assert_close(total, outputs[seen.layer].view_as(total), rtol=1e-4, atol=1e-5)
        told.append(seen.layer)

    (hidden,) = stream.run(IDS, 2, visit)
    assert told == [1, 2]
    torch.testing.assert_close(
        stream.logits(IDS, hidden, slice(None)), expected, rtol=1e-4, atol=1e-4
    )
    losses = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    found = measure(teacher, IDS, 2, "float32", CPU).perplexity
    assert found == pytest.approx(float(losses.exp()), rel=1e-5)


@torch.no_grad()
def test_a_uniform_router_over_all_experts_converts_exactly(
    tmp_path: Path, tiny_text: Path
) -> None:
    folder = make_ernie(tmp_path / "teacher", EXPERTS, uniform=True)
    out = m2d.convert(folder, tmp_path / "student", text=[tiny_text], sequences=2, length=12)
    student, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(student).__name__ == "Ernie4_5ForCausalLM"
    assert not any(info.values())
    assert relative_error(student(IDS).logits, stock(folder)(input_ids=IDS).logits) < 5e-6
    config = json.loads((out / "config.json").read_text())
    assert config["intermediate_size"] == (EXPERTS + SHARED) * WIDTH
    assert "mrope_section" not in config["rope_parameters"]  # engines take it for a vision model
    assert "images" in json.loads((out / "m2d.json").read_text())["left_out"]
    promised = inspect(open_teacher(folder, text_only=True))
    assert promised["student_parameters"] == sum(p.numel() for p in student.parameters())


def test_no_text_reaches_the_images_experts(teacher: Path) -> None:
    """Parameters that are active, by hand: of 4 and 4 experts, in 2 layers, two of the text's."""
    facts = inspect(open_teacher(teacher))
    one, of_images = 3 * WIDTH * 32, 3 * OF_IMAGES * 32
    router = EXPERTS * 32 + EXPERTS
    idle = 2 * (2 * one + EXPERTS * of_images + router)
    assert facts["teacher_parameters"] - facts["active_parameters"] == idle


def test_align_distill_and_verify(
    teacher: Path, tmp_path: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, aligned, out = (tmp_path / name for name in ("student", "aligned", "out"))
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": IDS.repeat(2, 1)}, tokens, {"sequences": "4", "length": "14"})
    ours = ["--tokens", tokens]
    for command in (
        ["convert", teacher, student, *ours, "--fold", "layer", "--refit", "sequential"],
        ["align", student, teacher, aligned, *ours, "--steps", "2", "--step-tokens", "28"],
        ["distill", aligned, teacher, out, *ours, "--steps", "2", "--batch", "2",
         "--device-batch", "2"],
        ["verify", out],
    ):  # fmt: skip
        assert main([str(part) for part in command]) in (0, None), capsys.readouterr().err
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "Ernie4_5ForCausalLM"


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("experts.7.up_proj.weight", "1 tensor is missing .*vision_moe.experts.3.up_proj.weight"),
        ("gate.weight", "1 tensor is missing .*text_moe.gate.weight"),
        ("moe_statics.e_score_correction_bias", "2 tensors are missing .*text_moe.gate.moe_"),
    ],
)
def test_what_is_missing_is_named(
    dropped: str, message: str, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((teacher / "config.json").read_bytes())
    tensors = load_file(teacher / "model.safetensors")
    del tensors[f"model.layers.1.mlp.{dropped}"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_teacher(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("gate.weight", (EXPERTS,), r"text_moe.gate.weight is \[4\] on disk"),
        ("moe_statics.e_score_correction_bias", (), "missing .*vision_moe.gate.moe_statics"),
        ("moe_statics.e_score_correction_bias", (0, 4), "missing .*vision_moe.gate.moe_statics"),
        ("moe_statics.e_score_correction_bias", (3, 4), r"correction_bias is \[2, 4\] on disk"),
    ],
)
def test_what_is_of_another_shape_is_named(
    name: str, shape: tuple[int, ...], message: str, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((teacher / "config.json").read_bytes())
    tensors = load_file(teacher / "model.safetensors")
    tensors[f"model.layers.1.mlp.{name}"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_teacher(tmp_path)
