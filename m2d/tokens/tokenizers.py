"""Whether two models share a tokenizer. Reads its files, and imports nothing heavy."""

from pathlib import Path
from typing import Any

from m2d.artifacts import read_json, sha256_of
from m2d.errors import UserError


def tokens_by_id(file: Path) -> dict[int, str]:
    """The tokens of a tokenizer.json. Raises UserError where it is none."""
    content = read_json(file)
    try:
        vocab = content["model"]["vocab"]
        if isinstance(vocab, dict):
            found = {int(place): str(token) for token, place in vocab.items()}
        else:  # of a unigram model: pieces with scores
            found = {place: str(token) for place, (token, _) in enumerate(vocab)}
        added: Any = content.get("added_tokens") or []
        return found | {int(token["id"]): str(token["content"]) for token in added}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file}: not a tokenizer of the tokenizers library") from None


def require_same_tokens(student: Path, teacher: Path) -> bool:
    """Raise a UserError where an id is one token for the student and another for the teacher.

    Only ids that both have are compared. False where their files do not tell.
    """
    for name in ("tokenizer.json", "tokenizer.model"):
        files = [folder / name for folder in (student, teacher)]
        if not all(file.is_file() for file in files):
            continue
        if sha256_of(files[0]) == sha256_of(files[1]):
            return True
        if name == "tokenizer.model":
            break
        own, other = map(tokens_by_id, files)
        odd = next((i for i in sorted(own.keys() & other.keys()) if own[i] != other[i]), None)
        if odd is None:
            return True
        raise UserError(
            f"{student}: token {odd} is {own[odd][:40]!r}, and {other[odd][:40]!r} in {teacher}; "
            "the two must share a tokenizer"
        )
    return False
