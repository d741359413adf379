"""A tiny student of every family, of sizes that serving programs have kernels for."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import family_teachers
from conftest import TEXT, make_tokenizer

import m2d
from m2d.export.folder import export_folder

# vLLM's attention on the CPU wants heads of 32, its latent attention those of DeepSeek itself.
SIZES: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"head_dim": 32}
# llama.cpp's converter asks a GLM's tokenizer for these.
GLM = {**HEADS, "vocab_size": 304}
GLM_TOKENS = ["[gMASK]", "<|user|>", "<|observation|>"]
# llama.cpp knows one limit of GPT-OSS's SwiGLU, that of the released ones.
GPT_OSS = {**HEADS, "swiglu_limit": 7.0}
# llama.cpp has neither grouped heads nor clipping in an OLMoE, as the released one has neither.
OLMOE = {"num_key_value_heads": 4, "clip_qkv": None}
LATENT = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "q_lora_rank": 24,  # without it llama.cpp takes 27 layers alone, as V2-Lite has
}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
}
# llama.cpp's Qwen2-MoE has experts in every layer, as the released ones do.
QWEN2 = {"mlp_only_layers": []}
SAME = {"student_class": "same"}
LATENT_NOTE = "without YaRN vLLM scales the attention otherwise; the teacher likewise"


@dataclass(frozen=True)
class Student:
    """A row of the table."""

    title: str
    teacher: str
    """A name in tests/family_teachers.py."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the teacher's config."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of m2d.convert."""
    experts: int | None = None
    """Of m2d export to a folder, where that is what is served."""
    parallel: int = 1
    """Tensor parallelism in vLLM."""
    limits: dict[str, float | None] = field(default_factory=dict)
    """Program -> the difference that is known of it; None where it is known to refuse."""
    note: str = ""


STUDENTS = {
    "qwen3_moe": Student("Qwen3-MoE", "qwen3_moe", HEADS),
    "mixtral": Student("Mixtral", "mixtral"),
    "granitemoe": Student("Granite-MoE", "granitemoe"),
    "emo": Student("EMO", "emo", {"num_key_value_heads": 4}),
    "olmoe": Student("OLMoE", "olmoe", OLMOE),
    "qwen2_moe": Student("Qwen2-MoE", "qwen2_moe", QWEN2, SAME),
    "qwen2_moe_sibling": Student("Qwen2-MoE", "qwen2_moe", QWEN2, note="the default class"),
    "gpt_oss": Student("GPT-OSS", "gpt_oss", GPT_OSS, limits={"llama.cpp": 2.0}),
    "glm4_moe": Student("GLM-4-MoE", "glm4_moe", GLM, limits={"vLLM": None}),
    "glm4_moe_exported": Student(
        "GLM-4-MoE", "glm4_moe", GLM, experts=2, note="`m2d export STUDENT OUT`"
    ),
    "deepseek_v2_yarn": Student("DeepSeek-V2, YaRN", "deepseek_v2", {**LATENT, **YARN}),
    "deepseek_v3_yarn": Student("DeepSeek-V3, YaRN", "deepseek_v3", {**LATENT, **YARN}),
    "deepseek_v3": Student(
        "DeepSeek-V3, no YaRN", "deepseek_v3", LATENT, limits={"vLLM": 5.0}, note=LATENT_NOTE
    ),
    "qwen2_moe_parallel": Student(
        "Qwen2-MoE", "qwen2_moe", QWEN2, SAME, parallel=2, limits={"vLLM": None}, note="two devices"
    ),
    "qwen2_moe_exported": Student(
        "Qwen2-MoE",
        "qwen2_moe",
        QWEN2,
        SAME,
        experts=2,
        parallel=2,
        note="two devices, `m2d export STUDENT OUT --experts 2`",
    ),
}


def make_student(name: str, folder: Path) -> Path:
    """The folder that is served, made where it is not yet."""
    student = STUDENTS[name]
    out, teacher = folder / "student", folder / "teacher"
    if not out.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "text.txt"
        text.write_text(TEXT * 60, encoding="utf-8")
        if not teacher.is_dir():
            sizes = {} if student.teacher == "emo" else SIZES
            family_teachers.make(student.teacher, teacher, **{**sizes, **student.changes})
            if student.changes is GLM:
                tokenizer = make_tokenizer()
                tokenizer.add_tokens(GLM_TOKENS, special_tokens=True)
                tokenizer.save_pretrained(teacher)
        m2d.convert(teacher, out, text=[text], sequences=4, length=32, **student.options)
    if student.experts is None:
        return out
    exported = folder / "exported"
    if not exported.is_dir():
        export_folder(out, exported, student.experts)
    return exported
