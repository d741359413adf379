"""The demo corpus: the documentation of packages that m2d's extras bring, of those installed.

Nothing is downloaded and nothing is imported: docstrings are read with `ast` from the source files
of the installed dependencies, and of Python's own library. One package, or a few kindred ones, is
one domain.
"""

import ast
import bisect
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import multiprocessing
import os
import re
import sysconfig
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from m2d.artifacts import atomic_path, require_absent
from m2d.progress import say

# Domain -> packages. Only dependencies that pyproject.toml pins, or that these need: what else a
# developer has installed must not change the corpus.
DOMAINS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "training": ("deepspeed", "accelerate", "lm_eval", "evaluate"),
    "data": ("datasets", "pyarrow", "huggingface_hub", "fsspec"),
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "pandas": ("pandas",),
    "sklearn": ("sklearn",),
    "matplotlib": ("matplotlib", "mpl_toolkits", "fontTools"),
    "sympy": ("sympy", "mpmath"),
    "networkx": ("networkx",),
    "nltk": ("nltk",),
    "python": (),  # the standard library, with the topics of pydoc
}
SPLITS = ("train", "calibration", "test")
HELD_OUT_PERCENT = 3  # of the documents, for calibration and for test each
MIN_DOCUMENT = 100  # characters; shorter documents are dropped
RUN = 10  # words; see clean_held_out
HEADING = 20  # normalised characters; shorter paragraphs ("Examples:") may repeat

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "idlelib", "site-packages", "third_party", "_vendor", "externals"}
)
# What `normalise` makes of each ASCII character.
_ASCII = str.maketrans(
    {
        chr(c): "0" if chr(c).isdigit() else chr(c).lower() if chr(c).isalpha() else " "
        for c in range(128)
    }
)
# The fields of a statement in which others stand, in the order of their lines.
_STATEMENTS = ("body", "handlers", "orelse", "finalbody", "cases")


class Document(NamedTuple):
    """One text of the corpus: the documentation of a function, of a class, or of a module."""

    domain: str
    name: str  # where it stands, such as "numpy/linalg/_linalg.py:solve"
    text: str
    split: str  # one of SPLITS


def split_of(name: str) -> str:
    """The split of the document of this name.

    By a hash of the name, not of the text: when a later version of a package edits a text, it stays
    in its split, so no test text is an edited copy of a text on which the teacher was trained.
    """
    percentile = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 100
    if percentile < HELD_OUT_PERCENT:
        return "test"
    return "calibration" if percentile < 2 * HELD_OUT_PERCENT else "train"


# --- reading documentation out of source files ----------------------------------------


def _walk_lines(tree: ast.Module, lines: list[int]) -> Iterator[ast.AST]:
    """`ast.walk`, but without the statements in which none of the (sorted) lines is."""
    queue: deque[ast.AST] = deque([tree])
    while queue:
        node = queue.popleft()
        if isinstance(node, ast.stmt):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            at = bisect.bisect_left(lines, first)
            if at == len(lines) or lines[at] > (node.end_lineno or first):
                continue
        queue.extend(ast.iter_child_nodes(node))
        yield node


def _strings_in_doc_statements(tree: ast.Module, source: str) -> Iterator[tuple[str, str]]:
    """(name, text) of documentation that is not a docstring.

    Compiled packages attach documentation with calls such as `add_newdoc("numpy", "abs", "...")`,
    and templates stand in assignments such as `_shared_docs["merge"] = "..."`: long literals under
    a call or an assignment in whose name "doc" occurs.
    """
    lines = [i for i, line in enumerate(source.split("\n"), 1) if "doc" in line.lower()]
    for node in _walk_lines(tree, lines):  # all nodes would take a minute
        if isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            target = node.func
        elif isinstance(node, ast.Assign):
            target, values = node.targets[0], [node.value]
        else:
            continue
        if not _mentions_doc(target) or len(named := ast.unparse(target)) > 60:
            continue
        constants = [v.value for v in values if isinstance(v, ast.Constant)]
        words = [c for c in constants if isinstance(c, str) and len(c) < 40]
        for part in values:
            for leaf in ast.walk(part):
                text = leaf.value if isinstance(leaf, ast.Constant) else None
                if isinstance(text, str) and len(text) >= MIN_DOCUMENT:
                    yield ".".join([named, *words]), inspect.cleandoc(text)


