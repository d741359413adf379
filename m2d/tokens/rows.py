"""Rows to documents: which column holds the text, what counts as a document, what is skipped.

A document is a text or a chat, a list of messages with `role` and `content`. Imports nothing heavy.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from m2d.errors import UserError
from m2d.progress import say

Chat = list[dict[str, Any]]
Document = str | Chat

# Where none is named, the first of these that holds text; else the only one that does.
COLUMNS = ("text", "content", "messages", "conversations", "document", "raw_content", "article")
# Those that hold chats, as lists or as JSON in a string.
CHATS = ("messages", "conversations")
# How ShareGPT's conversations name what chat templates call role.
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant"}
# Rows that are looked at to find the column.
PEEK = 100
MISSING = object()


def column_of(head: Sequence[Any], column: str | None, place: str) -> str | None:
    """The column that holds the text, of a file that begins with these rows; None: rows are texts.

    Raises UserError where it is not there, or is not clear without a name.
    """
    rows = [row for row in head if isinstance(row, Mapping)]
    if not rows and column is None:
        return None
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    if column is not None:
        if column not in names:
            raise UserError(f"{place}: has no column {column!r}; {_listed(names, rows)}")
        return column
    full = [name for name in names if any(holds_text(row.get(name)) for row in rows)]
    for name in COLUMNS:
        if name in full:
            return name
    if len(full) == 1:
        return full[0]
    which = "no column holds text" if not full else "which column holds the text is not clear"
    raise UserError(f"{place}: {which}; {_listed(full or names, rows)}; name one with --column")


def holds_text(value: Any) -> bool:
    """Whether a value is a text that is not empty, or a chat."""
    return (isinstance(value, str) and bool(value)) or chat_of(value) is not None


def _listed(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The columns' names, with the type of a value of each."""
    kinds = {name: type(row[name]).__name__ for row in reversed(rows) for name in row}
    some = ", ".join(f"{name[:40]} ({kinds[name]})" for name in names[:8])
    more = ", ..." if len(names) > 8 else ""
    return f"its columns are {some}{more}" if names else "it has no columns"


def values_of(rows: Iterable[Any], column: str | None) -> Iterator[Any]:
    """The value of the column in every row; MISSING where a row has none."""
    for row in rows:
        if column is None:
            yield row
        else:
            found = row.get(column, MISSING) if isinstance(row, Mapping) else MISSING
            yield _unwrapped(found) if column in CHATS else found


def _unwrapped(value: Any) -> Any:
    """The chat that a string holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(value)
            return value if chat_of(found) is None else found
    return value


def documents_of(values: Iterable[Any], place: str) -> Iterator[Document]:
    """The documents among the values of a column; what is none is counted, and said at the end.

    Raises UserError where all the values were read and none is a document.
    """
    read, skipped = 0, Counter[str]()
    try:
        for value in values:
            document: Any = chat_of(value) if isinstance(value, list) else value
            reason = _why_skipped(value, document)
            if reason:
                skipped[reason] += 1
            else:
                read += 1
                yield document
        if not read:
            raise UserError(
                f"{place}: holds no text" + (f" ({_counts(skipped)})" if skipped else "")
            )
    finally:
        if read and skipped:
            total = read + skipped.total()
            say(f"{place}: skipped {skipped.total()} of {total} rows ({_counts(skipped)})")


def _counts(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())


def _why_skipped(value: Any, document: Any) -> str | None:
    """Why a value is no document, in a word or two; None where it is one."""
    if value is MISSING:
        return "without the column"
    if value is None:
        return "null"
    if document is None:
        return "not a list of messages"
    if not isinstance(document, str | list):
        return f"not text but {type(value).__name__}"
    text = text_of(document)
    if not text.strip():
        return "empty"
    if text.count("\0") > len(text) // 4:
        return "of NUL characters, as UTF-16 has them without its byte order mark"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "with half a surrogate pair"
    return None


def chat_of(value: Any) -> Chat | None:
    """A list of messages, with the keys that chat templates expect; None where it is not one."""
    if not isinstance(value, list) or not value:
        return None
    chat = []
    for message in value:
        if not isinstance(message, Mapping):
            return None
        role, content = message.get("role"), message.get("content")
        if role is None and content is None:
            content = message.get("value")
            role = ROLES.get(str(message.get("from")), message.get("from"))
        if not isinstance(role, str) or not isinstance(content, str | list | None):
            return None
        rest = {k: v for k, v in message.items() if k not in ("from", "value") and v is not None}
        # Templates write a null, which a call of a tool has, as "None".
        chat.append({**rest, "role": role, "content": "" if content is None else content})
    return chat


def text_of(document: Document) -> str:
    """All the text of a document, without the template of a chat."""
    if isinstance(document, str):
        return document
    return "\n".join(content_of(message) for message in document)


def content_of(message: Mapping[str, Any]) -> str:
    """A message's text; of a content in parts, that of its text parts."""
    content = message["content"]
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return content or ""
