"""Sound inputs of every kind, and the commands that read them; not a test."""

import contextlib
import importlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from m2d import cli
from tests.conftest import TEXT, make_teacher
from tests.family_formats import quantise
from tests.family_quantized import to_fp8, to_mxfp4
from tests.family_teachers import make
from tests.test_composite import make_composite


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def make_sound(folder: Path) -> None:
    """One of every kind of file that commands read, by their own commands."""
    os.chdir(folder)
    for module, _ in cli.COMMANDS.values():
        importlib.import_module(module)  # once, and not in every child
    make_teacher(folder / "T")
    tokenizer = json.loads((folder / "T/tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    (folder / "T/tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "T/README.md").write_text("---\nlicense: mit\n---\n# T\n")
    rows = [{"text": line} for line in TEXT.splitlines() * 20]
    chats = [{"messages": [{"role": "user", "content": row["text"]},
                           {"role": "assistant", "content": "yes"}]} for row in rows]  # fmt: skip
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "text.json").write_text(json.dumps(rows))
    (folder / "text.txt").write_text(TEXT * 20)
    pq.write_table(pa.Table.from_pylist(rows), folder / "text.parquet")
    assert run("tokenize", "T", "tokens", "--text", "text.txt", "--sequences", 4,
               "--length", 16) == 0  # fmt: skip
    make_others(folder)
    small = ("--tokens", "tokens")
    for command, out in (("stats", "stats"), ("gram", "gram"), ("neurons", "neurons")):
        assert run(command, "T", out, *small) == 0
    assert run("stats", "T", "share1", *small, "--share", "1/2", "--batch", 1) == 0
    assert run("stats", "T", "share2", *small, "--share", "2/2", "--batch", 1) == 0
    assert (
        run("rank", "ranking", "--statistics", "stats", "--gram", "gram", "--scoring", "reap") == 0
    )
    chosen = ("--statistics", "stats", "--gram", "gram", "--ranking", "ranking")
    results = folder / "R/t/students/s"
    (results / "merged.eval").mkdir(parents=True)
    (folder / "R/t/grid").mkdir()
    assert run("grid", "T", "R/t/grid/reap.parquet", *chosen, *small, "--keeps", "2,4") == 0
    assert run("merge", "T", "S", *chosen, "--grouping", "RR", "--scaling", "uniform",
               "--keep", 2) == 0  # fmt: skip
    shutil.copytree("S", results / "merged")
    assert run("perplexity", "S", *small, "--out", results / "merged.perplexity.json") == 0
    scores = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "arc_easy"}
    evaluation = {"results": {"arc_easy": scores}, "n-shot": {"arc_easy": 25},
                  "n-samples": {"arc_easy": {"effective": 10}},
                  "config": {"model_num_parameters": 1000, "model_dtype": "float32"}}  # fmt: skip
    (results / "merged.eval/arc_easy.json").write_text(json.dumps(evaluation))
    assert run("teacher-logits", "T", "L", *small, "--size", 8, "--rows", 2) == 0


# Quantised teachers, by folder, and the one with a vision tower.
QUANTISED = {"awq": "awq", "w4a16": "compressed w4a16 with zeros", "modelopt": "modelopt fp8"}


OTHERS = ("fp8", "mxfp4", *QUANTISED, "composite")


def make_others(folder: Path) -> None:
    """Small teachers of other layouts, and a config of the workflow for T."""
    to_fp8(make_teacher(folder / "fp8"), (16, 16), ("embed", "norm", "lm_head", "gate.weight"))
    to_mxfp4(make("gpt_oss", folder / "mxfp4"))
    for name, layout in QUANTISED.items():
        quantise(make_teacher(folder / name), layout)
    make_composite("qwen3_vl_moe", folder / "composite")
    with (folder / "config.yaml").open("w") as file, contextlib.redirect_stdout(file):
        assert run("init", "T", "--text", "text.txt", "--test", "text.json") == 0


GRID, PERPLEXITY, EVALUATION, RECORD = (
    "R/t/grid/reap.parquet", "R/t/students/s/merged.perplexity.json",
    "R/t/students/s/merged.eval/arc_easy.json", "R/t/students/s/merged/m2d.json",
)  # fmt: skip


