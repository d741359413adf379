"""Command-line options that several commands share."""

import argparse

DTYPES = ("float32", "bfloat16", "float16")
# Ways to spread a model over several devices, as accelerate names them.
SPREADS = ("auto", "balanced", "sequential")


def positive(text: str) -> int:
    """A whole number of at least 1 (an argparse type)."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """--dtype, --device and --batch, for the commands that run a model."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="compute in this dtype (default: the checkpoint's)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--batch", type=positive, default=8, help="sequences a step (default: 8)")
