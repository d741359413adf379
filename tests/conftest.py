"""Tiny models of the real architectures, saved to disk in the layout that the hub uses."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from xdist.scheduler import LoadScopeScheduling

from m2d.artifacts import atomic_path

TEXT = """A mixture of experts sends every token to a few of many small networks.
The router scores the experts, and the highest scores win the token.
A dense model sends every token through one larger network instead.
"""
VOCABULARY = 300
# Fixtures that several files of tests share.
pytest_plugins = ("bound", "evaluation_data", "family_teachers", "workflow_project")
# Files whose tests share what takes long to make, and so a process of pytest-xdist. Not by its mark
# `xdist_group`, which pytest 9.2 does not pass on.
TOGETHER = {
    "test_workflow.py": "workflow",
    "test_reruns.py": "workflow",
    "test_quoting.py": "workflow",
    "test_pipelines.py": "pipelines",
    "test_cost_plan.py": "pipelines",
    "test_report.py": "report",
}


class OneProcessAGroup(LoadScopeScheduling):
    """The tests of a group in one process, the largest group first; any other test anywhere."""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER.get(Path(nodeid.partition("::")[0]).name, nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return OneProcessAGroup(config, log)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_tokens(path: str | Path, input_ids: torch.Tensor, metadata: dict[str, str]) -> None:
    """Write input_ids [sequences, length] with a note of where they come from."""
    sizes = {"sequences": str(input_ids.shape[0]), "length": str(input_ids.shape[1])}
    with atomic_path(path) as temporary:
        save_file({"input_ids": input_ids.contiguous()}, temporary, {**metadata, **sizes})


def forget_digests(student: Path) -> None:
    """As who changes a student's weights in its folder, and means it, does."""
    record = json.loads((student / "m2d.json").read_text())
    del record["files_sha256"]
    (student / "m2d.json").write_text(json.dumps(record))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens, with `<|endoftext|>` as end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def make_teacher(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Save a random Qwen3-MoE (2 layers, 8 experts of width 16, top-2) and its tokenizer.

    The weights are larger than an initialisation's, so that experts and routing differ clearly
    between tokens.
    """
    settings: dict = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder; tests must not write into it."""
    return make_teacher(tmp_path_factory.mktemp("teacher") / "tiny-moe")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few thousand tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 60, encoding="utf-8")
    return file
