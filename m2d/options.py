"""Command-line options that several commands share."""

import argparse
import math

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
# Ways to spread a model over several devices, as accelerate names them.
SPREADS = ("auto", "balanced", "sequential")


# Beyond it a whole number is a slip; products of two still fit in 64 bits after a check.
MOST = 10**12
LARGEST_SEED = 2**32 - 1  # numpy's
COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9}


STUDENT_CLASSES = ("sibling", "same")


def add_student_options(parser: argparse._ActionsContainer) -> None:
    """--student-class and --text-only, for the commands that make students."""
    parser.add_argument(
        "--student-class",
        choices=STUDENT_CLASSES,
        default=STUDENT_CLASSES[0],
        help="a dense class wherever one is known, or the teacher's own class with experts that "
        "every token takes (%(default)s)",
    )
    parser.add_argument(
        "--text-only",
        action="store_true",
        help="of a teacher with a vision tower or the like, make the text model alone",
    )


def positive(text: str) -> int:
    """A whole number of at least 1 (an argparse type)."""
    value = _whole(text)
    if value is None or not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to {MOST:g}")
    return value


def seed(text: str) -> int:
    """A whole number from 0 on, for a generator of random numbers (an argparse type)."""
    value = _whole(text)
    if value is None or not 0 <= value <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a whole number from 0 to {LARGEST_SEED}"
        )
    return value


def token_count(text: str) -> int:
    """A number of tokens: 500k, 300M, 4B or a plain one (an argparse type)."""
    scale = COUNTS.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 1 <= value <= MOST**2:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no number of tokens, such as 300M or 4B"
        )
    return int(value)


def number(text: str) -> float:
    """A finite number (an argparse type)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0 (an argparse type)."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not above 0")
    return value


def share(text: str) -> float:
    """A number above 0, and at most 1 (an argparse type)."""
    value = above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is above 1")
    return value


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """--dtype, --device and --batch, for the commands that run a model."""
    parser.add_argument(
        "--dtype",
        choices=(AUTO, *DTYPES),
        default=AUTO,
        help="compute in this dtype (auto: the checkpoint's where the device is fast in it, else "
        "float32)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--batch", type=positive, default=8, help="sequences a step (default: 8)")