CHOSEN = ("--statistics", "stats", "--gram", "gram", "--ranking", "ranking")


METHODS = ("--grouping", "WC", "--scaling", "proportional", "--keep", "4")


DISTILL = ("distill", "S", "T", "out", "--tokens", "tokens", "--steps", "1", "--batch", "2",
           "--device-batch", "2", "--precision", "fp32")  # fmt: skip


TABLES = ("--grid", GRID, "--perplexity", PERPLEXITY, "--evaluation", EVALUATION,
          "--provenance", RECORD)  # fmt: skip


def tokenize(file: str) -> tuple[str, ...]:
    return ("tokenize", "T", "out", "--text", file, "--sequences", "2", "--length", "16")


# file -> commands that read it; a file stands more than once to be damaged more often
READERS: list[tuple[str, tuple[str, ...]]] = [
    *((f, tokenize(f)) for f in ("text.jsonl", "chats.jsonl", "text.json", "text.txt",
                                 "text.parquet")),
    ("T/tokenizer.json", tokenize("text.txt")),
    ("T/tokenizer_config.json", tokenize("chats.jsonl")),
    ("T/config.json", ("inspect", "T")),
    ("T/config.json", ("convert", "T", "out", "--tokens", "tokens")),
    ("T/model.safetensors", ("convert", "T", "out", "--tokens", "tokens")),
    ("T/README.md", ("merge", "T", "out", *CHOSEN, *METHODS)),
    ("T/generation_config.json", ("merge", "T", "out", *CHOSEN, *METHODS)),
    ("tokens", ("stats", "T", "out", "--tokens", "tokens")),
    ("tokens", ("perplexity", "S", "--tokens", "tokens", "--out", "out")),
    ("tokens", DISTILL),
    ("stats", ("rank", "out", *CHOSEN[:4], "--scoring", "reap")),
    ("gram", ("rank", "out", *CHOSEN[:4], "--scoring", "gld_reap")),
    ("stats", ("merge", "T", "out", *CHOSEN, *METHODS)),
    ("ranking", ("merge", "T", "out", *CHOSEN, *METHODS)),
    ("neurons", ("merge", "T", "out", "--neurons", "neurons", "--width", "8")),
    ("share1", ("combine", "out", "share1", "share2")),
    ("S/plan.json", ("merge", "T", "out", "--plan", "S/plan.json")),
    ("S/m2d.json", DISTILL),
    ("S/config.json", ("perplexity", "S", "--tokens", "tokens", "--out", "out")),
    ("S/model.safetensors", ("perplexity", "S", "--tokens", "tokens", "--out", "out")),
    ("S/m2d.json", ("card", "S")),
    *((f, ("tables", "out", *TABLES)) for f in (GRID, PERPLEXITY, EVALUATION, RECORD)),
    (PERPLEXITY, ("card", "R/t/students/s/merged", "--perplexity", PERPLEXITY)),
    (EVALUATION, ("card", "R/t/students/s/merged", "--evaluation", EVALUATION)),
    ("L/index.json", (*DISTILL, "--teacher-logits", "L")),
    ("L/shard-00000.safetensors", (*DISTILL, "--teacher-logits", "L")),
]  # fmt: skip


# Of the seeds from here on these too; earlier seeds keep their cases.
FURTHER_FROM = 800_000


FURTHER: list[tuple[str, tuple[str, ...]]] = [
    *((f"{folder}/{file}", ("convert", folder, "out", "--tokens", "tokens"))
      for folder in OTHERS for file in ("config.json", "model.safetensors")),
    ("modelopt/hf_quant_config.json", ("stats", "modelopt", "out", "--tokens", "tokens")),
    *((f"{folder}/config.json", ("inspect", folder)) for folder in OTHERS),
    *((f"{folder}/model.safetensors", (*DISTILL[:2], folder, *DISTILL[3:], "--any-teacher"))
      for folder in OTHERS[:2]),
    *[("config.yaml", ("estimate", "all_t", "--config", "config.yaml"))] * 3,
    ("config.yaml", ("doctor", "all_t", "--config", "config.yaml")),
]  # fmt: skip
