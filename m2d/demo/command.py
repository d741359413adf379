"""`m2d demo`: the demo corpus, its tasks, and the teacher that is trained on it."""

import argparse
from pathlib import Path

from m2d.options import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    corpus = parts.add_parser("corpus", help="write train, calibration and test .jsonl")
    corpus.add_argument("out", type=Path, help="the folder to write")
    tasks = parts.add_parser("tasks", help="write the demo's lm-eval tasks from its corpus")
    tasks.add_argument("corpus", type=Path, help="folder from m2d demo corpus")
    tasks.add_argument("out", type=Path, help="the folder to write")
    train = parts.add_parser("train", help="train a demo teacher again, on the CPU, for hours")
    train.add_argument("out", type=Path, help="the folder to write")
    train.add_argument("--steps", type=positive, help="(default: as the committed teacher)")
    train.add_argument("--dense", action="store_true", help="the dense teacher, for m2d prune")
    baselines = parts.add_parser("baselines", help="the teacher beside unigram and 5-gram models")
    baselines.add_argument("teacher", type=Path, help="folder of a demo teacher")


def main(args: argparse.Namespace) -> None:
    # Each part imports only what it needs: the corpus is made without torch.
    if args.part == "corpus":
        from m2d.demo.corpus import write_corpus

        write_corpus(args.out)
    elif args.part == "tasks":
        from m2d.demo.tasks import write_demo_tasks

        write_demo_tasks(args.corpus, args.out)
    elif args.part == "train":
        from m2d.demo.teacher import train_teacher

        steps = {"steps": args.steps} if args.steps else {}
        train_teacher(args.out, dense=args.dense, **steps)
    else:
        from m2d.demo.baselines import baselines_table, demo_baselines

        print(baselines_table(demo_baselines(args.teacher)))
