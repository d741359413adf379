"""One call from teacher to student: calibrate, fold, score, choose, merge, refit and align."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d.artifacts import require_absent, scratch_folder
from m2d.budget import Paced, describe_choice, pace, parse_budget
from m2d.choose.grouping import GROUPINGS
from m2d.choose.neuron_statistics import CHOICES, neuron_plan
from m2d.choose.plan import Plan, check_keep, make_plan
from m2d.choose.scaling import SCALINGS
from m2d.choose.scoring import SCORINGS
from m2d.devices import compute_dtype, pick_device
from m2d.errors import UserError
from m2d.models.folded import Folds
from m2d.models.resume import Keeper, Kept, identity, keeper, remove_kept
from m2d.models.skeleton import auto_class
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import STUDENT_CLASSES, Teacher, open_teacher, read_config
from m2d.models.widths import add_groups_option, add_width_options, chosen_width
from m2d.options import AUTO, add_compute_options, add_student_options, number, positive
from m2d.progress import say
from m2d.recipes import RECIPES, Conversion, settled
from m2d.refit.align import AlignSettings, align_student
from m2d.refit.fold import collect_folds, fold_record, require_foldable
from m2d.refit.fold_choice import MODES
from m2d.refit.halves import block_path
from m2d.refit.refit import (
    VARIANTS,
    WEIGHTINGS,
    refit_record,
    require_halves,
    write_refitted,
)
from m2d.refit.refit import refit as refit_student
from m2d.statistics.neurons import collect
from m2d.statistics.together import collect_statistics
from m2d.students.merge import write_student
from m2d.tokens.calibration import LENGTH, CalibrationSource
from m2d.tokens.encode import BOS
from m2d.tokens.tokenize import add_text_options

GRANULARITIES = ("experts", "neurons")
SEQUENCES = 512


def convert(
    teacher: str | Path,
    out: str | Path,
    *,
    recipe: str | None = None,
    scoring: str = SCORINGS.default,
    grouping: str = GROUPINGS.default,
    scaling: str | None = None,
    keep: int | None = None,
    groups: int | None = None,
    granularity: str | None = None,
    choice: str | None = None,
    width: int | None = None,
    params: int | None = None,
    multiple: int | None = None,
    fold: str | None = None,
    alpha: float | None = None,
    refit: str | None = None,
    weighting: str | None = None,
    align: int | None = None,
    text: Sequence[str | Path] | None = None,
    tokens: str | Path | None = None,
    dataset: str | None = None,
    sequences: int | None = None,
    length: int | None = None,
    column: str | None = None,
    bos: str = BOS[0],
    budget: str | None = None,
    dtype: str = AUTO,
    device: str | None = None,
    batch: int = 8,
    student_class: str = STUDENT_CLASSES[0],
    text_only: bool = False,
) -> Path:
    """Convert an MoE teacher into a dense student's folder, and return that folder.

    Args:
        teacher: A local folder or a hub id.
        out: The folder to write; must not exist, or be empty.
        recipe: "paper" (whole experts, no repair), or "best": greedy neurons, fold, sequential
            refit and alignment. What else is given takes the place of what the recipe says.
        scoring: Identifier or the paper's term.
        grouping: Likewise.
        scaling: Likewise.
        keep: K, experts kept in each layer; by default as many as there are groups, which copies
            them exactly.
        groups: The student's width in experts, the router's top-k by default; K experts are merged
            into so many.
        granularity: "experts", or "neurons" to keep single neurons of all experts instead.
        choice: Of single neurons: "contribution" or "greedy".
        width: Neurons of a layer (default: as many as the router's top-k experts have).
        params: The student's parameters at most, in place of `width`.
        multiple: What the FFN's width is a multiple of (default: 256, as llama.cpp's quantised
            types want it).
        fold: "fixed" (by `alpha`), "layer" or "neuron" to put the router into the experts' gates.
        alpha: Of fold="fixed" (default: 1).
        refit: "layer" or "sequential" to solve the down projections anew.
        weighting: Of the tokens of a refit: "equal" or "relative".
        align: Steps in which each layer's FFN is then trained on the teacher's residual stream
            (docs/beyond.md).
        text: Files with the calibration text; or give `tokens` or `dataset`.
        tokens: A token file.
        dataset: `NAME[@CONFIG][:SPLIT[:COLUMN]]`, through datasets.
        sequences: How many (default: 512; of a token file all).
        length: Tokens of each (default: 2048; of a token file its own).
        column: Of text and dataset, as in `m2d tokenize`.
        bos: Likewise.
        budget: "30min" of time or "2M" tokens, from which `sequences` and `align` follow; the
            recipe is then "best" unless another one is named.
        dtype: Of the computation; "auto" is the checkpoint's where the device is fast in it, else
            float32. The student is written in the checkpoint's.
        device: Such as "cuda:1" (default: a GPU where there is one).
        batch: Sequences at a time.
        student_class: "sibling" for a dense class wherever one is known, "same" for the teacher's
            own class with experts that every token takes.
        text_only: Of a teacher with other parts, such as a vision tower, the text model alone.

    Raises:
        UserError: On bad input, before anything is written.
    """
    started = time.monotonic()
    if sum(source is not None for source in (text, tokens, dataset)) != 1:
        raise UserError("give one of text, tokens, dataset as the calibration data")
    if tokens is not None and (column is not None or bos != BOS[0]):
        raise UserError("--column and --bos go with --text and --dataset")
    limit = parse_budget(budget) if budget else None
    if limit and (sequences is not None or align is not None):
        raise UserError("--budget chooses --sequences and --align; give one or the other")
    if limit:
        recipe = recipe or "best"
    given = {
        "granularity": granularity, "choice": choice, "scaling": scaling, "fold": fold,
        "alpha": alpha, "refit": refit, "weighting": weighting, "align": align,
    }  # fmt: skip
    how = settled(recipe, given)
    check_words(how, student_class)
    methods = {
        "scoring": SCORINGS.resolve(scoring),
        "grouping": GROUPINGS.resolve(grouping),
        "scaling": SCALINGS.resolve(how.scaling or SCALINGS.default),
    }
    require_absent(out)
    opened = open_teacher(teacher, student_class=student_class, text_only=text_only)
    check_size(opened, how.granularity, keep, groups, width, params, multiple)
    chosen_device = pick_device(device)
    computed_in = compute_dtype(dtype, opened.dtype, chosen_device)
    source = CalibrationSource(opened, text, tokens, dataset, length, column, bos)
    neurons = None
    if how.granularity == "neurons":
        neurons = chosen_width(opened, width, params, multiple)
    how = attainable(opened, how, given, source, computed_in, chosen_device)
    paced = None
    if limit:
        paced = pace(
            limit, how, opened, source.at_most(2 * batch),
            neurons or opened.top_k * opened.expert_width, out,
            batch=batch, dtype=computed_in, device=chosen_device, started=started,
        )  # fmt: skip
        input_ids = source.at_most(paced.chosen.sequences)
        how = replace(how, align=paced.chosen.steps)
        say(describe_choice(budget or "", paced, input_ids))
    else:
        input_ids = source.read(sequences or (SEQUENCES if tokens is None else None))
    if (how.refit or how.fold or how.align) and len(input_ids) < 2:
        raise UserError(
            "fold, refit and align need at least 2 sequences: some to fit, some to hold out"
        )

    what = identity(opened.folder, input_ids, batch, computed_in, fold=how.fold, alpha=how.alpha)
    stream, keep_pass = StreamedTeacher(opened, computed_in, chosen_device), keeper(out, what)
    folds = None
    if how.fold:
        folds = collect_folds(stream, input_ids, batch, how.fold, how.alpha, keep=keep_pass)
    if neurons:
        greedy = neurons if how.choice == "greedy" else None
        layers = collect(stream, input_ids, batch, greedy, folds=folds, keep=keep_pass)
        plan = neuron_plan(layers, neurons, how.choice)
    else:
        if how.scaling is None and any(f.folds_routed for f in (folds or {}).values()):
            methods["scaling"] = "least_squares"  # m / k is of experts under a router
        keep = keep or groups or opened.top_k
        plan = plan_of_experts(
            stream, input_ids, batch, keep, folds, keep_pass, **methods, groups=groups
        )
    record: dict[str, Any] = {"calibration": source.record(input_ids, computed_in)}
    if recipe:
        record["recipe"] = recipe
    if how.fold and folds is not None:
        record["fold"] = fold_record(how.fold, input_ids, folds)
    options: dict[str, Any] = {"dtype": computed_in, "device": chosen_device, "batch": batch}
    write_repaired(opened, plan, out, record, folds, input_ids, how, paced, what, options)
    remove_kept(out)
    return Path(out)


def write_repaired(
    teacher: Teacher, plan: Plan, out: str | Path, record: dict[str, Any], folds: Folds | None,
    input_ids: Tensor, how: Conversion, paced: Paced | None, what: dict[str, Any],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Write the student of a plan, refitted and aligned as `how` says, to the new folder `out`.

    paced: chooses the steps of alignment anew, by the time that is left. what: all that the
    teacher's passes depended on (m2d.models.resume.identity). options: dtype, device, batch.
    """
    if not how.refit and not how.align:
        write_student(teacher, plan, out, None, record, folds)
        return
    # What lies between is kept where the result will be, on the same disk.
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out) as folder:
        last = write_student(teacher, plan, Path(folder) / "merged", None, record, folds)
        if how.refit:
            of_student = {"plan": plan.digest(), "refit": how.refit, "weighting": how.weighting}
            found = refit_student(
                teacher, last, input_ids, how.refit, weighting=how.weighting, **options,
                keep=lambda found: Kept(out, found, {**what, **of_student}),
            )  # fmt: skip
            about = refit_record(how.refit, input_ids, found, options["dtype"], how.weighting)
            target = Path(folder) / "refitted" if how.align else out
            last = write_refitted(last, target, teacher.family, found, about)
        if how.align:
            settings = AlignSettings(paced.steps(input_ids.numel()) if paced else how.align)
            align_student(teacher, last, out, input_ids, settings, **options)


