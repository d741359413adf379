"""Inkling 2, whose layers are given the inputs of all layers that began a block before them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Inkling2Config

import m2d
from m2d.cli import main
from m2d.evaluate.perplexity import measure
from m2d.models import resume, stream
from m2d.models.load import load_model
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher, read_config
from tests.conftest import VOCABULARY, make_tokenizer
from tests.family_teachers import randomise

EXPERTS, LAYERS, WIDTH, HIDDEN = 4, 5, 16, 32
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY - 3, "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "sliding_window_size": 6, "rel_extent": 8, "n_routed_experts": EXPERTS,
    "moe_intermediate_size": WIDTH, "n_layers_per_attn_res_block": 2, "initializer_range": 0.2,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid", "hybrid_sliding", "hybrid"],
    "max_position_embeddings": 64, "pad_token_id": None, "eos_token_id": 0, "mlp_gate_softcap": 1.0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
    "posemb_grid_size": 2, "projection_hidden_dim": 24, "text_hidden_size": HIDDEN,
}  # fmt: skip
IDS = torch.randint(3, 90, (5, 12), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


def make_inkling(folder: Path, top_k: int, uniform: bool) -> Path:
    torch.manual_seed(0)
    text = {**TEXT, "num_experts_per_tok": top_k}
    config = Inkling2Config(text_config=text, vision_config=VISION, image_token_id=99)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        randomise(model)
        for name, tensor in model.state_dict().items():
            if name.endswith("query"):
                tensor.normal_(0, 1)
            elif uniform and "mlp.gate." in name:
                tensor.zero_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With routers that choose; not to be written to."""
    return make_inkling(tmp_path_factory.mktemp("inkling") / "teacher", 2, uniform=False)


def stock(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_gate_and_up_that_alternate_on_disk_are_read_as_the_class_reads_them(teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    fused = tensors["model.llm.layers.1.mlp.experts.w13_weight"]
    model = stock(teacher)
    gate = model.model.language_model.layers[1].mlp.experts.gate_up_proj[:, :WIDTH]
    assert torch.equal(fused[:, ::2], gate)  # what the rest of the test rests on
    ours = load_model(teacher, read_config(teacher)[1], torch.float32, "cpu").state_dict()
    theirs = model.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@torch.no_grad()
def test_the_streamed_teacher_is_the_stock_model(teacher: Path) -> None:
    """In batches of two sizes; every layer's input, too, is the stock model's."""
    model, inputs = stock(teacher), []
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
    expected = model(input_ids=IDS).logits
    seen: dict[int, list[torch.Tensor]] = {}
    streamed = StreamedTeacher(open_teacher(teacher), torch.float32, CPU)
    hidden = streamed.run(IDS, 2, lambda v: seen.setdefault(v.layer, []).append(v.hidden))
    for index, given in enumerate(inputs):
        found = torch.cat(seen[index])
        torch.testing.assert_close(found, given.view_as(found), rtol=1e-4, atol=1e-4)
    for ids, states, logits in zip(IDS.split(2), hidden, expected.split(2), strict=True):
        found = streamed.logits(ids, states, slice(None))
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    target = IDS[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), target)
    perplexity = measure(teacher, IDS, 2, "float32", CPU).perplexity
    assert perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


@torch.no_grad()
def test_a_uniform_router_over_all_experts_converts_exactly(
    tmp_path: Path, tiny_text: Path
) -> None:
    folder = make_inkling(tmp_path / "teacher", EXPERTS, uniform=True)
    out = m2d.convert(folder, tmp_path / "student", text=[tiny_text], sequences=2, length=12)
    student, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    layers = student.model.language_model.layers
    assert {len(layer.mlp.experts.down_proj) for layer in layers} == {1}
    found, expected = student(input_ids=IDS).logits, stock(folder)(input_ids=IDS).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 5e-6
    again = load_model(out, read_config(out)[1], torch.float32, "cpu").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in student.state_dict().items())
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, out))
    tower = {name for name in theirs if ".visual." in name}
    assert tower
    assert all(torch.equal(theirs[name], ours[name]) for name in tower)


def test_fold_distill_and_verify(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both models give logits to fewer tokens than their output embeddings have rows."""
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": IDS}, tokens, {"sequences": "5", "length": "12"})
    student, logits, out, stored = (tmp_path / n for n in ("student", "logits", "out", "stored"))
    steps = ["--tokens", tokens, "--steps", "2", "--batch", "2", "--device-batch", "2"]
    for command in (
        ["convert", teacher, student, "--tokens", tokens, "--fold", "layer"],
        ["distill", student, teacher, out, *steps],
        ["teacher-logits", teacher, logits, "--tokens", tokens, "--size", "8"],
        ["distill", student, teacher, stored, *steps, "--teacher-logits", logits],
        ["verify", out],
    ):
        assert main([str(part) for part in command]) in (0, None), capsys.readouterr().err


@pytest.mark.parametrize("in_files", [False, True])
def test_a_pass_goes_on_in_the_middle_of_a_block(
    in_files: bool, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    if in_files:
        monkeypatch.setattr(stream, "IN_MEMORY_BYTES", 0)
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": IDS}, tokens, {"sequences": "5", "length": "12"})

    def stats(name: str) -> int:
        files = ["gram", teacher, tmp_path / name, "--tokens", tokens, "--batch", "2"]
        return main([str(part) for part in files])

    assert stats("whole.safetensors") == 0
    observe, load, loaded = StreamedTeacher._observe, StreamedTeacher._load_layer, []

    def killed(self: StreamedTeacher, layer: Any, index: int, visit: Any) -> None:
        if index == 3:
            raise KeyboardInterrupt
        observe(self, layer, index, visit)

    def noted(self: StreamedTeacher, index: int) -> Any:
        loaded.append(index)
        return load(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedTeacher, "_observe", killed)
        assert stats("other.safetensors") == 130
    monkeypatch.setattr(StreamedTeacher, "_load_layer", noted)
    assert stats("other.safetensors") == 0
    assert loaded == [3, 4]
    names = ("whole.safetensors", "other.safetensors")
    whole, other = (load_file(tmp_path / name) for name in names)
    assert whole.keys() == other.keys()
    assert all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("option", [["--refit", "layer"], ["--align", "2"]])
def test_what_does_not_apply_is_refused_in_one_line(
    option: list[str], teacher: Path, tmp_path: Path, tiny_text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["convert", str(teacher), str(tmp_path / "out"), "--text", str(tiny_text), *option]
    assert main([*words, "--sequences", "4", "--length", "8"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "inkling2" in error
    assert "leave out refit and align" in error
    assert not (tmp_path / "out").exists()
