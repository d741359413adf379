"""Documents to token ids: special tokens, chat templates, and which tokens a loss counts.

Columns of an encoded document [n, 1 or 2]: the token id, and, where the loss is over assistants'
words alone, 1 for a token that the loss counts as a target and 0 for another.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from m2d.errors import UserError
from m2d.tokens.rows import Chat, Document, content_of

# auto: before every document, if the tokenizer itself puts one before a text. document: always so.
# sequence: before every sequence, however the documents are cut. none: nowhere.
BOS = ("auto", "document", "sequence", "none")
LOSS_ON = ("all", "assistant")

Encoded = npt.NDArray[np.int64]


def puts_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text of its own accord."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def bos_token(tokenizer: Any, bos: str) -> int:
    """The token that `bos` other than none asks for. Raises UserError where there is none."""
    if getattr(tokenizer, "bos_token_id", None) is None:
        raise UserError(f"--bos {bos}: the tokenizer has no beginning-of-sequence token")
    return int(tokenizer.bos_token_id)


class ChatRefused(UserError):
    """A chat that the template does not take."""


class Encoder:
    """Encodes documents, each closed by the end-of-sequence token; counts chats that are refused.

    A chat goes through the tokenizer's chat template, which places special tokens itself. With
    `loss_on` "assistant" a chat's targets are what its assistant says, with the token that ends
    its turn; every token of a plain text is one.
    """

    def __init__(
        self,
        tokenizer: Any,
        bos: str = "auto",
        loss_on: str = "all",
        vocab_size: int | None = None,
    ) -> None:
        """vocab_size: of the model that is to read the tokens, where it is known.

        Raises UserError where the tokenizer lacks what this needs.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
            )
        self.tokenizer, self.eos = tokenizer, int(tokenizer.eos_token_id)
        with_bos = bos == "document" or (bos == "auto" and puts_bos(tokenizer))
        self.start = [bos_token(tokenizer, bos)] if with_bos else []
        self.masked = loss_on == "assistant"
        if self.masked and not getattr(tokenizer, "is_fast", False):
            raise UserError("--loss-on assistant: needs a tokenizer with a tokenizer.json")
        self.vocab_size = vocab_size
        self.refused, self.reason = 0, ""

    def __call__(self, documents: Sequence[Document]) -> list[Encoded]:
        """One array for each document that is not refused.

        Raises UserError for ids that the model does not know.
        """
        kept, texts = [], []
        for document in documents:
            try:
                texts.append(document if isinstance(document, str) else self._rendered(document))
                kept.append(document)
            except ChatRefused as error:
                self.refused += 1
                self.reason = self.reason or str(error)
        if not texts:
            return []
        offsets = {"return_offsets_mapping": True} if self.masked else {}
        # verbose=False: a document longer than the model's context is no mistake here.
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False, **offsets)
        return [
            self._columns(document, texts[i], found["input_ids"][i], found, i)
            for i, document in enumerate(kept)
        ]

    def _rendered(self, chat: Chat) -> str:
        whole = render(self.tokenizer, chat)
        if self.masked:
            assistant_spans(self.tokenizer, chat, whole)
        return whole

    def _columns(
        self, document: Document, text: str, ids: Sequence[int], found: Any, place: int
    ) -> Encoded:
        chat = not isinstance(document, str)
        before = [] if chat else self.start
        # Most chat templates end with the token themselves, some with a line break after it.
        after = [] if chat and self.eos in ids[-2:] else [self.eos]
        columns = [[*before, *ids, *after]]
        if self.masked:
            counted = [1] * len(ids)
            if not isinstance(document, str):
                spans = assistant_spans(self.tokenizer, document, text)
                offsets = found["offset_mapping"][place]
                counted = counted_tokens(self.tokenizer, ids, offsets, spans)
            columns.append([0] * len(before) + counted + [int(not chat)] * len(after))
        if self.vocab_size is not None and (high := max(columns[0])) >= self.vocab_size:
            raise UserError(
                f"the tokenizer gives token id {high}, and the model's vocabulary has "
                f"{self.vocab_size} tokens; use the tokenizer that belongs to these weights"
            )
        return np.asarray(columns, np.int64).T


def render(tokenizer: Any, chat: Chat, **options: Any) -> str:
    """A chat as the tokenizer's template writes it. Raises UserError where there is none.

    Raises ChatRefused where the template does not take this chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the text is chats (lists of messages) and the tokenizer has no chat template; "
            "give plain text, or the tokenizer of a model that was made for chat"
        )
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
        rendered.encode()  # a template's half of a surrogate pair is no text
        return rendered
    except Exception as error:  # a template is a program of its own, and raises what it likes
        roles = ", ".join(str(message["role"]) for message in chat[:6])
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ChatRefused(f"the chat template refuses a chat of {roles} ({reason})") from None


def assistant_spans(tokenizer: Any, chat: Chat, whole: str) -> list[tuple[int, int]]:
    """Where, in the rendered chat, the assistant speaks: characters from its prompt on.

    Calls of tools are its words too. Turns whose `weight` is 0, as OpenAI's files have it, or whose
    `train` is false, as axolotl's have it, are none.

    Raises ChatRefused where the template does not write the conversation in order.
    """
    spans = []
    for i, message in enumerate(chat):
        calls = bool(message.get("tool_calls"))
        if message["role"] != "assistant" or not (calls or content_of(message).strip()):
            continue
        if message.get("weight") == 0 or message.get("train") is False:
            continue
        before = render(tokenizer, chat[:i], add_generation_prompt=True) if i else ""
        if not whole.startswith(before):
            before = render(tokenizer, chat[:i])
        if calls:
            end = turn_end(tokenizer, chat[: i + 1], before, whole)
            spans.append((len(before), end))
            continue
        # A template may drop what was thought in earlier turns.
        said = content_of(message).strip()
        candidates = (said, said.rpartition("</think>")[2].strip())
        place, text = next(
            ((p, c) for c in candidates if c and (p := whole.find(c, len(before))) >= 0), (-1, "")
        )
        if place < 0 or not whole.startswith(before):
            raise ChatRefused(
                "--loss-on assistant: the chat template changes what the assistant says, so that "
                "its words cannot be found"
            )
        spans.append((len(before) if i else place, place + len(text)))
    return spans


def turn_end(tokenizer: Any, chat: Chat, before: str, whole: str) -> int:
    """Where the last turn of the chat ends in the rendered whole, before the token that says so.

    Raises ChatRefused where the template does not write the conversation in order.
    """
    until = render(tokenizer, chat).rstrip()
    for token in sorted(special_tokens(tokenizer), key=len, reverse=True):
        if token and until.endswith(token):
            until = until.removesuffix(token)
            break
    if not (whole.startswith(until) and until.startswith(before) and len(until) > len(before)):
        raise ChatRefused(
            "--loss-on assistant: the chat template writes a turn with calls of tools differently "
            "in a longer chat, so that it cannot be found"
        )
    return len(until)


def special_tokens(tokenizer: Any) -> set[str]:
    """The tokens that are no text."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    return {*tokenizer.all_special_tokens, *added}


def counted_tokens(
    tokenizer: Any,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
) -> list[int]:
    """1 for the tokens within the spans and the special token right after each, else 0."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    counted = [0] * len(ids)
    for begin, end in spans:
        inside = [i for i, (low, high) in enumerate(offsets) if low < end and high > begin]
        if inside:
            last = inside[-1] + 1
            if last < len(ids) and ids[last] in special:
                inside.append(last)
            for i in inside:
                counted[i] = 1
    return counted
