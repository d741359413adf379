"""Fetching a model from the hub, for machines that are to use it without a network."""

import argparse

from m2d.models.hub import locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="hub id, owner/name or owner/name@revision")


def main(args: argparse.Namespace) -> None:
    print(locate(args.model))
