"""Multiple-choice tasks from the demo corpus's held-out documents, as lm-eval YAML and JSON lines.

continuation  which of four passages follows a text
package       which of four packages' documentation a text follows best (as in winogrande, the
              context varies and the continuation is the same)
parameter     which of four descriptions fits a parameter, after the documentation that names it

Prompts are short, since the demo teacher was trained on 256 tokens. Every draw is seeded by the
name of its document, so a change of one document leaves the other documents' questions alone.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any, TypeVar

import yaml

from m2d.artifacts import atomic_path, require_absent
from m2d.errors import UserError
from m2d.progress import say

Document = dict[str, str]  # text, domain, name
Item = dict[str, Any]
T = TypeVar("T")

ITEMS = 200  # per task; a standard error of about 3 points
CHOICES = 4
CONTEXT = 150  # characters, about 40 tokens
CONTINUATION = 60
MIN_DESCRIPTION = 20

# name : type, then an indented description (numpydoc)
NUMPYDOC = re.compile(r"^(\w+) ?: ([^\n]{1,80})\n((?:    +[^\n]+\n?)+)", re.M)
# name (type): description (Google's style, and that of transformers)
GOOGLE = re.compile(r"^    (\w+) \(([^\n]{1,80})\):\s*([^\n]+(?:\n        +[^\n]+)*)", re.M)
# :param name: description (Sphinx)
SPHINX = re.compile(r"^:param (?:\w+ )?(\w+): *([^\n]+(?:\n +[^\n]+)*)", re.M)


def rng_for(task: str, name: str) -> random.Random:
    """Random numbers that depend on the task and the document's name alone."""
    return random.Random(f"{task}/{name}")


def rank_of(document: Document) -> bytes:
    """A fixed pseudo-random order of the documents."""
    return hashlib.sha256(document["name"].encode()).digest()


def cut(text: str, at: int, length: int) -> tuple[str, str] | None:
    """(before, after) around the first single blank from `at` on, `after` of at most `length`.

    before + " " + after is a piece of the text as it stands; both end with a whole word.
    """
    blank = re.compile(r"(?<=\S) (?=\S)").search(text, at)
    if blank is None or blank.start() > 2 * at:
        return None
    after = whole_words(text[blank.end() :], length)
    return (text[: blank.start()], after) if len(after) > length // 2 else None


def whole_words(text: str, length: int) -> str:
    """At most `length` characters of `text`, without a word cut in two."""
    return text if len(text) <= length else text[: length + 1].rsplit(None, 1)[0]


def shuffled(rng: random.Random, right: T, wrong: Sequence[T]) -> tuple[list[T], int]:
    """All choices in random order, and where the right one is."""
    choices = [right, *wrong]
    order = rng.sample(range(len(choices)), len(choices))
    return [choices[i] for i in order], order.index(0)


def continuation_items(documents: Sequence[Document]) -> Iterator[Item]:
    """Which passage follows; one of the wrong ones is from the same package."""
    pieces = [(d, parts) for d in documents if (parts := cut(d["text"], CONTEXT, CONTINUATION))]
    for document, (context, right) in pieces:
        rng = rng_for("continuation", document["name"])
        others = [(d, after) for d, (_, after) in pieces if d is not document]
        near = [after for d, after in others if d["domain"] == document["domain"]]
        far = [after for d, after in others if d["domain"] != document["domain"]]
        if not near or len(far) < CHOICES - 2:
            continue
        wrong = [rng.choice(near), *rng.sample(far, CHOICES - 2)]
        choices, answer = shuffled(rng, right, wrong)
        yield {"name": document["name"], "context": context, "choices": choices, "answer": answer}


def package_items(documents: Sequence[Document]) -> Iterator[Item]:
    """Which package's text goes before: another document of each of four packages."""
    openings: dict[str, list[tuple[str, str]]] = {}
    for document in documents:
        if parts := cut(document["text"], CONTEXT, CONTINUATION):
            openings.setdefault(document["domain"], []).append((document["name"], parts[0]))
    for document in documents:
        rng = rng_for("package", document["name"])
        parts = cut(document["text"], CONTINUATION, CONTINUATION)
        here = document["name"]
        own = [(name, t) for name, t in openings.get(document["domain"], []) if name != here]
        domains = sorted(openings.keys() - {document["domain"]})
        if parts is None or not own or len(domains) < CHOICES - 1:
            continue
        wrong = [rng.choice(openings[d])[1] for d in rng.sample(domains, CHOICES - 1)]
        # The right one stands nearest in the source tree; by characters, so that the same file
        # comes before the same folder.
        _, right = max(own, key=lambda pair: len(commonprefix([pair[0], here])))  # noqa: RUF071
        choices, answer = shuffled(rng, right, wrong)
        text = " ".join(parts)
        yield {"name": document["name"], "text": text, "choices": choices, "answer": answer}


