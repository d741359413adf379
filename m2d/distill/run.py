"""Distillation: train a student on its teacher's distributions over packed tokens.

By hand on one process (`m2d distill ...`), or on several with
`torchrun --nproc-per-node N -m m2d.cli distill ...`. A run that is stopped, killed or requeued
goes on from its last checkpoint when the same command is given again.
"""

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

from m2d.artifacts import make_own_folder, require_absent, write_json
from m2d.distill.loading import device_map
from m2d.distill.recipe import REPAIRED, Recipe, make_recipe, precision_on
from m2d.distill.settings import DistillSettings
from m2d.errors import UserError
from m2d.options import AUTO
from m2d.progress import say
from m2d.settings import NotNegative, add_option, number_of

# The options of each group of `m2d distill --help`; what is settable stands in DistillSettings.
GROUPS = {
    "steps": ("steps", "batch", "device_batch"),
    "optimizer (warmup-stable-decay)": (
        "optimizer",
        "learning_rate",
        "min_learning_rate",
        "warmup_steps",
        "decay_steps",
        "decay",
        "weight_decay",
        "max_grad_norm",
    ),
    "loss": (
        "loss",
        "loss_implementation",
        "temperature",
        "cross_entropy_weight",
        "hidden_loss_weight",
        "teacher_top_k",
    ),
    "compute": (
        "precision",
        "teacher_dtype",
        "strategy",
        "gradient_checkpointing",
        "compile",
        "seed",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", type=Path, help="the student's folder")
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--tokens", type=Path, required=True, help="token file from m2d tokenize")
    groups = {}
    for title, names in GROUPS.items():
        groups[title] = parser.add_argument_group(title)
        for name in names:
            add_option(groups[title], DistillSettings, name)
    groups["loss"].add_argument(
        "--teacher-logits",
        type=Path,
        metavar="FOLDER",
        help="from m2d teacher-logits, in place of running the teacher",
    )
    groups["loss"].add_argument(
        "--any-teacher",
        action="store_true",
        help="also one that the student was not made from, such as a newer one of the same shape",
    )
    groups["compute"].add_argument(
        "--teacher-device-map",
        type=device_map,
        metavar="MAP",
        help="spread the teacher: auto, or JSON of modules to devices (beside the student)",
    )
    groups["compute"].add_argument(
        "--device", help="(default: a GPU for each process if there is one)"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint-minutes",
        type=number_of(NotNegative),
        default=15.0,
        help="between checkpoints (15)",
    )
    run.add_argument(
        "--stop-after",
        type=number_of(NotNegative),
        metavar="MINUTES",
        help="then save a checkpoint and exit with code 75 (for a job's time limit)",
    )
    run.add_argument("--tensorboard", type=Path, help="folder for TensorBoard's event files")


def check_options(args: argparse.Namespace) -> None:
    """Raise a UserError where options do not go together, or name what cannot be written."""
    board = args.tensorboard
    if board is not None and not board.is_dir() and (board.exists() or board.is_symlink()):
        raise UserError(f"--tensorboard {board}: is no folder")
    if args.teacher_device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--teacher-device-map: each of several processes holds a teacher on its own device; "
            "start one process, or store the teacher's outputs first (m2d teacher-logits)"
        )
    if args.loss_implementation == "liger":
        from m2d.distill.liger import require_liger

        require_liger()
        if args.cross_entropy_weight or args.teacher_logits:
            raise UserError(
                "--loss-implementation liger: goes without --cross-entropy-weight and "
                "--teacher-logits"
            )


def check_states(student: Any, teacher: Any) -> None:
    """Raise a UserError unless both, by their configs, have as many layers of one hidden size."""
    (layers, size), (of_teacher, wide) = (
        (text.num_hidden_layers, text.hidden_size)
        for text in (config.get_text_config() for config in (student, teacher))
    )
    if (layers, size) != (of_teacher, wide):
        raise UserError(
            f"--hidden-loss-weight: the student has {layers} layers of hidden size {size} and the "
            f"teacher {of_teacher} of {wide}; it needs as many of the same size"
        )


def open_outputs(args: argparse.Namespace, vocabulary: int, of_teacher: int) -> Any:
    """The stored teacher outputs, or None where the teacher itself is run.

    vocabulary: the tokens that teacher and student have in common; `of_teacher`: all of its own.
    """
    from m2d.distill.logits import StoredLogits

    if args.teacher_logits is None:
        return None
    if args.loss != "forward_kl" or args.temperature != 1 or args.cross_entropy_weight:
        raise UserError("--teacher-logits: goes with --loss forward_kl at temperature 1 alone")
    if args.hidden_loss_weight:
        raise UserError("--teacher-logits: holds no hidden states; leave --hidden-loss-weight away")
    if args.teacher_top_k or args.teacher_dtype != AUTO:
        raise UserError(
            "--teacher-logits: the teacher's top-k and dtype were chosen in m2d teacher-logits; "
            "leave --teacher-top-k and --teacher-dtype away"
        )
    return StoredLogits(args.teacher_logits, args.tokens, vocabulary, of_teacher)


def main(args: argparse.Namespace) -> None:
    try:
        run(args)
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None  # the first process says it
        raise


def run(args: argparse.Namespace) -> None:
    """The whole stage, in every process."""
    end = float("inf") if args.stop_after is None else time.monotonic() + 60 * args.stop_after
    import torch

    from m2d.devices import compute_dtype, dtype_name
    from m2d.distill.loading import expand_routing
    from m2d.distill.processes import broadcast, start_processes
    from m2d.models.fingerprint import fingerprint, require_same_model, require_teacher
    from m2d.models.hub import name_of
    from m2d.models.load import check_model, load_model
    from m2d.models.teacher import dtype_of, locate, make_skeleton, quiet, read_config
    from m2d.students.record import read_record
    from m2d.tokens.dataset import PackedTokens
    from m2d.tokens.tokenizers import require_same_tokens

    require_absent(args.out)
    check_options(args)
    student_folder, teacher_folder = locate(args.student), locate(args.teacher)
    _, student_config = read_config(student_folder)
    _, teacher_config = read_config(teacher_folder)
    teacher_fingerprint = fingerprint(teacher_folder)
    if teacher_fingerprint is not None:
        check_model(teacher_folder, teacher_config)
    check_model(student_folder, student_config)
    if not args.any_teacher:
        skeleton = make_skeleton(teacher_config, teacher_folder)
        require_same_model(student_folder, teacher_folder, skeleton, args.teacher)
    vocabularies = [c.get_text_config().vocab_size for c in (student_config, teacher_config)]
    vocabulary = min(vocabularies)  # both are padded, and not always alike
    same = require_same_tokens(student_folder, teacher_folder)
    if vocabularies[0] != vocabularies[1] and not same:
        raise UserError(
            f"{args.student}: its vocabulary has {vocabularies[0]} tokens and the teacher's "
            f"{vocabularies[1]}, and not both folders hold a tokenizer that shows they are the same"
        )
    if args.hidden_loss_weight:
        check_states(student_config, teacher_config)
    if args.teacher_top_k:
        expand_routing(teacher_config, args.teacher_top_k, teacher_folder)
    tokens = PackedTokens(args.tokens, args.seed)
    stored = open_outputs(args, vocabulary, vocabularies[1])
    if stored is not None:
        recorded = [(str(args.teacher_logits), stored.index.get("teacher_fingerprint"))]
        require_teacher(recorded, teacher_fingerprint, str(args.teacher))
    strategy, device = start_processes(args.strategy, args.device)
    # Loading changes the dtypes of the configs.
    own_dtype = dtype_of(student_config, student_folder)
    stored_in = dtype_of(teacher_config, teacher_folder)
    computed_in = broadcast(
        lambda: compute_dtype(args.teacher_dtype, stored_in, device) if stored is None else None
    )
    precision = broadcast(lambda: precision_on(args.precision, device))
    teacher_dtype = dtype_name(computed_in) if computed_in else AUTO
    made_by = read_record(student_folder / "m2d.json", absent=True)  # before the work, not after
    repairs = [name for name in REPAIRED if getattr(made_by, name) is not None]
    recipe = make_recipe(args, strategy, tokens.sequences, precision, teacher_dtype, repairs)
    tokens.items = recipe.steps * recipe.batch
    first = os.environ.get("RANK", "0") == "0"
    if first:
        tokens.check_vocabulary(vocabulary)

    from m2d.distill import result, watch
    from m2d.distill.checkpoints import checkpoints_in, newest_sound
    from m2d.distill.heads import check_head
    from m2d.distill.trainer import make_trainer
    from m2d.students.files import check_others

    if first:
        check_others(student_folder)
    identity = broadcast(
        lambda: result.identity(recipe, student_folder, teacher_folder, args.tokens)
    )
    if stored is not None:
        identity["teacher_logits"] = stored.index
    work = result.work_folder(args.out, identity)
    sample = tokens[0]["input_ids"][None, :16]
    teacher: Any = stored
    if stored is None:
        where = args.teacher_device_map or device
        teacher = load_model(teacher_folder, teacher_config, computed_in, where, narrow=True)
        check_head(teacher, sample, args.teacher)
    student = load_model(student_folder, student_config, torch.float32, device)
    check_head(student, sample, str(args.student))

    newest = broadcast(lambda: newest_sound(work))
    if first:
        make_own_folder(work)
        write_json(work / "run.json", identity)
        announce(args, recipe, tokens.length, work, newest, result.other_work(args.out, work))
    with watch.StopRequest() as stop, quiet():
        watcher = watch.Watch(
            work / "metrics.jsonl",
            args.tensorboard,
            args.checkpoint_minutes,
            recipe.batch * tokens.length,
            stop,
            end,
        )
        training = make_trainer(student, teacher, tokens, recipe, work, [watcher], vocabulary)
        try:
            training.train(resume_from_checkpoint=str(newest) if newest else None)
        except BaseException:
            if first and not checkpoints_in(work):
                shutil.rmtree(work, ignore_errors=True)  # nothing to go on from
            raise
        if watcher.stopped:
            if first:
                say(
                    f"distill: stopped at step {training.state.global_step} of {recipe.steps}, "
                    "with a checkpoint; the same command goes on from there"
                )
            raise SystemExit(watch.EXIT_STOPPED)
        weights = training.trained_weights()
    if first:
        record = result.record_of(
            student_folder,
            name_of(args.teacher),
            teacher_folder,
            teacher_config,
            recipe,
            identity,
            args.tokens,
        )
        metrics = work / "metrics.jsonl"
        with quiet():
            result.save_result(
                args.out, student_folder, student.config, weights, own_dtype, metrics, record
            )
        for folder in [work, *result.other_work(args.out, work)]:
            shutil.rmtree(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def announce(
    args: argparse.Namespace,
    recipe: Recipe,
    length: int,
    work: Path,
    newest: Path | None,
    others: list[Path],
) -> None:
    """Say what will be done, and whether it begins or goes on."""
    say(
        f"distill: {recipe.steps} steps of {recipe.batch} x {length} tokens "
        f"({recipe.strategy}, {recipe.processes} process{'es' * (recipe.processes > 1)}, "
        f"accumulation {recipe.accumulation}, {recipe.precision}"
        f"{'' if args.teacher_logits else f', teacher in {recipe.teacher_dtype}'})"
    )
    if newest:
        say(f"distill: going on from {newest.name} in {work}")
    elif others:
        say(
            f"distill: beginning anew; {others[0]} is of a run with other arguments, and goes "
            "when this one is complete"
        )
