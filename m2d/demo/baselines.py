"""What a model without a network reaches on the demo corpus: a unigram and a 5-gram model.

Both see the same tokens as the teacher and are scored with its protocol: windows that do not
overlap, of the teacher's training length, whose first token is not predicted and which know
nothing of what came before the window.
"""

from pathlib import Path
from typing import Any

import numpy as np

from m2d.demo.corpus import build_corpus
from m2d.progress import say


def _keys(windows_NT: np.ndarray, order: int, vocabulary: int) -> np.ndarray:
    """Each n-gram of `order` tokens inside the windows as one integer: [N, T - order + 1] uint64.

    A number in base `vocabulary`, so that key // vocabulary is the key of the first order - 1
    tokens. Needs vocabulary ** order < 2 ** 64: five tokens of a vocabulary of 7131, at most.
    """
    if vocabulary**order >= 2**64:
        raise ValueError(f"{order} tokens of a vocabulary of {vocabulary} do not fit in 64 bits")
    columns = windows_NT.shape[1] - order + 1
    key = np.zeros((len(windows_NT), max(columns, 0)), dtype=np.uint64)
    for i in range(order):
        key = key * np.uint64(vocabulary) + windows_NT[:, i : i + columns].astype(np.uint64)
    return key


def _lookup(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The value of each key in a sorted table, 0 where it is absent."""
    if len(table) == 0:
        return np.zeros(keys.shape)
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[at] == keys, values[at], 0.0)


def ngram_probabilities(
    train_NT: np.ndarray, test_NT: np.ndarray, vocabulary: int, order: int
) -> np.ndarray:
    """p(token | up to order - 1 tokens before it in its window): [N, T - 1] for tokens 1..T-1.

    Interpolated Kneser-Ney smoothing with one discount per order, from the bottom up: the uniform
    distribution, then 1-grams, ..., then `order`-grams; counts below the highest order are numbers
    of distinct left contexts. Order 1 is the plain unigram model (counts of tokens). A position
    with fewer tokens before it in its window uses the orders that it can.
    Source: Chen and Goodman 1999; the discount is n1 / (n1 + 2 n2), where n1 and n2 n-grams have
    the counts 1 and 2, and 1/2 if n1 is 0.
    """
    base = np.uint64(vocabulary)
    number, length = test_NT.shape
    probability = np.full((number, length - 1), 1.0 / vocabulary)
    # Highest order first: the distinct (n + 1)-grams give the counts of the n-grams.
    tables: list[tuple[np.ndarray, np.ndarray]] = []
    longer = _keys(train_NT, order, vocabulary)
    for n in range(order, 0, -1):
        grams, counts = np.unique(longer % base ** np.uint64(n), return_counts=True)
        tables.insert(0, (grams, counts.astype(np.float64)))
        longer = grams
    for n, (grams, counts) in enumerate(tables, start=1):
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = once / (once + 2 * twice) if once else 0.5
        contexts, first, kinds = np.unique(grams // base, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        keys = _keys(test_NT, n, vocabulary)
        if n == 1:
            keys = keys[:, 1:]  # the first token of a window is not predicted
        count = _lookup(grams, counts, keys)
        total = _lookup(contexts, totals, keys // base)
        kind = _lookup(contexts, kinds.astype(np.float64), keys // base)
        here = probability[:, length - 1 - keys.shape[1] :]  # a view: positions with n - 1 before
        known = total > 0  # an unseen context says nothing: the shorter one's estimate stands
        here[known] = (
            np.maximum(count[known] - discount, 0.0) + discount * kind[known] * here[known]
        ) / total[known]
    return probability


def ngram_perplexity(
    train_NT: np.ndarray, test_NT: np.ndarray, vocabulary: int, order: int
) -> float:
    """Perplexity per token of the n-gram model of `order` on test windows [N, T]."""
    probability = ngram_probabilities(train_NT, test_NT, vocabulary, order)
    return float(np.exp(-np.log(probability).mean()))


def demo_baselines(teacher: Path) -> dict[str, Any]:
    """The demo teacher in `teacher` beside both n-gram models, on the demo corpus's test split.

    Returns what `measure_teacher` returns, with "train_tokens", "unigram_perplexity",
    "5gram_perplexity", and the teacher's "raw_perplexity" on the "raw_tokens" of the test documents
    as they were found, repeated paragraphs and all. About three minutes on two cores.
    """
    # Here, not above: the command line's help must not wait for torch.
    from m2d.demo import measure
    from m2d.demo import teacher as demo

    documents = build_corpus()
    train = [d.text for d in documents if d.split == "train"]
    test = [d for d in documents if d.split == "test"]
    texts = [d.text for d in test]
    tokenizer = demo.load_tokenizer(teacher)
    ids = demo.encode(tokenizer, train)
    train_NT = np.concatenate(ids)[None]  # one long window: the models may count across documents
    test_NT = demo.windows(demo.encode(tokenizer, texts))
    say(f"baselines: counting {train_NT.size:,} tokens")
    result: dict[str, Any] = {"train_tokens": train_NT.size}
    for name, order in (("unigram", 1), ("5gram", 5)):
        perplexity = ngram_perplexity(train_NT, test_NT, len(tokenizer), order)
        result[f"{name}_perplexity"] = perplexity
        say(f"baselines: {name} perplexity {perplexity:.2f}")
    raw = [d for d in build_corpus(clean=False) if d.split == "test"]
    found = measure.measure_teacher(teacher, [d.text for d in raw], [d.domain for d in raw])
    result |= {"raw_tokens": found["tokens"], "raw_perplexity": found["perplexity"]}
    return result | measure.measure_teacher(teacher, texts, [d.domain for d in test])


def baselines_table(result: dict[str, Any]) -> str:
    """`demo_baselines`'s result as Markdown: the models, then the experts' usage by layer."""
    lines = ["| model | test perplexity per token |", "|---|---|"]
    lines.append(f"| unigram | {result['unigram_perplexity']:.1f} |")
    lines.append(f"| 5-gram, interpolated Kneser-Ney | {result['5gram_perplexity']:.2f} |")
    lines.append(
        f"| teacher | {result['perplexity']:.2f} ({result['bits_per_byte']:.3f} bits per byte) |"
    )
    lines.append(
        f"| teacher, on the test documents as found, {result['raw_tokens']:,} tokens | "
        f"{result['raw_perplexity']:.2f} |"
    )
    if not result["usage"]:  # a dense teacher
        return "\n".join(lines)
    lines += ["", "| layer | usage: least, most | bits on the domain | bits on the token |"]
    lines.append("|---|---|---|---|")
    for layer, usage in enumerate(result["usage"]):
        domain, token = (result[f"{on}_information"][layer] for on in ("domain", "token"))
        lines.append(
            f"| {layer} | {min(usage):.3f}, {max(usage):.3f} | {domain:.3f} | {token:.2f} |"
        )
    return "\n".join(lines)
