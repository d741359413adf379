"""What of a recipe a family cannot have: left out, and refused where it was asked for."""

import json
from pathlib import Path
from typing import Any

import family_teachers
import pytest
import torch
from conftest import VOCABULARY, write_tokens
from test_halves import make_shared_indices

import m2d
from m2d.errors import UserError
from m2d.models.stream import StreamedTeacher

TOKENS = torch.randint(0, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AFMoE, which norms its FFN's output before it adds it, and calibration tokens."""
    folder = tmp_path_factory.mktemp("attainable")
    experts = {"num_experts": 8, "moe_intermediate_size": 16, "num_shared_experts": 1}
    changes = {**experts, "num_dense_layers": 1, "num_hidden_layers": 3, "layer_types": None}
    family_teachers.save_stock(folder / "teacher", "Afmoe", changes)
    write_tokens(folder / "tokens.safetensors", TOKENS, {"source": "random"})
    return folder


def test_the_best_recipe_leaves_it_out_and_says_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = m2d.convert(
        place / "teacher", tmp_path / "out", tokens=place / "tokens.safetensors", recipe="best"
    )
    assert "without refit and align, since" in capsys.readouterr().err
    record = json.loads((out / "m2d.json").read_text())
    assert record["recipe"] == "best"
    assert record["fold"]["mode"] == "neuron"
    assert not {"refit", "align"} & record.keys()


@pytest.mark.parametrize("asked", [{"refit": "sequential"}, {"recipe": "best", "align": 3}])
def test_it_is_refused_before_any_pass_where_it_was_asked(
    asked: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass was made")

    monkeypatch.setattr(StreamedTeacher, "run", unwanted)
    with pytest.raises(UserError, match=r"AfmoeDecoderLayer.*; leave out refit"):
        m2d.convert(
            place / "teacher", tmp_path / "out", tokens=place / "tokens.safetensors", **asked
        )
    assert not list(tmp_path.iterdir())


def test_a_budget_where_layers_hand_on_more(place: Path, tmp_path: Path) -> None:
    """The probe's layer attends to tokens that the layer before has chosen."""
    teacher = make_shared_indices(tmp_path / "teacher")
    tokens = place / "tokens.safetensors"
    out = m2d.convert(teacher, tmp_path / "out", tokens=tokens, budget="10min")
    layers = json.loads((out / "m2d.json").read_text())["align"]["layers"]
    assert len(layers) == 3


def test_a_norm_over_the_experts_sum_is_seen(place: Path, tmp_path: Path) -> None:
    """A.X-K1 norms what shared and routed experts give together, within its block."""
    experts = {"n_routed_experts": 8, "moe_intermediate_size": 16, "n_shared_experts": 1}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    groups = {"n_group": 1, "topk_group": 1, "v_head_dim": 8, "first_k_dense_replace": 1}
    changes = {**experts, **latent, **groups, "num_key_value_heads": 4}
    teacher = family_teachers.save_stock(tmp_path / "teacher", "AXK1", changes)
    with pytest.raises(UserError, match=r"AXK1MoE.*; leave out refit"):
        m2d.convert(teacher, tmp_path / "out", tokens=place / "tokens.safetensors", refit="layer")