def check_words(how: Conversion, student_class: str) -> None:
    """Raises UserError where a word of the options is none that is known."""
    for kind, value, known in (
        ("refit", how.refit or VARIANTS[0], VARIANTS),
        ("weighting", how.weighting, WEIGHTINGS),
        ("fold", how.fold or MODES[0], MODES),
        ("granularity", how.granularity, GRANULARITIES),
        ("choice", how.choice, CHOICES),
        ("student class", student_class, STUDENT_CLASSES),
    ):
        if value not in known:
            raise UserError(f"unknown {kind} {value!r}; known: {', '.join(known)}")


def attainable(
    teacher: Teacher, how: Conversion, given: dict[str, Any], source: CalibrationSource,
    dtype: torch.dtype, device: torch.device,
) -> Conversion:  # fmt: skip
    """What of a recipe the teacher's family can have; told before any pass, and where it is less.

    Raises UserError where what it cannot have was `given`.
    """

    def require_refittable() -> None:
        block_path(teacher.family)
        require_halves(teacher, source.at_most(1), dtype, device)

    checks: dict[tuple[str, ...], Callable[[], None]] = {
        ("fold",): lambda: require_foldable(teacher),
        ("refit", "align"): require_refittable,
    }
    for names, check in checks.items():
        wanted = [name for name in names if getattr(how, name)]
        if not wanted:
            continue
        try:
            check()
        except UserError as error:
            parts = " and ".join(wanted)
            if any(given[name] is not None for name in wanted):
                raise UserError(f"{error}; leave out {parts}") from None
            say(f"{teacher.name}: without {parts}, since {error}")
            how = replace(how, **{name: getattr(Conversion(), name) for name in wanted})
    return how


