"""Ranking: the experts of every layer, ordered by one scoring method."""

import argparse
from inspect import signature
from pathlib import Path
from typing import get_args

from m2d.artifacts import write_json
from m2d.choose.ranking import rankings_to_dict
from m2d.choose.scoring import SCORINGS, NormOver
from m2d.errors import UserError
from m2d.progress import say
from m2d.statistics.files import read_layers, teacher_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the file to write, .json")
    parser.add_argument("--statistics", required=True, help="file from m2d stats")
    parser.add_argument("--gram", required=True, help="file from m2d gram")
    parser.add_argument("--scoring", required=True, help=f"one of {', '.join(SCORINGS.names())}")
    parser.add_argument(
        "--norm-over",
        choices=get_args(NormOver),
        help="of ACP and DO-ACP, the size of an expert's output: root mean square over all tokens "
        "(default) or those that selected it, or its mean norm over all tokens",
    )


def main(args: argparse.Namespace) -> None:
    scoring = SCORINGS.resolve(args.scoring)
    layers = read_layers(args.statistics, args.gram)
    options = {"norm_over": args.norm_over} if args.norm_over else {}
    if options and "norm_over" not in signature(SCORINGS[scoring]).parameters:
        raise UserError(f"--norm-over: {scoring} has no such choice; it goes with ACP and DO-ACP")
    rankings = [SCORINGS[scoring](layer, **options) for layer in layers]
    write_json(args.out, rankings_to_dict(scoring, layers, rankings, teacher_of(args.statistics)))
    say(f"{args.out}: {scoring}, {len(layers)} layers of {layers[0].num_experts} experts")
