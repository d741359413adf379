"""Merging: a teacher and a plan to a student's folder, tensor by tensor.

No model is instantiated: the plan names the tensors to read, and the student's stock class (on the
meta device) those to write.
"""

import argparse
import json
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from m2d.artifacts import atomic_path, read_json, require_absent, sha256_of
from m2d.choose.grouping import GROUPINGS
from m2d.choose.neuron_statistics import CHOICES, neuron_plan
from m2d.choose.plan import Plan, check_keep, make_plan, plan_from_dict
from m2d.choose.ranking import rankings_from_dict
from m2d.choose.scaling import SCALINGS
from m2d.devices import dtype_name, pick_dtype
from m2d.errors import UserError
from m2d.models.checkpoint import Checkpoint, Content, Spec, write_checkpoint
from m2d.models.entries import AnyEntry, Entry, read_entry
from m2d.models.fingerprint import marks_of, require_teacher
from m2d.models.folded import Folds, folds_of, with_shared_scales
from m2d.models.hub import licence_of, revision_of
from m2d.models.student import build_student_skeleton
from m2d.models.teacher import Teacher, count_parameters, open_teacher
from m2d.models.widths import add_groups_option, add_width_options, chosen_width
from m2d.options import DTYPES, add_student_options, positive
from m2d.progress import progress, say
from m2d.statistics.files import read_layers, teacher_of
from m2d.statistics.neurons import read_neurons
from m2d.students.carried import carried_tensors, dropped_tensors
from m2d.students.files import WRITTEN_ANEW, copy_others, write_record
from m2d.students.record import StudentRecord
from m2d.students.same_trunk import check_trunk
from m2d.students.spelling import both_spellings
from m2d.students.tensors import StudentTensors


def plan_width(teacher: Teacher, plan: Plan) -> int:
    """The widest layer of the plan, in intermediate neurons."""
    return max(layer.width(teacher.expert_width) for layer in plan.layers)


def write_student(
    teacher: Teacher,
    plan: Plan,
    out: str | Path,
    dtype: torch.dtype | None = None,
    provenance: dict[str, Any] | None = None,
    folds: Folds | None = None,
) -> Path:
    """Write the student's folder: weights, config, tokenizer, plan.json, m2d.json, model card.

    dtype: of the written tensors; None keeps what is on disk. `provenance` is added to m2d.json.
    Raises UserError where `out` exists, or the teacher's files lack what the plan needs.
    """
    require_absent(out)
    plan = with_shared_scales(plan, folds or {})
    raw, skeleton = build_student_skeleton(teacher, plan_width(teacher, plan))
    if dtype is not None:
        raw = {k: v for k, v in raw.items() if k != "torch_dtype"}
        raw["dtype"] = dtype_name(dtype)
    check_trunk(teacher, raw)
    checkpoint = Checkpoint(teacher.folder)
    tensors = StudentTensors(
        teacher.family,
        checkpoint,
        skeleton,
        dtype,
        hub_names=True,
        folds=folds,
    )
    specs = tensors.specs(plan)
    carried = carried_tensors(teacher, checkpoint)
    specs |= {name: (entry.dtype, entry.shape) for name, entry in carried.items()}
    stored_as = raw.get("dtype", raw.get("torch_dtype"))
    parts = parts_record(teacher, carried, dropped_tensors(teacher, checkpoint))
    record = describe(teacher, plan, skeleton, stored_as).having(**parts, **(provenance or {}))

    def content(name: str) -> Content:
        if entry := carried.get(name):
            return [entry] if isinstance(entry, Entry) else read_entry(entry, name)
        return tensors.copied(name, plan) or tensors.make(name, plan)

    return write_folder(
        out,
        teacher.folder,
        raw,
        specs,
        content,
        record,
        {"plan.json": {**plan.to_dict(), "teacher_fingerprint": teacher.fingerprint}},
        carried=carried,
    )


