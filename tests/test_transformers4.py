"""Students as transformers 4 reads them, in an environment of its own: make test-transformers4."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, write_tokens
from family_teachers import MAKERS, make
from safetensors.torch import load_file, save_file
from test_same_trunk import YARN, respell
from transformers import AutoModelForCausalLM

import m2d
from m2d.cli import main

pytestmark = [pytest.mark.transformers4, pytest.mark.timeout(900)]
PYTHON = Path(os.environ.get("TRANSFORMERS4", ".venv-transformers4/bin/python"))
WORKER = Path(__file__).with_name("transformers4_worker.py")
# Classes that transformers 4.57 has, as teachers of students that are not those of another name.
NAMES = [name for name in MAKERS if name not in ("emo_always_active",)]


def test_students_and_distilled_students_are_the_same_in_both_versions(
    tmp_path: Path, tiny_text: Path
) -> None:
    ids = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    tokens = tmp_path / "tokens.safetensors"
    write_tokens(tokens, ids.reshape(8, 15).int(), {"source": "random"})
    students: list[Path] = []
    for name in NAMES:
        # Version 4 has GPT-OSS' clamp as a constant, and takes a ratio for its YaRN's factor.
        real = {"max_position_embeddings": 131_072, "swiglu_limit": 7.0}
        changes = real if name == "gpt_oss" else {}
        teacher = make(name, tmp_path / name, **changes)
        students.append(m2d.convert(teacher, tmp_path / f"{name}-s", tokens=tokens))
    for name, version, scaling in (
        ("qwen3_moe", 5, None),
        ("qwen3_moe", 4, None),
        ("qwen3_moe", 5, YARN),
        ("qwen3_moe", 4, YARN),
        ("deepseek_v3", 5, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
        ("deepseek_v3", 4, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    ):
        kind = (scaling or {}).get("rope_type", "plain")
        folder = respell(make(name, tmp_path / f"{name}-{kind}-{version}"), scaling, version)
        merged = m2d.convert(folder, tmp_path / f"{folder.name}-s", tokens=tokens)
        distilled = tmp_path / f"{folder.name}-d"
        options = ["--tokens", tokens, "--steps", 1, "--batch", 4, "--device-batch", 4]
        options += ["--precision", "fp32", "--device", "cpu", "--learning-rate", "1e-9"]
        command = ["distill", merged, folder, distilled, *options]
        assert main(list(map(str, command))) == 0
        config = [json.loads((f / "config.json").read_text()) for f in (merged, distilled)]
        assert config[0] == config[1]
        students += [merged, distilled]
    outputs = [tmp_path / f"{folder.name}.logits" for folder in students]
    pairs = [str(path) for pair in zip(students, outputs, strict=True) for path in pair]
    command = [str(PYTHON), str(WORKER), str(tmp_path / "ids.safetensors"), *pairs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = {}
    for folder, file in zip(students, outputs, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            new = model(ids).logits
        old = load_file(file)["logits"]
        differences[folder.name] = float((new - old).abs().max() / new.abs().max())
    assert {name: d for name, d in differences.items() if not d < 1e-5} == {}
