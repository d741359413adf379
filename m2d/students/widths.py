"""Widths of students made of single neurons: given, or what a number of parameters allows."""

import argparse
import re

from m2d.choose.neurons import check_width
from m2d.errors import UserError
from m2d.models.teacher import Teacher, count_parameters
from m2d.options import positive
from m2d.students.tensors import build_student_skeleton

MULTIPLE = 8  # widths that follow from --params; matrix units want it so
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def number_of_parameters(text: str) -> int:
    """2.5B, 700M, 90k or a plain number (an argparse type)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    value = round(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 2.5B or 700M")
    return value


def parameters_of(teacher: Teacher, width: int) -> int:
    """Parameters of the student whose layers keep `width` neurons, shared experts not counted."""
    return count_parameters(build_student_skeleton(teacher, width)[1])


def width_for(teacher: Teacher, parameters: int, multiple: int = MULTIPLE) -> int:
    """The largest width, a multiple of `multiple`, whose student has at most so many parameters.

    Raises UserError where there is none, or it exceeds the teacher's neurons.
    """
    largest = teacher.num_experts * teacher.expert_width
    most = parameters_of(teacher, largest)
    per_neuron = most - parameters_of(teacher, largest - 1)
    width = (largest - max(0, -(-(most - parameters) // per_neuron))) // multiple * multiple
    least = parameters_of(teacher, multiple)
    # Layers that are dense in the teacher need their width in any case.
    if width < multiple or parameters_of(teacher, width) > parameters:
        raise UserError(
            f"--params {parameters:,}: too few; a student of {teacher.name} has at least {least:,}"
        )
    if parameters > most:
        raise UserError(
            f"--params {parameters:,}: too many; with all {largest:,} neurons of a layer a student "
            f"of {teacher.name} has {most:,}"
        )
    return width


def chosen_width(teacher: Teacher, width: int | None, parameters: int | None) -> int:
    """The width of two options of which at most one is given; else that of the active path."""
    if width is not None and parameters is not None:
        raise UserError("give one of --width and --params")
    if parameters is not None:
        return width_for(teacher, parameters)
    chosen = teacher.top_k * teacher.expert_width if width is None else width
    check_width(chosen, teacher.num_experts * teacher.expert_width)
    return chosen


def add_width_options(parser: argparse._ActionsContainer) -> None:
    """--width and --params."""
    parser.add_argument("--width", type=positive, help="neurons of a layer (default: top-k * I)")
    parser.add_argument(
        "--params", type=number_of_parameters, help="the student's parameters at most, as in 2.5B"
    )