def write_folder(
    out: str | Path,
    source: Path,
    config: dict[str, Any],
    specs: dict[str, Spec],
    make: Callable[[str], Content],
    record: StudentRecord,
    others: dict[str, dict[str, Any]],
    carried: Collection[str] = (),
) -> Path:
    """Write a student's folder, whole or not at all: `make(name)` for every tensor of `specs`.

    The tokenizer and the like are those of the folder `source`, with processors of images and sound
    where parts other than text are carried over; `record` becomes m2d.json and the model card;
    `others` are further JSON files.
    """
    with atomic_path(out) as folder:
        folder.mkdir()
        bar: Iterator[str] = iter(progress(list(specs), "writing, tensors"))

        def tensor(name: str) -> Content:
            next(bar)
            return make(name)

        write_checkpoint(folder, specs, tensor, unbounded=carried)
        next(bar, None)
        copy_others(source, folder, (*WRITTEN_ANEW, "plan.json"), processors=bool(carried))
        config = both_spellings(config)
        for name, value in {"config.json": config, **others}.items():
            write_into(folder, name, value)
        write_record(folder, record)
    return Path(out)


def write_into(folder: Path, name: str, value: dict[str, Any]) -> None:
    """A JSON file in a folder that is itself still temporary; infinities as transformers writes."""
    text = json.dumps(_encoded(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def _encoded(value: Any) -> Any:
    """A value in proper JSON, which has no infinities: m2d.models.teacher.read_config's inverse."""
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return [_encoded(item) for item in value] if isinstance(value, list | tuple) else value


def describe(
    teacher: Teacher, plan: Plan, skeleton: torch.nn.Module, dtype: str | None
) -> StudentRecord:
    """What m2d.json says: the teacher, the student and the plan in short."""
    short = {
        "scoring": plan.scoring,
        "grouping": plan.grouping,
        "scaling": plan.scaling,
        "keep": plan.keep,
        "groups": len(plan.layers[0].groups),
        "num_experts": teacher.num_experts,
        "moe_layers": len(plan.layers),
        "digest": plan.digest(),
    }
    return about_models(teacher, skeleton).having(plan=short, dtype=dtype)


def parts_record(
    teacher: Teacher, carried: dict[str, AnyEntry], dropped: list[str]
) -> dict[str, Any]:
    """What m2d.json says of parts besides the text model, and of what is approximated."""
    about: dict[str, Any] = {}
    if carried:
        about["carried"] = sorted({".".join(name.split(".")[:2]) for name in carried})
    if dropped:
        about["dropped"] = dropped
    for key in ("approximated", "left_out"):
        if value := getattr(teacher.family, key):
            about[key] = value
    return about


def about_models(teacher: Teacher, skeleton: torch.nn.Module) -> StudentRecord:
    """What every student's m2d.json says of the teacher and of the student."""
    about = {
        "name": teacher.name,
        "model_type": teacher.config.model_type,
        "revision": revision_of(teacher.folder),
        **licence_of(teacher.folder),
        "config_sha256": sha256_of(teacher.folder / "config.json"),
        **marks_of(teacher.folder, teacher.skeleton),
    }
    architecture = teacher.family.student_architecture
    return StudentRecord().having(
        teacher={key: value for key, value in about.items() if value is not None},
        student={"architecture": architecture, "parameters": count_parameters(skeleton)},
    )


def plan_from_files(
    statistics: str,
    gram: str,
    ranking: str,
    grouping: str,
    scaling: str,
    keep: int,
    groups: int | None = None,
) -> Plan:
    """The plan that the statistics, a ranking and the choices determine; see `make_plan`."""
    layers = read_layers(statistics, gram)
    try:
        scoring, rankings = rankings_from_dict(read_json(ranking), layers)
    except UserError as error:
        raise UserError(f"{ranking}: {error}") from None
    return make_plan(layers, rankings, grouping, scaling, keep, scoring=scoring, groups=groups)


def require_statistics(statistics: str, ranking: str, teacher: Teacher) -> None:
    """Raise a UserError unless statistics and ranking are of this teacher's weights."""
    found = read_json(ranking).get("teacher_fingerprint")
    recorded = [(statistics, teacher_of(statistics)), (ranking, found)]
    require_teacher(recorded, teacher.fingerprint, teacher.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the folder to write")
    add_student_options(parser)
    experts = parser.add_argument_group("a student of whole experts (the first six)")
    experts.add_argument("--statistics", help="file from m2d stats")
    experts.add_argument("--gram", help="file from m2d gram")
    experts.add_argument("--ranking", help="file from m2d rank")
    experts.add_argument("--grouping", help=f"one of {', '.join(GROUPINGS.names())}")
    experts.add_argument("--scaling", help=f"one of {', '.join(SCALINGS.names())}")
    experts.add_argument("--keep", type=positive, help="experts to keep in each layer, K")
    add_groups_option(experts)
    neurons = parser.add_argument_group("a student of single neurons")
    neurons.add_argument("--neurons", help="file from m2d neurons")
    neurons.add_argument("--choice", choices=CHOICES, help="(default: contribution)")
    add_width_options(neurons)
    again = parser.add_argument_group("a student made before")
    again.add_argument("--plan", help="its plan.json")
    parser.add_argument("--fold", help="file from m2d fold: the experts are folded so")
    parser.add_argument("--dtype", choices=DTYPES, help="of the student (default: as on disk)")


# The option that says which kind of student -> those that it needs, and those that may go with it.
OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plan": ((), ()),
    "neurons": ((), ("choice", "width", "params", "multiple")),
    "ranking": (("statistics", "gram", "grouping", "scaling", "keep"), ("groups",)),
}


def check_options(args: argparse.Namespace) -> str:
    """The kind of student, a key of OPTIONS. Raises UserError where options do not go together."""
    given = {name for name in vars(args) if getattr(args, name) is not None}
    kind = next((kind for kind in OPTIONS if kind in given), "ranking")
    needed, _ = OPTIONS[kind]
    if missing := [f"--{name}" for name in (kind, *needed) if name not in given]:
        raise UserError(f"missing {', '.join(missing)}; or give --neurons or --plan")
    for other, (needs, may) in OPTIONS.items():
        for name in (other, *needs, *may):
            if other != kind and name in given:
                raise UserError(f"--{name}: does not go with --{kind}; give one or the other")
    return kind


def plan_of(args: argparse.Namespace, teacher: Teacher) -> tuple[Plan, dict[str, str]]:
    """The plan that the options ask for, and the digests of the files that it comes from."""
    kind = check_options(args)
    if kind == "plan":
        content = read_json(args.plan)
        found = content.get("teacher_fingerprint")
        require_teacher([(args.plan, found)], teacher.fingerprint, teacher.name)
        plan = plan_from_dict(
            content,
            num_experts=teacher.num_experts,
            expert_width=teacher.expert_width,
            layers=teacher.moe_layers,
        )
        return plan, {"plan": sha256_of(args.plan)}
    if kind == "neurons":
        width = chosen_width(teacher, args.width, args.params, args.multiple)
        layers, about = read_neurons(args.neurons)
        found = about.get("teacher_fingerprint")
        require_teacher([(args.neurons, found)], teacher.fingerprint, teacher.name)
        if about.get("fold_sha256") != (sha256_of(args.fold) if args.fold else None):
            raise UserError(
                f"{args.neurons}: --fold must be the file that these neurons were chosen with, and "
                "absent where they were chosen without one"
            )
        shape = (teacher.num_experts, teacher.expert_width)
        found = [layer.layer for layer in layers]
        if found != teacher.moe_layers or layers[0].down_square_norm.shape != shape:
            raise UserError(f"{args.neurons}: not made from this teacher; run m2d neurons again")
        plan = neuron_plan(layers, width, args.choice or CHOICES.default)
        return plan, {"neurons": sha256_of(args.neurons)}
    check_keep(args.keep, teacher.top_k, teacher.num_experts, args.groups)
    require_statistics(args.statistics, args.ranking, teacher)
    files = {name: getattr(args, name) for name in ("statistics", "gram", "ranking")}
    methods = {
        methods.kind: methods.resolve(getattr(args, methods.kind))
        for methods in (GROUPINGS, SCALINGS)
    }
    plan = plan_from_files(**files, **methods, keep=args.keep, groups=args.groups)
    return plan, {name: sha256_of(file) for name, file in files.items()}


def main(args: argparse.Namespace) -> None:
    require_absent(args.out)
    teacher = open_teacher(args.teacher, student_class=args.student_class, text_only=args.text_only)
    plan, upstream = plan_of(args, teacher)
    dtype = pick_dtype(args.dtype, teacher.dtype) if args.dtype else None
    record: dict[str, Any] = {"upstream_sha256": upstream}
    folds = None
    if args.fold:
        folds, record["fold"] = folds_of(teacher, args.fold)
        upstream["fold"] = sha256_of(args.fold)
    write_student(teacher, plan, args.out, dtype, record, folds)
    say(f"{args.out}: {teacher.family.student_architecture}, plan {plan.digest()}")
