"""Calibration tokens: text to packed `input_ids`, int64 [sequences, length].

The same command makes test and distillation tokens; only the text differs.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from m2d.distill.data import pack_tokens
from m2d.errors import UserError
from m2d.models.teacher import locate
from m2d.options import positive
from m2d.progress import say
from m2d.tokens import read_documents, write_tokens


def add_text_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """--text and --dataset, of which one is given; the group, for more of the kind."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", nargs="+", metavar="FILE", help=".txt, .md, .jsonl or .parquet (field text)"
    )
    source.add_argument(
        "--dataset", metavar="NAME[:SPLIT[:COLUMN]]", help="through datasets, streamed"
    )
    return source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id whose tokenizer is used")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    add_text_options(parser)
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
    """Stream the documents of NAME[:SPLIT[:COLUMN]]; NAME may be NAME@CONFIG, or a local folder."""
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


def main(args: argparse.Namespace) -> None:
    ids = tokens_from(args.teacher, args.text, args.dataset, args.length, args.sequences)
    source = ", ".join(Path(f).name for f in args.text) if args.text else args.dataset
    write_tokens(args.out, ids, {"tokenizer": Path(args.teacher).name, "source": source})
    say(f"{args.out}: {ids.shape[0]} sequences of {ids.shape[1]} tokens from {source}")