def check_size(
    teacher: Teacher,
    granularity: str,
    keep: int | None,
    groups: int | None,
    width: int | None,
    params: int | None,
    multiple: int | None,
) -> None:
    """Raises UserError unless these options go together and fit the teacher."""
    if granularity == "neurons":
        for name, value in (("--keep", keep), ("--groups", groups)):
            if value is not None:
                raise UserError(f"{name} counts experts; with --granularity neurons give --width")
        chosen_width(teacher, width, params, multiple)
        return
    if width is not None or params is not None:
        raise UserError(
            "the width of a student of whole experts goes by --groups; --width and --params are "
            "for --granularity neurons"
        )
    least = groups or teacher.top_k
    check_keep(least if keep is None else keep, teacher.top_k, teacher.num_experts, groups)


def plan_of_experts(
    stream: StreamedTeacher,
    tokens: Tensor,
    batch: int,
    keep: int,
    folds: Folds | None = None,
    keep_pass: Keeper | None = None,
    *,
    scoring: str,
    grouping: str,
    scaling: str,
    groups: int | None = None,
) -> Plan:
    """The plan by these methods, from one pass of tokens [S, T]."""
    layers = collect_statistics(stream, tokens, batch, folds, keep_pass)
    rankings = [SCORINGS[scoring](layer) for layer in layers]
    return make_plan(layers, rankings, grouping, scaling, keep, scoring=scoring, groups=groups)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    add_student_options(parser)
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="paper: whole experts (default); best: greedy neurons, fold, refit and align. Options "
        "take the place of what it says",
    )
    for methods in (SCORINGS, GROUPINGS, SCALINGS):
        kind, default, known = methods.kind, methods.default, ", ".join(methods.names())
        own = None if kind == "scaling" else default
        parser.add_argument(f"--{kind}", default=own, help=f"{known} (default: {default})")
    parser.add_argument("--keep", type=positive, help="experts to keep, K (default: the groups)")
    add_groups_option(parser)
    parser.add_argument(
        "--granularity", choices=GRANULARITIES, help="what is kept (default: experts)"
    )
    parser.add_argument(
        "--choice", choices=CHOICES, help=f"of single neurons (default: {CHOICES.default})"
    )
    add_width_options(parser)
    parser.add_argument(
        "--fold",
        choices=MODES,
        help="put the router into the gates: by --alpha, or fitted for each layer or neuron",
    )
    parser.add_argument("--alpha", type=number, help="of --fold fixed (default: 1)")
    parser.add_argument(
        "--refit", choices=VARIANTS, help="solve the down projections anew in closed form"
    )
    parser.add_argument(
        "--weighting", choices=WEIGHTINGS, help="of a refit's tokens (default: equal)"
    )
    parser.add_argument(
        "--align",
        type=positive,
        metavar="STEPS",
        help="train every layer's FFN for so many steps on the teacher's residual stream",
    )
    source = add_text_options(parser)
    source.add_argument("--tokens", metavar="FILE", help="token file from m2d tokenize")
    parser.add_argument(
        "--sequences", type=positive, help=f"(default: {SEQUENCES}; of a token file, all)"
    )
    parser.add_argument(
        "--budget",
        metavar="TIME|TOKENS",
        help="such as 30min or 2M: choose --sequences and --align to fit (recipe: best)",
    )
    parser.add_argument(
        "--length", type=positive, help=f"tokens each (default: {LENGTH}; of a token file, its own)"
    )
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(args).items() if k not in ("command", "debug")}
    out = convert(**options)
    kind = auto_class(read_config(out)[1]).__name__
    say(f"{out}: done; load it with {kind}.from_pretrained({str(out)!r})")
