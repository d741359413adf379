"""Ranking: the experts of every layer, ordered by one scoring method."""

import argparse
from pathlib import Path

from m2d.artifacts import write_json
from m2d.choose.ranking import rankings_to_dict
from m2d.choose.scoring import SCORINGS
from m2d.progress import say
from m2d.statistics.files import read_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the file to write, .json")
    parser.add_argument("--statistics", required=True, help="file from m2d stats")
    parser.add_argument("--gram", required=True, help="file from m2d gram")
    parser.add_argument("--scoring", required=True, help=f"one of {', '.join(SCORINGS.names())}")


def main(args: argparse.Namespace) -> None:
    scoring = SCORINGS.resolve(args.scoring)
    layers = read_layers(args.statistics, args.gram)
    rankings = [SCORINGS[scoring](layer) for layer in layers]
    write_json(args.out, rankings_to_dict(scoring, layers, rankings))
    say(f"{args.out}: {scoring}, {len(layers)} layers of {layers[0].num_experts} experts")
