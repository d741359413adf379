"""Bad arguments for every command: each option and position gets values that it should refuse.

Good are an error in one short line with exit code 2, and exit code 0 with whole, finite outputs.
Everything else is a fault, and so is an input that another content has afterwards.

`python -m tests.arguments [COMMAND ...] [-EVERY]`, or `make arguments`, prints the classes and each
fault's command. `-7` tries every seventh case.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from m2d import cli
from tests.fuzz import FAULTS, outcome_of
from tests.fuzz_inputs import TABLES, make_sound
from tests.kills import STAGES, content_of

TOKENS = ("--tokens", "tokens")
# Each command with arguments that it takes, positions first.
SOUND: dict[str, tuple[str, ...]] = {
    **STAGES,
    "inspect": ("inspect", "T"),
    "estimate": ("estimate", "all_demo", "--config", "config.yaml"),
    "doctor": ("doctor", "all_demo", "--config", "config.yaml"),
    "download": ("download", "owner/name"),
    "init": ("init", "T"),
    "fold-report": ("fold-report", "T", *TOKENS),
    "export": ("export", "S", "out", "--text", "text.txt"),
    "evaluate": ("evaluate", "S", "out", "--task", "arc_easy"),
    "verify": ("verify", "S"),
    "card": ("card", "S", "--out", "out"),
    "figures": ("figures", "out", *TABLES, "--statistics", "stats"),
    "demo": ("demo", "train", "nowhere"),
}  # fmt: skip

NUMBERS = (
    "", "0", "-1", "nan", "inf", "-inf", "1e400", "1" + "0" * 30, "1" * 5000, "x", "1.5", "0x10",
    "٣", "1_0", "1e-320", "\udcff", "1\n2",
)  # fmt: skip
WORDS = ("", "x", "a" * 5000, "-x", "a b", "'\"$(touch ran)`", "[*]", "a\nb", "\udcff", "../../x",
         "=", "a=b", ",", "0", "é" * 200, "\x1b[2J")  # fmt: skip
PATHS = (
    "", "nowhere", "nowhere/deeper", "text.txt/below", "folder", ".", "/dev/null",
    "/dev/zero", "/dev/full", "/dev/stdout", "/proc/self/mem", "fifo", "loop", "dangling",
    "n" * 255, "n" * 256, "n/" * 3000, "a b", "it's \"q\" [1]", "line\nline", "-dash", "\udcff.x",
    "é" * 100, "empty", "T", "tokens", "stats", "T/model.safetensors", "S", "text.txt", "socket",
)  # fmt: skip


def prepare(folder: Path) -> None:
    """What PATHS name beside the sound inputs."""
    make_sound(folder)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere-at-all")
    (folder / "empty").touch()
    shutil.copy(Path(__file__).parents[1] / "config.yaml", folder / "config.yaml")


def parser_of(command: str) -> argparse.ArgumentParser:
    actions = cli.build_parser(command)._actions
    return next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices[command]


def values_of(action: argparse.Action) -> Sequence[str]:
    """Values for an argument: by its type, or, where that says nothing, by its name."""
    if action.choices:
        return WORDS
    if action.type is Path or (action.type is None and not takes_words(action)):
        return PATHS
    return NUMBERS if action.type else WORDS


def takes_words(action: argparse.Action) -> bool:
    words = ("scoring", "grouping", "groupings", "scaling", "scalings", "column", "device", "task",
             "target", "batch_size", "keeps", "budget", "pre", "run")  # fmt: skip
    return action.dest in words


def cases(command: str) -> Iterator[tuple[str, ...]]:
    """The sound arguments with each of them replaced in turn."""
    sound = SOUND[command]
    position = 0
    yield (command, "--help")
    yield (command,)
    yield (*sound, "--nonesuch")
    yield (*sound, "further")
    for action in parser_of(command)._actions:
        if action.dest in ("help", "debug"):
            continue
        if not action.option_strings:
            position += 1
        for value in values_of(action):
            if action.option_strings:
                option = action.option_strings[0]
                if action.nargs == 0:
                    yield (*sound, f"{option}={value}")
                elif action.nargs in ("+", "*", 2):
                    yield (*sound, option, value)
                    yield (*sound, option, value, value)
                else:
                    yield (*sound, f"{option}={value}")
            elif position < len(sound):
                yield (*sound[:position], value, *sound[position + 1 :])
        if action.option_strings and action.nargs != 0:
            yield (*sound, action.option_strings[0])


def digests(place: Path) -> dict[str, str]:
    """The files that were there before a command."""
    return {
        str(file.relative_to(place)): content_of(file)
        for file in sorted(place.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }


def sweep(wanted: Sequence[str], folder: Path, every: int = 1, first: int = 0) -> Iterator[
    tuple[str, tuple[str, ...], str]
]:  # fmt: skip
    """Class, command and output of every case, or of every so-manieth."""
    sound, back = folder / "sound", Path.cwd()
    sound.mkdir()
    try:
        prepare(sound)
    finally:
        os.chdir(back)
    before = digests(sound)
    number = first
    for command in wanted:
        for words in cases(command):
            number += 1
            if number % every:
                continue
            place = folder / "case"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(sound, place, symlinks=True, ignore=no_fifo)
            os.mkfifo(place / "fifo")
            kind, text = outcome_of(words, place)
            after = digests(place)
            # Results that are no input of the command are its to replace.
            own = {*words} - {*SOUND[command]}
            changed = [
                name for name, digest in before.items() if after.get(name) != digest
                and not (name in own and "/" not in name)
            ]  # fmt: skip
            if kind not in FAULTS and (changed or (place / "ran").exists()):
                kind, text = "INPUT CHANGED", f"{changed[:5]}\n{text}"
            yield kind, words, text


def no_fifo(_: str, names: list[str]) -> set[str]:
    return {"fifo"} & set(names)


def main() -> int:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    every = next((int(word[1:]) for word in sys.argv[1:] if word.startswith("-")), 1)
    torch.set_num_threads(1)
    classes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="m2d-arguments-") as folder:
        for kind, command, text in sweep(words or list(SOUND), Path(folder), every):
            classes[kind] += 1
            if kind in (*FAULTS, "INPUT CHANGED"):
                shown = " ".join(word[:60] for word in command)
                print(f"\n{kind}: m2d {shown!a}\n" + "\n".join(text.strip().splitlines()[-12:]))
                sys.stdout.flush()
            if classes.total() % 100 == 0:
                print(f"{classes.total()}: {command[0]}: {dict(classes)}", file=sys.stderr)
    print()
    for kind, count in classes.most_common():
        print(f"{count:6d}  {kind}")
    return 1 if set(classes) & {*FAULTS, "INPUT CHANGED"} else 0


if __name__ == "__main__":
    sys.exit(main())