def _mentions_doc(expression: ast.expr) -> bool:
    """Whether "doc" is in a name, attribute or string of an expression; unparsing all is slow."""
    for part in ast.walk(expression):
        if isinstance(part, ast.Name):
            word = part.id
        elif isinstance(part, ast.Attribute):
            word = part.attr
        elif isinstance(part, ast.Constant):
            word = str(part.value)
        else:
            continue
        if "doc" in word.lower():
            return True
    return False


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a function or class, and of everything defined in it, in order."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if isinstance(node, definitions) and (doc := ast.get_docstring(node)):
        yield doc
    for field in _STATEMENTS:
        for child in getattr(node, field, ()):
            yield from _docstrings(child)


def documents_in(source: str, where: str) -> list[tuple[str, str]]:
    """(name, text) of every document in a Python source; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = [(where, ast.get_docstring(tree) or "")]
    for node in tree.body:
        label = getattr(node, "name", "")
        found.append((f"{where}:{label}", "\n\n".join(_docstrings(node))))
    found += [(f"{where}:{n}", text) for n, text in _strings_in_doc_statements(tree, source)]
    return [(name, text) for name, text in found if len(text) >= MIN_DOCUMENT]


def _documents_in_file(job: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    domain, path, where = job
    source = Path(path).read_text(encoding="utf-8", errors="replace")
    if where == "pydoc_data/topics.py":
        scope: dict[str, dict[str, str]] = {}
        exec(compile(source, path, "exec"), scope)  # nothing but the literal of one dictionary
        return [(domain, f"{where}:{k}", v) for k, v in sorted(scope["topics"].items())]
    return [(domain, name, text) for name, text in documents_in(source, where)]


def _sources() -> list[tuple[str, str, str]]:
    """(domain, path, path within the package's parent) of every source file, in a fixed order."""
    jobs, missing = [], []
    for domain, packages in DOMAINS.items():
        roots = []
        for package in packages:
            spec = importlib.util.find_spec(package)  # finds a top-level package without importing
            if spec is None or not spec.submodule_search_locations:
                missing.append(package)
                continue
            roots += [(Path(p), Path(p).parent) for p in spec.submodule_search_locations]
        if domain == "python":
            library = Path(sysconfig.get_path("stdlib"))
            roots = [(library, library)]
        for root, base in roots:
            for folder, folders, files in os.walk(root):
                folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
                for name in files:
                    if name.endswith((".py", ".pyi")):
                        path = Path(folder, name)
                        jobs.append((domain, str(path), path.relative_to(base).as_posix()))
    if missing:
        say(
            f"the corpus is without {', '.join(missing)}, which are not installed; the numbers in "
            "the README are of the corpus with all of m2d[workflow,distill,eval,demo]"
        )
    order = {domain: i for i, domain in enumerate(DOMAINS)}
    return sorted(set(jobs), key=lambda job: (order[job[0]], job[2], job[1]))


# --- removing what is said twice ------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, numbers as 0, and every run of anything but letters and digits as one space."""
    if not text.isascii():
        return re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text.lower())).strip()
    plain = text.translate(_ASCII)  # the same ten times as fast, for most of the corpus
    while "00" in plain:
        plain = plain.replace("00", "0")
    return " ".join(plain.split())


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text: its blocks between blank lines."""
    return [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]


def deduplicate(texts: Iterable[str]) -> Iterator[str]:
    """Each text without the paragraphs that an earlier text, or it itself, already contains.

    A paragraph repeats if at least half of it, by characters, is lines that occurred before, both
    normalised: an argument list of which one entry is new is dropped as a whole. Headings (shorter
    than `HEADING` normalised characters) stay unless what follows them goes.
    """
    seen: set[int] = set()
    for text in texts:
        kept: list[str] = []
        headings: list[str] = []
        for paragraph in paragraphs(text):
            whole = normalise(paragraph)
            if len(whole) < HEADING:
                headings.append(paragraph)
                continue
            lines = [n for line in paragraph.split("\n") if len(n := normalise(line)) >= HEADING]
            marks = [hash(line) for line in lines]
            old = sum(len(line) for line, mark in zip(lines, marks, strict=True) if mark in seen)
            known = hash(whole) in seen or 2 * old > sum(map(len, lines))
            seen.update(marks)
            seen.add(hash(whole))
            if not known:
                kept += [*headings, paragraph]
            headings = []
        yield "\n\n".join(kept)


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    """Each text, or an empty one where an earlier text is the same."""
    seen: set[str] = set()
    for text in texts:
        yield "" if text in seen else text
        seen.add(text)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def clean_held_out(documents: Iterable[Document]) -> list[Document]:
    """The documents, split by split, without held-out paragraphs that an earlier split knows.

    A paragraph is known if more than half of its runs of `RUN` normalised words occur in documents
    of an earlier split: this finds what `deduplicate` misses, copies with other line breaks. Train
    documents stay as they are.
    """
    documents = list(documents)
    held_out = {run for d in documents if d.split != "train" for run in _runs(d.text)}
    known: set[int] = set()
    cleaned = []
    for split in SPLITS:
        here = [d for d in documents if d.split == split]
        if split != "train":
            here = [d._replace(text=_without(d.text, known)) for d in here]
        known.update(run for d in here for run in _runs(d.text) if run in held_out)
        cleaned += [d for d in here if len(d.text) >= MIN_DOCUMENT]
    return cleaned


def _runs(text: str) -> list[int]:
    words = normalise(text).split()
    return [hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)]


def _without(text: str, known: set[int]) -> str:
    kept = []
    for paragraph in paragraphs(text):
        runs = _runs(paragraph)
        if 2 * sum(run in known for run in runs) <= len(runs):
            kept.append(paragraph)
    return "\n\n".join(kept)


# --- the corpus -----------------------------------------------------------------------


def build_corpus(clean: bool = True) -> list[Document]:
    """The whole demo corpus, in a fixed order, train first; half a minute on two cores.

    clean: without paragraphs that are said twice; else only texts that are the same to the letter
    are dropped, and held-out documents repeat much that train documents say.
    """
    start = time.monotonic()
    jobs = _sources()
    say(f"corpus: reading the documentation in {len(jobs)} source files")
    context = multiprocessing.get_context("spawn")  # fork is unsafe in a caller that has threads
    # Collecting garbage is a sixth of the parser's time, and syntax trees leave none.
    with ProcessPoolExecutor(2, mp_context=context, initializer=gc.disable) as pool:
        parts = pool.map(_documents_in_file, jobs, chunksize=50)
        found, again = itertools.tee(itertools.chain.from_iterable(parts))
        texts = (text for *_, text in again)
        raw = 0
        numbered: Counter[str] = Counter()
        documents = []
        kept = deduplicate(texts) if clean else _distinct(texts)
        for (domain, name, whole), text in zip(found, kept, strict=True):
            raw += len(whole)
            numbered[name] += 1
            if len(text) >= MIN_DOCUMENT:
                unique = name if numbered[name] == 1 else f"{name}#{numbered[name]}"
                documents.append(Document(domain, unique, text, split_of(name)))
    documents = clean_held_out(documents) if clean else documents
    size = sum(len(d.text) for d in documents)
    say(
        f"corpus: {len(documents)} documents, {size / 1e6:.1f} MB of {raw / 1e6:.1f} MB "
        f"after deduplication, {time.monotonic() - start:.0f} s"
    )
    return documents


def write_corpus(folder: Path) -> None:
    """Write `train.jsonl`, `calibration.jsonl` and `test.jsonl` into a new folder.

    One JSON object per line: {"text", "domain", "name"}, in an order that mixes the domains, so
    that the beginning of a file stands for all of it. The folder appears when it is complete.
    Raises UserError if it exists.
    """
    require_absent(folder)
    documents = sorted(build_corpus(), key=lambda document: _digest(document.name))
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for split in SPLITS:
            with (temporary / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for d in documents:
                    if d.split == split:
                        line = {"text": d.text, "domain": d.domain, "name": d.name}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
