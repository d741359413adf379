"""`m2d init TEACHER > my.yaml`: a config of the workflow for a teacher of one's own."""

import argparse
import re
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.options import positive, token_count
from m2d.pipeline.place import in_root
from m2d.pipeline.resources import Sizes, read_sizes
from m2d.pipeline.teachers import config_file, sizes_file

# The paper's step, and its learning rate.
STEP_SEQUENCES, LEARNING_RATE = 384, "1.0e-4"
LENGTH = 2048
# The paper's evaluation, with about how many tokens a model reads for it.
PAPER_TASKS = (
    "  winogrande: {tasks: [winogrande], shots: 5, tokens: 400000}\n"
    "  hellaswag: {tasks: [hellaswag], shots: 10, tokens: 42000000}\n"
    "  arc: {tasks: [arc_easy, arc_challenge], shots: 25, tokens: 13000000}\n"
    "  mmlu: {tasks: [mmlu], shots: 5, tokens: 10000000}\n"
)


def config_text(
    model: str,
    sizes: Sizes,
    *,
    length: int,
    budget: int,
    text: list[str],
    test: list[str],
    dense: tuple[str, dict[str, int]] | None = None,
) -> str:
    """The config, as commented YAML.

    length: tokens of a sequence. budget: tokens of distillation. text, test: files of the user's
    own, in place of the paper's datasets. dense: a dense teacher and a student's sizes, to compare.
    """
    name = plain_name(model)
    few = bool(text)  # of one's own text there may be little
    calibration, tests = (64, 32) if few else (512, 140)
    batch = min(STEP_SEQUENCES, max(budget // length // 50, 8)) // 4 * 4
    steps = max(budget // (batch * length), 1)
    train, held_out = ("train", "held-out") if few else ("fineweb-edu", "wikitext-2")
    datasets = (
        ["datasets:", f"  train: {flow({'files': text})}", f"  held-out: {flow({'files': test})}"]
        if few
        else []
    )
    student = sizes["student_parameters"]
    lines = [
        f"# {model}: {billions(sizes['teacher_parameters'])} parameters, {sizes['num_experts']} "
        f"experts, top-{sizes['top_k']}; a student of {billions(student)}.",
        f"# What it takes:  m2d estimate all_{name} --config my.yaml",
        '# Run it:         snakemake -s "$(m2d workflow)" --configfile my.yaml --cores 8 all',
        f"# Then serve:     results/{name}/students/do-acp-k{sizes['top_k']}/distilled",
        "teachers:",
        f"  {name}: {{model: {quoted(model)}}}",
        *([f"  {plain_name(dense[0])}: {{model: {quoted(dense[0])}}}"] if dense else []),
        *datasets,
        "tokens:" + ("" if few else " # the paper's; for text of your own, --text and --test"),
        f"  calibration: {{dataset: {train}, sequences: {calibration}, length: {length}}}",
        f"  test: {{dataset: {held_out}, sequences: {tests}, length: {length}}}",
        f"  distillation: {{dataset: {train}, sequences: {steps * batch}, length: {length}}}",
        f"recipes: # {billions(steps * batch * length)} tokens; the paper has 0.3B and 4B",
        f"  distilled: {{steps: {steps}, batch: {batch}, device_batch: 4, learning_rate: "
        f"{LEARNING_RATE}, gradient_checkpointing: true}}",
        *(["students:", f"  pruned: {flow({'baseline': 'd2d', **dense[1]})}"] if dense else []),
        "evaluations:" + ("" if not few else " {} # such as {mmlu: {tasks: [mmlu], shots: 5}}"),
        *([] if few else PAPER_TASKS.rstrip().splitlines()),
        "pipelines:",
        f"  all_{name}:",
        f"    teachers: [{', '.join([name, *([plain_name(dense[0])] if dense else [])])}]",
        "    # scorings: [SF, PP, PS, CP, ACP, DO-CP, DO-ACP] # a grid of 50 students for each",
        "    distill:",
        "      # A student's name says what it is: do-acp-k16, sf-wc-k16, ... (docs/workflow.md).",
        '      - {student: "do-acp-k{top_k}", recipe: distilled}',
        *(["      - {student: pruned, recipe: distilled}"] if dense else []),
        f"    evaluations: [{'' if few else 'winogrande, hellaswag, arc, mmlu'}]",
    ]
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.strip()


def quoted(text: str) -> str:
    """A string as YAML, quoted where it must be."""
    return flow([text])[1:-1]


def plain_name(model: str) -> str:
    """A name of the config for a model: its last part, in lower case."""
    last = model.partition("@")[0].rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"[^a-z0-9_.-]+", "-", last.lower()).strip("-._")
    return name or "teacher"


def billions(count: float) -> str:
    """3.34B, 1.48M."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def longest(model: str) -> int:
    """Tokens of a sequence: the paper's, or as many as the model takes."""
    file = config_file(model)
    if file is None:
        return LENGTH
    content = read_json(file)
    most = content.get("max_position_embeddings") or content.get("text_config", {}).get(
        "max_position_embeddings"
    )
    return min(LENGTH, int(most)) if most else LENGTH


def pruned_shape(moe: Sizes, dense: Sizes) -> dict[str, int]:
    """Sizes of a student from a dense teacher, about those of the MoE's: layers, width, heads."""
    hidden = min(moe["hidden_size"], dense["hidden_size"])
    kv_heads = dense["num_kv_heads"]
    heads = ceil(dense["num_heads"] * hidden / dense["hidden_size"] / kv_heads) * kv_heads
    return {
        "layers": min(moe["num_layers"], dense["num_layers"]),
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "intermediate_size": moe["students"][0]["intermediate_size"],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id of a Mixture-of-Experts model")
    parser.add_argument("--dense-teacher", help="a dense model, to be pruned for comparison")
    parser.add_argument("--text", nargs="+", default=[], help="files to calibrate and distil on")
    parser.add_argument("--test", nargs="+", default=[], help="files to measure perplexity on")
    parser.add_argument(
        "--tokens", type=token_count, default="300M", help="of distillation (%(default)s)"
    )
    parser.add_argument("--length", type=positive, help="tokens of a sequence (2048 at most)")


def main(args: argparse.Namespace) -> None:
    if bool(args.text) != bool(args.test):
        raise UserError("--text and --test go together: perplexity is measured on other text")
    for file in (*args.text, *args.test):
        if not Path(file).exists():
            raise UserError(f"{file}: no such file")
    model = in_root(args.teacher)
    sizes = read_sizes(sizes_file(model))
    if "num_experts" not in sizes:
        raise UserError(f"{args.teacher}: has no experts; give a Mixture-of-Experts model")
    dense = None
    if args.dense_teacher:
        found = read_sizes(sizes_file(in_root(args.dense_teacher)))
        if "num_experts" in found:
            raise UserError(f"{args.dense_teacher}: has experts; --dense-teacher is a dense model")
        dense = (args.dense_teacher, pruned_shape(sizes, found))
    print(
        config_text(
            args.teacher,
            sizes,
            length=args.length or longest(model),
            budget=args.tokens,
            text=args.text,
            test=args.test,
            dense=dense,
        ),
        end="",
    )
