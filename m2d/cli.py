"""The command line: `m2d COMMAND ...`.

Each command is a module with `add_arguments(parser)` and `main(args)`. Only the chosen one is
imported, so that `m2d --help` starts at once and no command pays for another's libraries.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from typing import Any, NoReturn

from m2d import __version__
from m2d.claims import claimed, describe_failure
from m2d.errors import UserError, first_line, shortened
from m2d.gpus import take_gpu
from m2d.renamed import with_new_names
from m2d.streams import nobody_reads, prepare_streams, silence

COMMANDS = {
    "convert": ("m2d.conversion", "turn a teacher into a dense student, in one call"),
    "inspect": ("m2d.inspect", "facts and sizes of a teacher and its students, from its config"),
    "estimate": (
        "m2d.pipeline.estimate",
        "what a target of the workflow will take, before it runs",
    ),
    "doctor": ("m2d.doctor", "what m2d will use on this machine, and what a target would lack"),
    "download": ("m2d.models.download", "fetch a model from the hub into its cache"),
    "init": ("m2d.pipeline.init", "write a config of the workflow for a teacher of your own"),
    "workflow": ("m2d.pipeline.place", "where the workflow's Snakefile is"),
    "tokenize": ("m2d.tokens.tokenize", "make a token file from text"),
    "stats": ("m2d.statistics.routing", "routing statistics of every layer and expert"),
    "gram": ("m2d.statistics.gram", "Gram statistics of every layer's experts"),
    "combine": ("m2d.statistics.shards", "add up statistics that several jobs took shares of"),
    "rank": ("m2d.statistics.rank", "order the experts of every layer by one scoring method"),
    "grid": ("m2d.students.grid", "perplexity of every configuration of one scoring method"),
    "neurons": ("m2d.statistics.neurons", "what every single neuron contributes"),
    "fold": ("m2d.refit.fold", "put the router's weights into the experts' gate rows"),
    "fold-report": ("m2d.refit.fold_report", "what folding would do to a teacher, layer by layer"),
    "merge": ("m2d.students.merge", "write one student"),
    "prune": ("m2d.baselines.prune", "prune a dense teacher, for the dense-to-dense baseline"),
    "baseline": ("m2d.baselines.random", "a student with new weights in its FFNs, or everywhere"),
    "refit": ("m2d.refit.refit", "solve a student's down projections in closed form"),
    "align": ("m2d.refit.align", "train a student's FFNs, layer by layer, on the teacher's stream"),
    "perplexity": ("m2d.evaluate.perplexity", "perplexity of a teacher or student"),
    "export": ("m2d.export.command", "write a student as a GGUF file, for llama.cpp"),
    "distill": ("m2d.distill.run", "train a student on its teacher's outputs"),
    "teacher-logits": (
        "m2d.distill.teacher_logits",
        "store a teacher's logits for many distillations",
    ),
    "evaluate": ("m2d.evaluate.lm_eval", "score a model on one lm-eval task"),
    "verify": ("m2d.verify", "whether artifacts are what was written, and of one teacher"),
    "card": ("m2d.report.cards", "renew a student's model card with its scores"),
    "tables": ("m2d.report.tables", "gather results into tables"),
    "figures": ("m2d.report.figures", "draw the figures of the tables"),
    "demo": ("m2d.demo.command", "the demo corpus and teacher"),
    "forkserver": ("m2d.forkserver", "run a workflow whose commands share one start-up"),
}


# Packages that m2d alone does not bring -> the extra that does (pyproject.toml).
EXTRAS = {
    **dict.fromkeys(("matplotlib", "snakemake", "tabulate"), "workflow"),
    **dict.fromkeys(("datasets", "deepspeed", "tensorboard"), "distill"),
    "lm_eval": "eval",
    "vllm": "vllm",
    "liger_kernel": "liger",
}


class Parser(argparse.ArgumentParser):
    """Its errors are of bounded length, whatever was given."""

    def error(self, message: str) -> NoReturn:
        super().error(shortened(message))


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser with every command named, and the arguments of `command` alone."""
    parser = Parser(
        prog="m2d", description="Turn a Mixture-of-Experts language model into a dense one."
    )
    parser.add_argument("--version", action="version", version=f"m2d {__version__}")
    debug: dict[str, Any] = {"action": "store_true", "help": "show tracebacks of user errors"}
    parser.add_argument("--debug", **debug)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("--debug", **debug, default=argparse.SUPPRESS)
        if name == command:
            importlib.import_module(module).add_arguments(sub)
    return parser


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """One line for a package that an extra brings; None for any other."""
    name = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(name)
    if extra is None:
        return None
    return f"needs {name}, which is not installed; pip install 'm2d[{extra}]'"


def not_loaded(error: ImportError | MemoryError) -> str | None:
    """One line for why a command's libraries cannot be loaded; None where that is our fault."""
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error)
    named = f" ({first_line(error)})" if isinstance(error, ImportError) else ""
    return f"its libraries cannot be loaded{named}; is there too little memory for them?"


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 2 bad input; 129, 130, 141 and 143 as after a signal."""
    if arguments is None and "M2D_FORKSERVER" in os.environ:
        from m2d.forkserver import run_there

        code = run_there(sys.argv[1:])
        if code is not None:
            return code
    prepare_streams()
    # A terminated run unwinds like an interrupted one, so that no temporary file remains.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    try:
        try:
            return run(with_new_names(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of the streams themselves; `run` catches all others
        if nobody_reads():
            silence()
            return 141
        with contextlib.suppress(OSError):
            print(f"m2d: error: standard output: {error.strerror}", file=sys.stderr)
        silence()
        return 2


def run(arguments: list[str]) -> int:
    """Run the command of these words."""
    command = next((word for word in arguments if not word.startswith("-")), None)
    odd = next((word for word in arguments if not is_text(word)), None)
    if odd is not None:
        print(f"m2d: error: {shortened(ascii(odd))} is not UTF-8; rename it", file=sys.stderr)
        return 2
    try:
        args = build_parser(command).parse_args(arguments)
    except (ImportError, MemoryError) as error:
        reason = not_loaded(error)
        if reason is None or "--debug" in arguments:
            raise
        print(f"m2d {command}: error: {reason}", file=sys.stderr)
        return 2
    try:
        with claimed(args):
            take_gpu(args.command)
            importlib.import_module(COMMANDS[args.command][0]).main(args)
    except UserError as error:
        return failed(args, str(error))
    except ModuleNotFoundError as error:
        reason = missing_extra(error)
        if reason is None:
            raise
        return failed(args, reason)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            raise
        reason = describe_failure(error, getattr(args, "out", None))
        if reason is None:
            raise
        return failed(args, reason)
    return 0


def is_text(word: str) -> bool:
    """Whether an argument is UTF-8. Libraries written in other languages open no other names."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def failed(args: argparse.Namespace, reason: str) -> int:
    """Say in one line, of bounded length, why a command ends; the exit code."""
    if args.debug:
        raise
    print(f"m2d {args.command}: error: {shortened(reason)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
