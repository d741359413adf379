"""Teachers with a vision tower: the text model is converted, the rest is carried over."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLVisionConfig,
    Qwen3_5MoeConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

import m2d
from m2d.cli import main
from m2d.errors import UserError
from m2d.evaluate.perplexity import measure
from m2d.inspect import text_student
from tests.conftest import VOCABULARY, make_tokenizer
from tests.family_quantized import slow_fp8, to_fp8
from tests.family_teachers import randomise, relative_error

EXPERTS, LAYERS = 4, 2
# What FP8 checkpoints leave as it is.
KEPT = (
    "embed", "norm", "lm_head", "gate.weight", "conv", "bias", "A_log", "in_proj_a", "in_proj_b",
    "mtp", "position", "cls_token", "mask_token",
)  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 48,
    "initializer_range": 0.2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32,
    "num_position_embeddings": 16, "patch_size": 8,
}  # fmt: skip
HYBRID: dict[str, Any] = {
    "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
KINDS: dict[str, tuple[Any, str, str]] = {
    "qwen3_vl_moe": (
        lambda: Qwen3VLMoeConfig(
            text_config=TEXT, vision_config={**VISION, "deepstack_visual_indexes": [0]}
        ),
        "Qwen3VLForConditionalGeneration",
        "Qwen3ForCausalLM",
    ),
    "qwen3_5_moe": (
        lambda: Qwen3_5MoeConfig(text_config={**TEXT, **HYBRID}, vision_config=VISION),
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5ForCausalLM",
    ),
    # Its text model may be of any class. The whole model's own key ties the head.
    "internvl": (
        lambda: InternVLConfig(
            text_config=Qwen3MoeConfig(**TEXT, norm_topk_prob=True),
            vision_config=InternVLVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=[32, 32],
                patch_size=[8, 8],
            ),
            image_token_id=99,
            tie_word_embeddings=True,
        ),
        "InternVLForConditionalGeneration",
        "Qwen3ForCausalLM",
    ),
}
# Beginnings of the names of what is not of the text model, as m2d.json has them.
CARRIED = {"internvl": ["multi_modal_projector", "vision_tower"]}


@pytest.fixture(scope="module", params=KINDS)
def teacher(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_composite(request.param, tmp_path_factory.mktemp("c") / "teacher")


def make_composite(kind: str, folder: Path) -> Path:
    """Save a composite teacher with a uniform router, and a constant gate on its shared expert."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(KINDS[kind][0](), dtype=torch.float32)
    with torch.no_grad():
        randomise(model)
        for name, parameter in model.named_parameters():
            if ".mlp.gate." in name or "shared_expert_gate" in name:
                parameter.zero_()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if kind == "qwen3_5_moe":
        tensors["mtp.fc.weight"] = torch.ones(4, 4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 1}')
    return folder


@pytest.fixture
def settings(tiny_text: Path) -> dict[str, Any]:
    return {"text": [tiny_text], "sequences": 2, "length": 12}


PARTS = re.compile("visual|vision_tower|multi_modal")
IDS = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_a_composite_student_is_exact_and_carries_the_rest(
    teacher: tuple[str, Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    kind, folder = teacher
    out = m2d.convert(folder, tmp_path / "student", **settings)
    student, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert type(student).__name__ == KINDS[kind][1]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = AutoModelForImageTextToText.from_pretrained(folder)(input_ids=IDS).logits
    assert relative_error(student(input_ids=IDS).logits, expected) < 5e-6
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, out))
    vision = {name for name in theirs if PARTS.search(name)}
    assert vision == {name for name in ours if PARTS.search(name)}
    assert all(torch.equal(theirs[name], ours[name]) for name in vision)
    assert not any("mtp" in name for name in ours)
    record = json.loads((out / "m2d.json").read_text())
    carried = {name.split(".")[0] for name in record["carried"]} if kind == "internvl" else None
    assert (sorted(carried) if carried else record["carried"]) == CARRIED.get(
        kind, ["model.visual"]
    )
    assert record.get("dropped", []) == (["mtp."] if kind == "qwen3_5_moe" else [])
    assert (out / "preprocessor_config.json").read_text() == '{"size": 1}'


