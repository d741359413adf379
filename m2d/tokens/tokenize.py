"""Calibration tokens: text to packed `input_ids`, int64 [sequences, length].

The same command makes test and distillation tokens; only the text differs. Text is read as a
stream, so the file may be larger than memory; it appears when it is complete. A killed run goes on
where it was when it is started again with the same arguments.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from m2d.artifacts import sha256_of
from m2d.errors import UserError
from m2d.models.teacher import locate
from m2d.options import positive
from m2d.progress import say
from m2d.tokens.packed import mixture, pack_tokens, write_packed
from m2d.tokens.text import SUFFIXES, read_documents


def add_text_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """--text and --dataset, of which one is given; the group, for more of the kind."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help=".txt, .md, .rst, .jsonl or .parquet (field text), or folders of such",
    )
    source.add_argument(
        "--dataset", metavar="NAME[@CONFIG][:SPLIT[:COLUMN]]", help="through datasets, streamed"
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
    parser.add_argument("--sequences", type=positive, default=512, help="(default: 512)")
    parser.add_argument("--length", type=positive, default=2048, help="tokens each (default: 2048)")


def load_tokenizer(model: str | Path) -> Any:
    """A model folder's tokenizer; no code of the folder is run."""
    folder = locate(model)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: no usable tokenizer ({reason})") from None


def dataset_documents(spec: str) -> Iterable[str]:
    """Stream the documents of NAME[@CONFIG][:SPLIT[:COLUMN]]; NAME may be a local folder."""
    from datasets import load_dataset

    name, split, column = [*spec.split(":"), "", ""][:3]
    path, _, config = name.partition("@")
    split, column = split or "train", column or "text"
    try:
        rows = load_dataset(path, config or None, split=split, streaming=True)
        for row in rows:
            yield row[column]
    except KeyError:
        raise UserError(f"--dataset {spec}: has no column {column!r}") from None
    except Exception as error:  # datasets raises many kinds, all meaning "not available"
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--dataset {spec}: not available ({reason})") from None


def tokens_from(
    model: str | Path,
    text: Sequence[str | Path] | None,
    dataset: str | None,
    length: int,
    sequences: int | None,
) -> Any:
    """Packed tokens [sequences, length] of text files or of a dataset."""
    documents = read_documents(text) if text else dataset_documents(str(dataset))
    return pack_tokens(documents, load_tokenizer(model), length, sequences)


def mixed_documents(parts: Sequence[tuple[str, str]]) -> Iterable[str]:
    """The documents of (weight, source) pairs, interleaved by weight."""
    sources = []
    for weight, source in parts:
        try:
            share = float(weight)
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise UserError(f"--mix {weight} {source}: the weight must be a number above 0")
        local = Path(source).exists() or Path(source).suffix in SUFFIXES
        documents = read_documents([source]) if local else dataset_documents(source)
        sources.append((documents, share))
    return mixture(sources)


def identity_of(teacher: str, sources: Iterable[str]) -> list[Any]:
    """What tells whether a killed run's tokens may be gone on with: tokenizer and texts.

    Of a tokenizer its files' digests; of text files and folders path, size and time of every file.
    """
    parts: list[Any] = [
        [file.name, sha256_of(file)]
        for file in sorted(locate(teacher).iterdir())
        if file.name.startswith(("tokenizer", "vocab", "merges", "special_tokens"))
    ]
    for source in sources:
        place = Path(source if Path(source).exists() else source.partition(":")[0])
        files = sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]
        known = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
        parts.append([str(source), known])
    return parts


def main(args: argparse.Namespace) -> None:
    sources = [source for _, source in args.mix or ()] or args.text or [args.dataset]
    identity = identity_of(args.teacher, sources)
    if args.mix:
        documents = mixed_documents(args.mix)
        source = " + ".join(f"{weight} {name}" for weight, name in args.mix)
    elif args.text:
        documents = read_documents(args.text)
        source = ", ".join(Path(file).name for file in args.text)
    else:
        documents, source = dataset_documents(args.dataset), args.dataset
    notes = {"tokenizer": Path(args.teacher).name, "source": source}
    tokenizer = load_tokenizer(args.teacher)
    rows = write_packed(
        args.out, documents, tokenizer, args.length, args.sequences, notes, identity
    )
    say(f"{args.out}: {rows} sequences of {args.length} tokens from {source}")
