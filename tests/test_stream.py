"""The streamed teacher against the stock model, fully loaded."""

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, make_teacher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from m2d.errors import UserError
from m2d.inspect import inspect
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.models.visit import Visit

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_loaded_models(tmp_path: Path, tied: bool) -> None:
    # The second layer is dense and of another width; five sequences make an uneven last batch.
    folder = make_teacher(
        tmp_path / "t", num_hidden_layers=3, mlp_only_layers=[1], tie_word_embeddings=tied
    )
    ids = torch.randint(0, VOCABULARY, (5, 20))
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    teacher = open_teacher(folder)
    assert teacher.moe_layers == [0, 2]
    stream = StreamedTeacher(teacher, torch.float32, CPU)
    hidden = stream.run(ids, batch=2)
    parts = zip(ids.split(2), hidden, strict=True)
    logits = torch.cat([stream.logits(part, last, slice(3, 17)) for part, last in parts])
    torch.testing.assert_close(logits, reference[:, 3:17], rtol=1e-5, atol=1e-5)


def test_a_stream_leaves_its_teacher_whole(tiny_teacher: Path) -> None:
    """Who asks the teacher afterwards sees what was there before; two streams of one agree."""
    teacher = open_teacher(tiny_teacher)
    before = inspect(teacher)
    ids = torch.randint(0, VOCABULARY, (2, 8))
    first, second = (StreamedTeacher(teacher, torch.float32, CPU) for _ in range(2))
    one, two = (stream.run(ids, batch=2)[0] for stream in (first, second))
    assert torch.equal(one, two)
    assert torch.equal(first.run(ids, batch=2)[0], one)
    assert inspect(teacher) == before
    assert all(parameter.is_meta for parameter in teacher.skeleton.parameters())


def test_visits_every_moe_layer_and_token_with_the_routing_that_was_used(
    tiny_teacher: Path,
) -> None:
    """The routed sum, recomputed from what a visit is told, is what the stock block gives."""
    ids = torch.randint(0, VOCABULARY, (3, 10))
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    blocks = [layer.mlp for layer in model.model.layers]
    seen = {0: 0, 1: 0}

    def visit(batch: Visit) -> None:
        layer, hidden, index, weights = batch.layer, batch.hidden, batch.index, batch.weights
        expected = blocks[layer](hidden[None])[0]
        stock = blocks[layer].experts
        routed = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for slot in range(index.shape[1]):
                expert = index[token, slot]
                gate, up = (stock.gate_up_proj[expert] @ hidden[token]).chunk(2)
                output = stock.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                torch.testing.assert_close(batch.norms[token, slot], output.norm())
                routed[token] += weights[token, slot] * output
        torch.testing.assert_close(routed, expected, rtol=1e-4, atol=1e-5)
        seen[layer] += len(hidden)

    with torch.no_grad():
        StreamedTeacher(open_teacher(tiny_teacher), torch.float32, CPU).run(ids, 2, visit)
    assert seen == {0: 30, 1: 30}


def test_layers_are_dropped_after_use(tiny_teacher: Path) -> None:
    stream = StreamedTeacher(open_teacher(tiny_teacher), torch.float32, CPU)
    stream.run(torch.zeros(1, 4, dtype=torch.long), 1)
    assert all(p.is_meta for layer in stream.layers for p in layer.parameters())


def rewrite(folder: Path, change) -> Path:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", "1 tensor is missing"),
        ("model.layers.0.self_attn.q_proj.weight", "1 tensor is missing"),
        ("model.norm.weight", "1 tensor is missing"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str, message: str) -> None:
    folder = rewrite(make_teacher(tmp_path / "t"), lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"{message}.*{name}"):
        StreamedTeacher(open_teacher(folder), torch.float32, CPU).run(
            torch.zeros(1, 4, dtype=torch.long), 1
        )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_wrong_shape_is_named(tmp_path: Path, name: str) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    folder = rewrite(make_teacher(tmp_path / "t"), shrink)
    with pytest.raises(UserError, match="on disk, but the config implies"):
        StreamedTeacher(open_teacher(folder), torch.float32, CPU).run(
            torch.zeros(1, 4, dtype=torch.long), 1
        )
