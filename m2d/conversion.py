"""One call from teacher to student: calibrate, score, choose, merge."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from m2d.artifacts import require_absent, sha256_of
from m2d.choose.inputs import LayerStatistics
from m2d.choose.names import DEFAULTS, identifiers, resolve
from m2d.choose.plan import check_keep, make_plan
from m2d.choose.scoring import SCORINGS
from m2d.errors import UserError
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher, pick_device, pick_dtype
from m2d.options import add_compute_options, positive
from m2d.progress import say
from m2d.stages.calibrate import add_text_options, tokens_from
from m2d.stages.gram import GramTotals
from m2d.stages.merge import write_student
from m2d.stages.stats import RoutingTotals
from m2d.tokens import read_tokens


def convert(
    teacher: str | Path,
    out: str | Path,
    *,
    scoring: str = DEFAULTS["scoring"],
    grouping: str = DEFAULTS["grouping"],
    scaling: str = DEFAULTS["scaling"],
    keep: int | None = None,
    text: Sequence[str | Path] | None = None,
    calibration: str | Path | None = None,
    dataset: str | None = None,
    sequences: int = 512,
    length: int = 2048,
    dtype: str | None = None,
    device: str | None = None,
    batch: int = 8,
) -> Path:
    """Convert an MoE teacher into a dense student's folder, and return that folder.

    teacher: a local folder or a hub id. out: must not exist, or be empty.
    scoring, grouping, scaling: identifiers or the paper's terms. keep: K, experts kept in each
    layer; the router's top-k by default, which copies them exactly.
    One of text (files), calibration (a token file) or dataset (NAME[:SPLIT[:COLUMN]]) gives the
    calibration tokens; sequences and length say how many, for text and dataset.
    dtype: of the computation and of the student; the checkpoint's by default.

    Raises UserError on bad input, before anything is written.
    """
    if sum(source is not None for source in (text, calibration, dataset)) != 1:
        raise UserError("give one of text, calibration, dataset as the calibration data")
    scoring, grouping = resolve("scoring", scoring), resolve("grouping", grouping)
    scaling = resolve("scaling", scaling)
    require_absent(out)
    opened = open_teacher(teacher)
    keep = opened.top_k if keep is None else keep
    check_keep(keep, opened.top_k, opened.num_experts)
    compute_dtype, chosen_device = pick_dtype(dtype, opened.dtype), pick_device(device)

    if calibration is not None:
        tokens = read_tokens(calibration, opened.config.vocab_size)
        source = Path(calibration).name
    else:
        tokens = tokens_from(opened.folder, text, dataset, length, sequences)
        source = ", ".join(Path(file).name for file in text) if text else str(dataset)
    stream = StreamedTeacher(opened, compute_dtype, chosen_device)
    layers = collect_statistics(stream, tokens, batch)
    rankings = [SCORINGS[scoring](layer) for layer in layers]
    plan = make_plan(layers, rankings, grouping, scaling, keep, scoring=scoring)
    about = {"source": source, "sequences": tokens.shape[0], "length": tokens.shape[1]}
    if calibration is not None:
        about["sha256"] = sha256_of(calibration)
    record = {"calibration": about}
    return write_student(opened, plan, out, compute_dtype if dtype else None, record)


def collect_statistics(
    stream: StreamedTeacher, tokens: Tensor, batch: int
) -> list[LayerStatistics]:
    """Both kinds of statistics of every MoE layer, from one pass of tokens [S, T]."""
    teacher = stream.teacher
    routing, gram = RoutingTotals(teacher), GramTotals()

    def visit(*args: Any) -> None:
        routing.visit(*args)
        gram.visit(*args)

    stream.run(tokens, batch, visit, "calibrating, layers")
    routings, grams = routing.result(), gram.result()
    return [
        LayerStatistics(layer, teacher.top_k, routings[layer], grams[layer])
        for layer in teacher.moe_layers
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    for kind, default in DEFAULTS.items():
        known = ", ".join(identifiers(kind))
        parser.add_argument(f"--{kind}", default=default, help=f"{known} (default: {default})")
    parser.add_argument("--keep", type=positive, help="experts to keep, K (default: the top-k)")
    source = add_text_options(parser)
    source.add_argument("--calibration", metavar="FILE", help="token file from m2d calibrate")
    parser.add_argument("--sequences", type=positive, default=512, help="(default: 512)")
    parser.add_argument("--length", type=positive, default=2048, help="tokens each (default: 2048)")
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(args).items() if k not in ("command", "debug")}
    out = convert(**options)
    say(f"{out}: done; load it with AutoModelForCausalLM.from_pretrained({str(out)!r})")
