"""`m2d export`: a student as one GGUF file, for llama.cpp and what is built on it.

Or, where its name does not end in .gguf, as a folder that vLLM takes: m2d.export.folder.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

from m2d.artifacts import atomic_path, require_absent
from m2d.errors import UserError
from m2d.export.check import Check, check_gguf
from m2d.export.converter import find_converter, run_converter
from m2d.export.engine import server_command
from m2d.export.folder import export_folder
from m2d.footprint import size
from m2d.options import positive
from m2d.progress import say

TYPES = ("f16", "bf16", "q8_0", "f32")


def export(
    student: str | Path,
    out: str | Path,
    kind: str = "bf16",
    *,
    converter: str | None = None,
    pre: str | None = None,
    text: list[str] | None = None,
    dataset: str | None = None,
    sequences: int = 4,
    length: int = 256,
) -> Check | None:
    """Write the student's folder as a GGUF file; with text, check it and return what was found.

    kind: one of TYPES. converter: llama.cpp's convert_hf_to_gguf.py, if it is not on the PATH.
    pre: llama.cpp's name of the pre-tokenizer, where neither it nor m2d knows it.
    text, dataset: as for `m2d tokenize`; so many sequences of so many tokens are compared.
    Raises UserError on bad input, a missing converter, or a file that is not the student; then
    nothing is written.
    """
    from m2d.evaluate.backends import check_for_others

    out, folder = Path(out), Path(student)
    if out.suffix != ".gguf":
        raise UserError(f"{out}: give the file a name that ends in .gguf")
    require_absent(out)
    if not (folder / "config.json").is_file():
        raise UserError(f"{student}: not the folder of a model; it has no config.json")
    program = find_converter(converter)
    checked = text is not None or dataset is not None
    if checked and server_command() is None:
        raise UserError(
            "the check needs llama.cpp: pip install xllamacpp, or put llama-server on the PATH"
        )
    check_for_others(folder)  # which the converter does not
    found = None
    with atomic_path(out) as file:
        with tempfile.TemporaryDirectory(prefix=".m2d-", dir=file.parent) as work:
            guessed = run_converter(program, folder, file, kind, Path(work), pre)
        if guessed:
            say("its vocabulary is new to llama.cpp; the pre-tokenizer is the one of that pattern")
        if checked:
            found = check(folder, file, text, dataset, sequences, length)
    return found


def check(
    student: Path,
    file: Path,
    text: list[str] | None,
    dataset: str | None,
    sequences: int,
    length: int,
) -> Check:
    """Compare the file with the student on the first tokens of a text."""
    import torch

    from m2d.devices import pick_device
    from m2d.evaluate.perplexity import measure
    from m2d.tokens.packed import pack_tokens
    from m2d.tokens.rows import text_of
    from m2d.tokens.text import read_documents
    from m2d.tokens.tokenize import dataset_documents, load_tokenizer

    tokenizer = load_tokenizer(student)
    stream = read_documents(text) if text else dataset_documents(str(dataset))
    documents = [text_of(document) for document in islice(stream, 200)]
    tokens = pack_tokens(documents, tokenizer, length, sequences)
    own = measure(student, tokens, 8, None, pick_device(None))
    threads = torch.get_num_threads()
    return check_gguf(file, tokenizer, documents, tokens, own.perplexity, threads)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", help="folder of a student, or of any model in that layout")
    parser.add_argument("out", type=Path, help="the file to write, .gguf, or a folder")
    parser.add_argument(
        "--type", choices=TYPES, default="bf16", dest="kind", help="of the weights (%(default)s)"
    )
    parser.add_argument(
        "--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, or its folder"
    )
    parser.add_argument("--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer")
    parser.add_argument(
        "--experts",
        type=positive,
        help="to a folder: cut the FFNs into so many experts that are always taken (default: 2)",
    )
    group = parser.add_argument_group("a check in llama.cpp, against the student")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", metavar="FILE", help="text files or folders")
    source.add_argument("--dataset", metavar="NAME[@CONFIG][:SPLIT[:COLUMN]]")
    group.add_argument("--sequences", type=positive, default=4, help="(default: 4)")
    group.add_argument("--length", type=positive, default=256, help="tokens each (default: 256)")


def main(args: argparse.Namespace) -> None:
    if args.out.suffix != ".gguf":
        done = export_folder(args.student, args.out, args.experts or 2)
        say(f"{args.out}: {done}")
        return
    if args.experts:
        raise UserError("--experts: of a folder; a GGUF file is made of the student as it is")
    options = {k: v for k, v in vars(args).items() if k not in ("command", "debug", "experts")}
    found = export(**options)
    written = size(args.out.stat().st_size)
    say(f"{args.out}: {args.kind}, {written}; llama-server -m {args.out}")
    print(found.text() if found else "not checked: give --text FILE to compare it with the student")