def described_parameters(document: Document) -> Iterator[tuple[str, str, str]]:
    """(parameter, text up to its description, description) for the parameters documented there."""
    text = document["text"]
    for pattern in (NUMPYDOC, GOOGLE, SPHINX):
        for match in pattern.finditer(text):
            group = match.lastindex or 0
            start = match.end(group) - len(match[group].lstrip())
            before = text[:start].rstrip()
            gap = text[len(before) : start]
            # Enough to name the parameter; more would make every prompt longer.
            before = before[-CONTEXT:].split(" ", 1)[-1] if len(before) > CONTEXT else before
            words = " ".join(text[start : match.end()].split())
            shown = whole_words(words, CONTINUATION)
            if len(shown) >= MIN_DESCRIPTION:
                yield match[1], before, gap + shown


def parameter_items(documents: Sequence[Document]) -> Iterator[Item]:
    """Which description fits; the wrong ones describe other parameters in other documents."""
    found = {d["name"]: list(described_parameters(d)) for d in documents}
    for document in documents:
        if not found[document["name"]]:
            continue
        rng = rng_for("parameter", document["name"])
        name, context, right = rng.choice(found[document["name"]])
        gap = right[: len(right) - len(right.lstrip())]
        others = sorted(
            {
                gap + description.lstrip()
                for other, parameters in found.items()
                for parameter, _, description in parameters
                if other != document["name"] and parameter != name
            }
            - {right}
        )
        if len(others) < CHOICES - 1:
            continue
        choices, answer = shuffled(rng, right, rng.sample(others, CHOICES - 1))
        yield {"name": document["name"], "context": context, "choices": choices, "answer": answer}


Maker = Callable[[Sequence[Document]], Iterator[Item]]
ACC, ACC_NORM = (
    {"metric": metric, "aggregation": "mean", "higher_is_better": True}
    for metric in ("acc", "acc_norm")
)
# task -> (what makes its items, what its YAML adds)
TASKS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "demo_continuation": (
        continuation_items,
        {
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [ACC, ACC_NORM],
        },
    ),
    "demo_package": (
        package_items,
        {
            # lm-eval varies the context where doc_to_text is the number of the right one.
            "doc_to_text": "answer",
            "doc_to_choice": "choices",
            "doc_to_target": "text",
            "target_delimiter": "\n\n",
            "metric_list": [ACC],
        },
    ),
    "demo_parameter": (
        parameter_items,
        {
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            # The choices begin with the white space of their documents.
            "target_delimiter": "",
            "metric_list": [ACC, ACC_NORM],
        },
    ),
}


def write_demo_tasks(corpus_dir: str | Path, out_dir: str | Path) -> None:
    """Write NAME.yaml and NAME.jsonl of every demo task into a new folder, whole or not at all.

    `corpus_dir` holds test.jsonl of the demo corpus. Raises UserError if that is missing or too
    small for a task, or if `out_dir` exists.
    """
    require_absent(out_dir)
    documents = sorted(read_documents(Path(corpus_dir) / "test.jsonl"), key=rank_of)
    with atomic_path(out_dir) as folder:
        folder.mkdir()
        for task, (make_items, settings) in TASKS.items():
            items = [item for item, _ in zip(make_items(documents), range(ITEMS), strict=False)]
            if not items:
                raise UserError(f"{corpus_dir}/test.jsonl: too few documents for {task}")
            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")
            definition = {
                "task": task,
                "dataset_path": "json",
                # Relative to this folder: `m2d evaluate --include` resolves it, and so does lm-eval
                # itself when it is run here.
                "dataset_kwargs": {"data_files": {"test": f"{task}.jsonl"}},
                "test_split": "test",
                "output_type": "multiple_choice",
                **settings,
                "metadata": {"version": 1.0},
            }
            text = yaml.safe_dump(definition, sort_keys=False)
            (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
            say(f"{task}: {len(items)} questions")


def read_documents(file: Path) -> list[Document]:
    """The documents of a split of the demo corpus."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        documents = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a split of the demo corpus ({error})") from None
    for number, document in enumerate(documents, 1):
        if not {"text", "domain", "name"} <= document.keys():
            raise UserError(f"{file}:{number}: needs text, domain and name")
    return documents
