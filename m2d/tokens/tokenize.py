"""Calibration tokens: text to packed `input_ids`, int64 [sequences, length].

The same command makes test and distillation tokens; only the text differs. Text is read as a
stream, so the file may be larger than memory; it appears when it is complete. A killed run goes on
where it was when it is started again with the same arguments.
"""

import argparse
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from m2d.artifacts import sha256_of
from m2d.errors import UserError, first_line
from m2d.models.hub import name_of
from m2d.models.teacher import locate, read_config
from m2d.options import positive
from m2d.progress import say
from m2d.tokens.encode import BOS, LOSS_ON
from m2d.tokens.packed import mixture, pack_tokens, write_packed
from m2d.tokens.rows import PEEK, Document, column_of, documents_of, values_of
from m2d.tokens.text import kind_of, read_documents


def add_text_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """--text and --dataset, of which one is given; the group, for more of the kind."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text, JSON or Parquet files (.txt, .jsonl, .json, .parquet, ..., also .gz and .zst), "
        "or folders of such",
    )
    source.add_argument(
        "--dataset", metavar="NAME[@CONFIG][:SPLIT[:COLUMN]]", help="through datasets, streamed"
    )
    parser.add_argument(
        "--column", metavar="NAME", help="of the text, or of chats (default: text, messages, ...)"
    )
    parser.add_argument(
        "--bos",
        choices=BOS,
        default=BOS[0],
        help="where a beginning-of-sequence token stands: before each document or sequence, "
        "nowhere, or before each document if the tokenizer puts it there (auto)",
    )
    return source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id whose tokenizer is used")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    add_text_options(parser).add_argument(
        "--mix",
        nargs=2,
        action="append",
        metavar=("WEIGHT", "SOURCE"),
        help="a part of a mixture: its share of the characters, and a text file, a folder or a "
        "dataset; give one for each part",
    )
    parser.add_argument(
        "--loss-on",
        choices=LOSS_ON,
        default=LOSS_ON[0],
        help="assistant: a distillation on these tokens counts what assistants say in chats (all)",
    )
    parser.add_argument("--sequences", type=positive, default=512, help="(default: 512)")
    parser.add_argument("--length", type=positive, default=2048, help="tokens each (default: 2048)")


# The files of which a tokenizer has at least one.
VOCABULARY = re.compile(r"tokenizer\.json|vocab\..*|.*\.(model|tiktoken)|tekken\.json")


def load_tokenizer(model: str | Path) -> Any:
    """A model folder's tokenizer; no code of the folder is run."""
    folder = locate(model)
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found("a")  # some of what is wrong in tokenizer_config.json shows only then
        # Where a folder has none, transformers may make one of special tokens up.
        if len(found.get_vocab()) - len(found.added_tokens_decoder) > 1:
            return found
        reason = "it knows special tokens alone"
    except Exception as error:
        reason = first_line(error)
    if not any(VOCABULARY.fullmatch(file.name) for file in folder.iterdir()):
        raise UserError(
            f"{folder}: has no tokenizer; fetch the model's own (tokenizer.json, or vocab.json and "
            "merges.txt, or tokenizer.model)"
        )
    raise UserError(f"{folder}: no usable tokenizer ({reason})")


def vocabulary_of(model: str | Path) -> int | None:
    """The tokens that a model knows; None for a folder that holds a tokenizer alone."""
    try:
        _, config = read_config(locate(model))
    except UserError:
        return None
    return int(config.get_text_config().vocab_size)


def dataset_documents(spec: str, column: str | None = None) -> Iterator[Document]:
    """Stream the documents of NAME[@CONFIG][:SPLIT[:COLUMN]]; NAME may be a local folder."""
    from datasets import load_dataset

    name, split, named = [*spec.split(":"), "", ""][:3]
    path, _, config = name.partition("@")
    place = f"--dataset {spec}"
    try:
        rows = iter(load_dataset(path, config or None, split=split or "train", streaming=True))
        head = list(itertools.islice(rows, PEEK))
        chosen = column_of(head, named or column, place)
        yield from documents_of(values_of(itertools.chain(head, rows), chosen), place)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds, all meaning "not available"
        raise UserError(f"{place}: not available ({first_line(error)})") from None


def tokens_from(
    model: str | Path,
    text: Sequence[str | Path] | None,
    dataset: str | None,
    length: int,
    sequences: int | None,
    *,
    column: str | None = None,
    bos: str = BOS[0],
    vocab_size: int | None = None,
) -> Any:
    """Packed tokens [sequences, length] of text files or of a dataset.

    Raises UserError where they hold an id that a model of `vocab_size` tokens does not know.
    """
    documents = read_documents(text, column) if text else dataset_documents(str(dataset), column)
    return pack_tokens(documents, load_tokenizer(model), length, sequences, bos, vocab_size)


def mixed_documents(
    parts: Sequence[tuple[str, str]], column: str | None = None
) -> Iterator[Document]:
    """The documents of (weight, source) pairs, interleaved by weight."""
    sources = []
    for weight, source in parts:
        try:
            share = float(weight)
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise UserError(f"--mix {weight} {source}: the weight must be a number above 0")
        local = Path(source).exists() or kind_of(Path(source))
        documents = read_documents([source], column) if local else dataset_documents(source, column)
        sources.append((documents, share))
    return mixture(sources)


def identity_of(teacher: str, sources: Iterable[str]) -> list[Any]:
    """What tells whether a killed run's tokens may be gone on with: tokenizer and texts.

    Of a tokenizer its files' digests; of text files and folders path, size and time of every file.
    """
    parts: list[Any] = [
        [file.name, sha256_of(file)]
        for file in sorted(locate(teacher).iterdir())
        if file.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "chat_template"))
    ]
    for source in sources:
        place = Path(source if Path(source).exists() else source.partition(":")[0])
        files = sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
        known = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
        parts.append([str(source), known])
    return parts


def main(args: argparse.Namespace) -> None:
    sources = [source for _, source in args.mix or ()] or args.text or [args.dataset]
    identity = [identity_of(args.teacher, sources), args.column]
    if args.mix:
        documents = mixed_documents(args.mix, args.column)
        source = " + ".join(f"{weight} {name}" for weight, name in args.mix)
    elif args.text:
        documents = read_documents(args.text, args.column)
        source = ", ".join(Path(file).name for file in args.text)
    else:
        documents, source = dataset_documents(args.dataset, args.column), args.dataset
    notes = {"tokenizer": Path(name_of(args.teacher)).name, "source": source}
    tokenizer = load_tokenizer(args.teacher)
    rows = write_packed(
        args.out, documents, tokenizer, args.length, args.sequences, notes, identity,
        bos=args.bos, loss_on=args.loss_on, vocab_size=vocabulary_of(args.teacher),
    )  # fmt: skip
    say(f"{args.out}: {rows} sequences of {args.length} tokens from {source}")
