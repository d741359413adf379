"""Whether a GGUF file is the student: the same tokens, and the same perplexity, under llama.cpp."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2d.errors import UserError
from m2d.export.engine import Engine, serving
from m2d.progress import progress

# By how much a file's perplexity may differ from its student's. Q8_0 is within 0.2 %; a tensor in
# the wrong place, or a rope that is read otherwise, is out by more than this.
TOLERANCE = 0.02
# Of the documents; llama.cpp's splitting of rare characters differs from some tokenizers'.
DOCUMENTS_DIFFERENT = 0.02


@dataclass(frozen=True)
class Check:
    """What was found, on the same tokens."""

    perplexity_student: float
    perplexity_gguf: float
    n_tokens: int  # predicted tokens
    documents: int
    documents_different: int  # that llama.cpp splits into other tokens than the student's tokenizer

    @property
    def change(self) -> float:
        """Of the perplexity, relative."""
        return self.perplexity_gguf / self.perplexity_student - 1

    def text(self) -> str:
        """One line."""
        same = self.documents - self.documents_different
        return (
            f"perplexity {self.perplexity_gguf:.4f} in llama.cpp, {self.perplexity_student:.4f} of "
            f"the student ({self.change:+.2%}) over {self.n_tokens} tokens; {same} of "
            f"{self.documents} documents tokenized alike"
        )


def check_gguf(
    file: Path, tokenizer: Any, documents: Sequence[str], tokens: Any, student: float, threads: int
) -> Check:
    """Compare a GGUF file with its student on tokens [S, T], of perplexity `student`.

    documents: texts that both tokenize.
    Raises UserError where the file is not the student.
    """
    length = tokens.shape[1]
    with serving(file, length + 1, threads) as engine:
        different = [text for text in documents if engine.tokenize(text) != ids_of(tokenizer, text)]
        safe = ids_of(tokenizer, "a")[0]
        rows = progress(tokens.tolist(), "llama.cpp, sequences")
        nll = sum(nll_of(engine, row, safe, len(tokenizer)) for row in rows)
    count = tokens.shape[0] * (length - 1)
    found = Check(student, math.exp(nll / count), count, len(documents), len(different))
    if len(different) > DOCUMENTS_DIFFERENT * len(documents):
        raise UserError(
            f"llama.cpp tokenizes {len(different)} of {len(documents)} documents otherwise, the "
            f"first: {different[0][:40]!r}; give --pre NAME for another pre-tokenizer"
        )
    if not abs(found.change) <= TOLERANCE:
        raise UserError(f"not the student: {found.text()}; more than {TOLERANCE:.0%} apart")
    return found


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without those that a prompt begins or ends with."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def nll_of(engine: Engine, row: list[int], safe: int, vocabulary: int) -> float:
    """Summed negative log-likelihood (nats) of tokens 1.. of a sequence under llama.cpp."""
    total = 0.0
    for place in range(1, len(row)):
        found = engine.log_probability(row[:place], row[place])
        if found is None:
            found = engine.top(row[:place], vocabulary, safe).get(row[place], -math.inf)
        total -= found
    return total
