"""Widths of students made of single neurons: given, or what a number of parameters allows."""

import argparse
import math
import re
from typing import Any

from m2d.choose.neurons import check_width
from m2d.errors import UserError
from m2d.models.student import build_student_skeleton
from m2d.models.teacher import Teacher, count_parameters
from m2d.options import MOST, positive

# Of which the width of a student's FFN is a multiple, unless asked otherwise: llama.cpp quantises
# rows in blocks of 32 (Q8_0) or 256 (the K-quants), and matrix units want a multiple of 8.
MULTIPLE = 256
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def number_of_parameters(text: str) -> int:
    """2.5B, 700M, 90k or a plain number (an argparse type)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    value = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if not 1 <= value <= MOST**2:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number such as 2.5B or 700M")
    return round(value)


def parameters_of(teacher: Teacher, width: int) -> int:
    """Parameters of the student whose layers keep `width` neurons, shared experts not counted."""
    return count_parameters(build_student_skeleton(teacher, width)[1])


def appended_width(teacher: Teacher) -> int:
    """What the student's FFN has beside the neurons that are chosen: shared experts, if any."""
    return teacher.shared_width


def width_for(teacher: Teacher, parameters: int, multiple: int = MULTIPLE) -> int:
    """The largest width whose student has at most so many parameters.

    The student's FFN, shared experts counted, is a multiple of `multiple` wide.
    Raises UserError where there is none, or it exceeds the teacher's neurons.
    """
    largest = teacher.num_experts * teacher.expert_width
    most = parameters_of(teacher, largest)
    per_neuron = most - parameters_of(teacher, largest - 1)
    shared = appended_width(teacher)
    if parameters > most:
        raise UserError(
            f"--params {parameters:,}: too many; with all {largest:,} neurons of a layer a student "
            f"of {teacher.name} has {most:,}"
        )
    width = largest + (parameters - most) // per_neuron
    width = (width + shared) // multiple * multiple - shared
    # Layers that are dense in the teacher need their width in any case.
    if width < 1 or parameters_of(teacher, width) > parameters:
        least = parameters_of(teacher, min(multiple - shared % multiple, largest))
        raise UserError(
            f"--params {parameters:,}: too few; a student of {teacher.name} has at least {least:,}"
            + (f" at a multiple of {multiple}; see --multiple" if multiple > 1 else "")
        )
    return width


def chosen_width(
    teacher: Teacher,
    width: int | None,
    parameters: int | None,
    multiple: int | None = None,
) -> int:
    """The width of two options of which at most one is given; else that of the active path.

    multiple: of which the student's FFN has to be a multiple; None for MULTIPLE.
    """
    if width is not None and parameters is not None:
        raise UserError("give one of --width and --params")
    multiple = multiple or MULTIPLE
    if parameters is not None:
        return width_for(teacher, parameters, multiple)
    largest = teacher.num_experts * teacher.expert_width
    if width is None:
        return teacher.top_k * teacher.expert_width
    check_width(width, largest)
    shared = appended_width(teacher)
    if (width + shared) % multiple:
        below = (width + shared) // multiple * multiple - shared
        near = [w for w in (below, below + multiple) if 1 <= w <= largest]
        beside = f" with the shared experts' {shared}" if shared else ""
        raise UserError(
            f"--width {width}:{beside} not a multiple of {multiple}, as llama.cpp's quantised "
            f"types want it; give {' or '.join(map(str, near)) or 'another'}, or --multiple "
            f"{math.gcd(width + shared, multiple)}"
        )
    return width


def add_groups_option(parser: Any) -> None:
    """--groups, of a parser or group of argparse."""
    parser.add_argument(
        "--groups",
        type=positive,
        metavar="N",
        help="the student's width in experts: the kept ones are merged into N (the router's top-k)",
    )


def add_width_options(parser: argparse._ActionsContainer) -> None:
    """--width, --params and --multiple."""
    parser.add_argument("--width", type=positive, help="neurons of a layer (default: top-k * I)")
    parser.add_argument(
        "--params", type=number_of_parameters, help="the student's parameters at most, as in 2.5B"
    )
    parser.add_argument(
        "--multiple",
        type=positive,
        help=f"what the student's FFN width is a multiple of (default: {MULTIPLE})",
    )
