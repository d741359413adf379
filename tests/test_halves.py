"""Layers run in halves: the residual stream is the whole model's."""

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, make_teacher
from transformers import AutoModelForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from m2d.models.teacher import open_teacher
from m2d.refit.halves import SteppedModel
from m2d.refit.refit import teacher_half

TOKENS = torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(2))


def make_shared_indices(folder: Path) -> Path:
    """A teacher whose layers 1 and 3 attend to the tokens that layers 0 and 2 have chosen."""
    torch.manual_seed(0)
    config = GlmMoeDsaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8,
        qk_nope_head_dim=8, index_topk=4, index_head_dim=8, index_n_heads=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, indexer_types=["full", "shared", "full", "shared"],
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=None, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GlmMoeDsaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [make_teacher, make_shared_indices])
@torch.no_grad()
def test_halves_run_on_what_the_layers_before_have_handed_on(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = make(tmp_path / "teacher")
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    found: list[torch.Tensor] = []
    stock.model.layers[-1].register_forward_hook(lambda _, __, out: found.append(out))
    stock(TOKENS, use_cache=False)
    expected = found[0][0] if isinstance(found[0], tuple) else found[0]

    teacher = open_teacher(folder)
    model = SteppedModel(teacher, torch.float32, torch.device("cpu"))
    model.start(TOKENS, 2)
    for index in range(len(model.layers)):
        layer = model.load(index)
        if index in teacher.moe_layers:
            for i in range(len(model.hidden)):
                teacher_half(model, layer, index, i, check=True)
        else:
            model.advance(layer, index)
        model.drop(layer)
    assert torch.allclose(torch.cat(list(model.hidden)), expected, atol=1e-4)