@torch.no_grad()
def test_what_is_carried_over_may_hold_infinities(
    teacher: tuple[str, Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Such as bounds that clip nothing, in an audio tower; but no NaN. The text model may not."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher[1], folder)
    tensors = load_file(folder / "model.safetensors")
    carried = next(name for name in tensors if PARTS.search(name))
    tensors[carried].view(-1)[0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    out = m2d.convert(folder, tmp_path / "student", refit="layer", **settings)
    assert torch.equal(load_file(out / "model.safetensors")[carried], tensors[carried])
    ids = torch.randint(3, 90, (2, 12))
    assert math.isfinite(measure(out, ids, 2, "float32", torch.device("cpu")).perplexity)
    tensors[carried].view(-1)[0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        m2d.convert(folder, tmp_path / "nan", **settings)
    tensors[carried].view(-1)[0] = torch.inf
    norm = next(name for name in tensors if name.endswith("norm.weight") and not PARTS.search(name))
    tensors[norm].view(-1)[0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        m2d.convert(folder, tmp_path / "other", **settings)


@torch.no_grad()
def test_the_text_model_alone_is_a_plain_causal_lm(
    teacher: tuple[str, Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    kind, folder = teacher
    out = m2d.convert(folder, tmp_path / "text", text_only=True, **settings)
    student = AutoModelForCausalLM.from_pretrained(out)
    assert type(student).__name__ == KINDS[kind][2]
    expected = AutoModelForImageTextToText.from_pretrained(folder)(input_ids=IDS).logits
    assert relative_error(student(input_ids=IDS).logits, expected) < 5e-6
    promised = text_student(str(folder))
    assert promised["architecture"] == KINDS[kind][2]
    assert promised["parameters"] == sum(p.numel() for p in student.parameters())


@torch.no_grad()
def test_the_same_class_and_a_refit(
    teacher: tuple[str, Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    _, folder = teacher
    out = m2d.convert(folder, tmp_path / "same", student_class="same", refit="layer", **settings)
    student = AutoModelForImageTextToText.from_pretrained(out)
    original = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(student) is type(original)
    expected = original(input_ids=IDS).logits
    assert relative_error(student(input_ids=IDS).logits, expected) < 1e-3


def test_the_text_model_may_lie_under_the_composites_names(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """As transformers writes the text model of a composite checkpoint that it has loaded."""
    config = KINDS["qwen3_5_moe"][0]().text_config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    moved = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(name.startswith("model.language_model.layers.") for name in moved)
    save_file(moved, file, {"format": "pt"})
    out = m2d.convert(tmp_path / "teacher", tmp_path / "student", **settings)
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "Qwen3_5ForCausalLM"


def test_text_only_of_a_text_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = KINDS["qwen3_5_moe"][0]().text_config
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--text-only"]) == 2
    assert "leave out --text-only" in capsys.readouterr().err


@pytest.mark.parametrize("quantised", [False, True])
def test_a_composite_teacher_is_distilled_on_text(
    quantised: bool,
    teacher: tuple[str, Path],
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Aligned and distilled, from the teacher and from its stored logits; the rest is carried.

    Where the teacher's file has the rest in FP8, the student's has it as it was dequantised.
    """
    kind, folder = teacher
    carried = {n: t for n, t in load_file(folder / "model.safetensors").items() if PARTS.search(n)}
    if quantised:
        folder = to_fp8(shutil.copytree(folder, tmp_path / "fp8"), (16, 16), KEPT)
        plain = slow_fp8(folder, (16, 16))
        assert any(not torch.equal(plain[name], carried[name]) for name in carried)
        carried = {name: plain[name] for name in carried}
    student, aligned, out = (tmp_path / name for name in ("student", "aligned", "out"))
    m2d.convert(folder, student, dtype="float32", **settings)
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": IDS.repeat(2, 1)}, tokens, {"sequences": "4", "length": "14"})
    ours = ["--tokens", str(tokens)]
    steps = ["--steps", "2", "--batch", "2", "--device-batch", "2"]
    sizes = ["--steps", "2", "--step-tokens", "28"]
    logits = tmp_path / "logits"
    for command in (
        ["align", student, folder, aligned, *ours, *sizes],
        ["distill", aligned, folder, out, *ours, *steps],
        ["teacher-logits", folder, logits, *ours, "--size", "8"],
        [
            "distill",
            aligned,
            folder,
            tmp_path / "stored",
            *ours,
            *steps,
            "--teacher-logits",
            logits,
        ],
    ):
        assert main([str(part) for part in command]) in (0, None), capsys.readouterr().err
    for made in (aligned, out, tmp_path / "stored"):
        model, info = AutoModelForImageTextToText.from_pretrained(made, output_loading_info=True)
        assert type(model).__name__ == KINDS[kind][1]
        assert not any(info.values())
        found = load_file(made / "model.safetensors")
        rest = {name for name in found if PARTS.search(name)}
        assert rest == set(carried)
        assert all(torch.equal(found[name], tensor) for name, tensor in carried.items())
        with torch.no_grad():
            assert bool(model(input_ids=IDS).logits.isfinite().all())
