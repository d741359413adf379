"""llama.cpp's name for the way in which a byte-level BPE tokenizer splits text.

llama.cpp's converter knows a pre-tokenizer by the hash of what the whole tokenizer makes of one
text, so every new vocabulary is unknown to it, however common its splitting is. The splitting
itself stands in tokenizer.json. The patterns below are those of which llama.cpp's source
(src/llama-vocab.cpp) says that the name stands for them.
"""

from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN35 = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + SPACES
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
FIRST = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = (
    rf"{FIRST}{UPPER}*{LOWER}+|{FIRST}{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
)
GPT4O = (
    rf"{FIRST}{UPPER}*{LOWER}+{CONTRACTIONS}?|{FIRST}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Chinese, hiragana, katakana
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES,
)
# (patterns, one after the other; whether a piece that is a token is taken whole) -> name.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((GPT4O,), False): "gpt-4o",
    ((TEKKEN,), True): "tekken",
    (DEEPSEEK_V3, False): "deepseek-v3",
}


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the splitting of a tokenizer.json; None where it has none that is known.

    tokenizer: the parsed file.
    """
    model = tokenizer.get("model") or {}
    patterns = _patterns(tokenizer.get("pre_tokenizer"))
    if model.get("type") != "BPE" or patterns is None:
        return None
    return NAMES.get((tuple(patterns), bool(model.get("ignore_merges"))))


def _patterns(step: dict[str, Any] | None) -> list[str] | None:
    """The regular expressions by which a pre-tokenizer splits; None for one that does otherwise."""
    step = step or {}
    if step.get("type") == "Sequence":
        found: list[str] = []
        for part in step.get("pretokenizers", ()):
            patterns = _patterns(part)
            if patterns is None:
                return None
            found += patterns
        return found
    if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return [r"\p{N}"]
    if step.get("type") == "Split" and not step.get("invert"):
        pattern = (step.get("pattern") or {}).get("Regex")
        return [pattern] if pattern and step.get("behavior") == "Isolated" else None
    return None
