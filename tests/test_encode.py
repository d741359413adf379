"""Documents to ids: where special tokens stand, chats through the template, what a loss counts."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from m2d.cli import main
from m2d.errors import UserError
from m2d.tokens.dataset import PackedTokens
from m2d.tokens.files import open_tokens, read_tokens
from m2d.tokens.packed import pack_tokens, packed_batches, write_packed
from m2d.tokens.rows import chat_of
from m2d.tokens.tokenize import load_tokenizer
from tests.conftest import make_tokenizer

# As Qwen's, with <|endoftext|> in the place of <|im_end|>; thinking of earlier turns is dropped.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "a mixture"},
    {"role": "assistant", "content": "<think>hm</think>of experts"},
    {"role": "user", "content": "of experts"},
    {"role": "assistant", "content": "<think>ah</think>wins"},
]


def chat_tokenizer(bos: bool = False) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


def first_batch(documents: list[Any], tokenizer: Any, length: int, **options: Any) -> np.ndarray:
    return next(iter(packed_batches(documents, tokenizer, length, **options)))[0]


def test_a_chat_goes_through_the_template() -> None:
    tokenizer = chat_tokenizer()
    expected = (
        "<|user|>a mixture<|endoftext|>\n<|assistant|>of experts<|endoftext|>\n"
        "<|user|>of experts<|endoftext|>\n<|assistant|><think>ah</think>wins<|endoftext|>\n"
    )
    ids = tokenizer(expected)["input_ids"]
    found = first_batch([CHAT], tokenizer, len(ids))
    assert found[0, :, 0].tolist() == ids  # and no second end token after the template's own


def test_the_loss_is_on_what_assistants_say() -> None:
    """By hand: their words and the end of their turn, not the role, nor the user's same words."""
    tokenizer = chat_tokenizer()
    text = "the router"
    length = len(tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False))["input_ids"])
    length += len(tokenizer(text)["input_ids"]) + 1
    (row,) = first_batch([CHAT, text], tokenizer, length, loss_on="assistant")
    counted = row[row[:, 1] == 1, 0]
    assert tokenizer.decode(counted) == (
        "of experts<|endoftext|><think>ah</think>wins<|endoftext|>the router<|endoftext|>"
    )


def counted_text(chat: list[dict[str, Any]], template: str) -> tuple[str, str]:
    """A chat as it is tokenized, and of it what the loss counts."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    found = chat_of(chat)
    assert found is not None
    length = len(tokenizer(tokenizer.apply_chat_template(found, tokenize=False))["input_ids"])
    (row,) = first_batch([found], tokenizer, length, loss_on="assistant")
    return tokenizer.decode(row[:, 0]), tokenizer.decode(row[row[:, 1] == 1, 0])


CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "[{{ call.function.name }}]{% endfor %}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_calls_of_tools_are_what_an_assistant_says() -> None:
    call = {"type": "function", "function": {"name": "router", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "a mixture"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "expert"},
        {"role": "assistant", "content": "of experts", "tool_calls": None},
    ]
    whole, counted = counted_text(chat, CALLS)
    assert "None" not in whole
    assert counted == "[router]<|endoftext|>of experts<|endoftext|>"
    chat[1]["content"] = "the"
    assert counted_text(chat, CALLS)[1] == "the[router]<|endoftext|>of experts<|endoftext|>"


def test_turns_that_are_not_to_be_learnt_are_not_counted() -> None:
    chat = [
        {"role": "assistant", "content": "the router"},
        {"role": "user", "content": "a mixture"},
        {"role": "assistant", "content": "expert", "weight": 0},
        {"role": "user", "content": "of experts"},
        {"role": "assistant", "content": "expert", "train": False},
        {"role": "user", "content": "of experts"},
        {"role": "assistant", "content": "wins", "weight": 1, "train": True},
    ]
    # Of the first turn, which no prompt precedes, neither the role.
    expected = "the router<|endoftext|>wins<|endoftext|>"
    assert counted_text(chat, CALLS)[1] == expected


def test_chats_that_a_template_refuses_are_counted(capsys: pytest.CaptureFixture) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    tools = [{"role": "tool", "content": "x"}]
    pack_tokens([CHAT, tools, CHAT] * 9, tokenizer, 8, None)
    assert "skipped 9 of 27 documents: the chat template refuses a chat of tool (no tools" in (
        capsys.readouterr().err
    )
    with pytest.raises(UserError, match="none of the chats is usable: the chat template refuses"):
        pack_tokens([tools], tokenizer, 8, None)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        pack_tokens([CHAT], tokenizer, 8, None)


def test_where_the_beginning_of_sequence_stands() -> None:
    """auto: as the tokenizer itself; a chat's template alone says for a chat."""
    texts, plain, adds = ["one", "two two"], make_tokenizer(), chat_tokenizer(bos=True)
    own = [[*plain(t)["input_ids"], plain.eos_token_id] for t in texts]
    bos = adds.bos_token_id
    each = [[bos, *ids] for ids in own]

    def packed(tokenizer: Any, length: int, **options: str) -> list:
        return pack_tokens(texts, tokenizer, length, 1, **options)[0].tolist()

    length = sum(map(len, own))
    assert packed(plain, length) == [*itertools.chain(*own)]
    assert (
        packed(adds, length + 2)
        == [*itertools.chain(*each)]
        == packed(adds, length + 2, bos="document")
    )
    assert packed(adds, length, bos="none") == [*itertools.chain(*own)]
    assert packed(adds, length + 1, bos="sequence") == [bos, *[*itertools.chain(*own)]]
    two = pack_tokens(["one"] * 99, adds, 7, 3, bos="sequence")
    assert two[:, 0].tolist() == [bos] * 3
    assert bos not in two[:, 1:]
    with pytest.raises(UserError, match="--bos sequence: the tokenizer has no beginning"):
        packed(plain, 4, bos="sequence")
    assert bos not in first_batch([CHAT] * 9, adds, 40)


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama", "gemma", "bert", "t5"])
def test_a_folder_without_a_tokenizer_is_said_to_have_none(kind: str, tmp_path: Path) -> None:
    # For some of these transformers makes one up, which finds nothing in a text, or unknown tokens.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match="has no tokenizer; fetch the model's own"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    make_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)("a mixture")["input_ids"]) > 1


def test_ids_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    high = max(make_tokenizer()("router")["input_ids"])
    assert pack_tokens(["router"] * 9, make_tokenizer(), 4, 1, vocab_size=high + 1).shape == (1, 4)
    with pytest.raises(UserError, match=f"gives token id {high}, and the model's vocabulary has"):
        pack_tokens(["router"] * 9, make_tokenizer(), 4, 1, vocab_size=high)


def test_the_mask_is_carried_in_the_file(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    documents = [CHAT, "the router wins"] * 40
    write_packed(tmp_path / "t", documents, tokenizer, 32, None, {}, loss_on="assistant")
    rows = first_batch(documents, tokenizer, 32, loss_on="assistant")
    stored = load_file(tmp_path / "t")
    assert torch.equal(stored["input_ids"], torch.from_numpy(rows[..., 0]))
    assert torch.equal(stored["loss_mask"].long(), torch.from_numpy(rows[..., 1]))
    data = PackedTokens(tmp_path / "t", seed=1)
    item = data[3]
    row = rows[int(item["row"]), :, 1]
    assert item["counted"].tolist() == [*row[1:].astype(bool).tolist(), False]
    assert data.counted_in(range(5)) == sum(int(data[i]["counted"].sum()) for i in range(5)) > 0


def test_a_killed_run_goes_on_with_its_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2d.tokens.packed.SECONDS_BETWEEN_POSITIONS", 0.0)
    monkeypatch.setattr("m2d.tokens.packed.DOCUMENTS_AT_ONCE", 3)
    documents = [CHAT, "the router wins", "a token"] * 30

    def write(name: str, source: Any) -> None:
        write_packed(tmp_path / name, source, chat_tokenizer(), 16, None, {}, loss_on="assistant")

    def killed() -> Any:
        yield from documents[:50]
        raise KeyboardInterrupt

    write("whole", documents)
    work = tmp_path / ".cut.packing"
    for damage in (None, "cut", "loss_mask", "position.json"):
        with pytest.raises(KeyboardInterrupt):
            write("cut", killed())
        if damage:  # emptied by hand: begun anew, not filled with zeros
            (work / damage).write_bytes(b"")
        write("cut", documents)
        assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_planted_links_are_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".t.packing").mkdir()
    (tmp_path / ".t.packing" / "t").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        write_packed(tmp_path / "t", ["abc"] * 99, make_tokenizer(), 8, None, {})
    (tmp_path / ".u.packing").symlink_to(tmp_path)
    with pytest.raises(UserError, match="in the way of a work folder"):
        write_packed(tmp_path / "u", ["abc"] * 99, make_tokenizer(), 8, None, {})
    assert precious.read_text() == "mine"


IDS = torch.arange(12).view(2, 6)
BAD: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "float": ({"input_ids": IDS.float()}, "input_ids is F32"),
    "bytes": ({"input_ids": IDS.to(torch.uint8)}, "input_ids is U8"),
    "bool": ({"input_ids": IDS.bool()}, "input_ids is BOOL"),
    "half": ({"input_ids": IDS.to(torch.bfloat16)}, "input_ids is BF16"),
    "float8": ({"input_ids": IDS.to(torch.float8_e4m3fn)}, "input_ids is F8_E4M3"),
    "complex": ({"input_ids": IDS.to(torch.complex64)}, "input_ids is C64"),
    "flat": ({"input_ids": IDS.flatten()}, r"input_ids is I64 \[12\]"),
    "empty": ({"input_ids": IDS[:0]}, r"input_ids is I64 \[0, 6\]"),
    "short": ({"input_ids": IDS[:, :1].contiguous()}, r"I64 \[2, 1\]"),
    "no ids": ({"ids": IDS}, "has no tensor 'input_ids'"),
    "negative": ({"input_ids": IDS - 1}, "token id -1 is outside"),
    "large": ({"input_ids": IDS * 9}, "token id 99 is outside the model's vocabulary of 90"),
    "ignored id": ({"input_ids": torch.where(IDS == 3, -100, IDS)}, "token id -100 is outside"),
    "mask of floats": ({"input_ids": IDS, "loss_mask": IDS.float()}, r"loss_mask is F32"),
    "mask of twos": ({"input_ids": IDS, "loss_mask": IDS}, "numbers other than 0 and 1"),
    "mask's shape": ({"input_ids": IDS, "loss_mask": IDS[:1].contiguous()}, r"\[2, 6\] are exp"),
    "shifted": ({"input_ids": IDS, "labels": IDS.roll(-1, 1)}, "labels must be as input_ids"),
    "left": (
        {"input_ids": IDS, "attention_mask": (IDS > 3).long()},
        "padding must stand at the end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_token_file_is_refused(case: str, tmp_path: Path) -> None:
    tensors, message = BAD[case]
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "t")
    with pytest.raises(UserError, match=message):
        read_tokens(tmp_path / "t", 90)
    with pytest.raises(UserError, match=message):
        PackedTokens(tmp_path / "t", 0).check_vocabulary(90)


def test_masks_of_others_are_respected(tmp_path: Path) -> None:
    labels = torch.where(IDS % 2 == 0, IDS, -100)
    padding = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    save_file({"input_ids": IDS, "labels": labels, "attention_mask": padding}, tmp_path / "t")
    data = PackedTokens(tmp_path / "t", 0)
    found = {int(data[i]["row"]): data[i]["counted"].int().tolist() for i in range(2)}
    assert found == {0: [0, 1, 0, 1, 0, 0], 1: [0, 1, 0, 0, 0, 0]}
    assert data.counted_in(range(2)) == 3
    with pytest.raises(UserError, match="is padded"):
        read_tokens(tmp_path / "t")
    assert open_tokens(tmp_path / "t").masks == ("labels", "attention_mask")
    save_file({"input_ids": IDS, "position_ids": IDS.clone()}, tmp_path / "t")
    with pytest.raises(UserError, match="has 'position_ids', which m2d would not heed"):
        open_tokens(tmp_path / "t")


def test_tokenize_takes_the_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    chat_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"c": CHAT, "n": 1})] * 50))
    words = ["tokenize", tmp_path / "model", tmp_path / "t", "--text", tmp_path / "chats.jsonl"]
    words += ["--sequences", 4, "--length", 16, "--column", "c", "--bos", "sequence"]
    assert main([*map(str, words), "--loss-on", "assistant"]) == 0
    found = load_file(tmp_path / "t")
    assert found["loss_mask"].shape == (4, 16)
    assert len(set(found["input_ids"][:, 0].tolist())) == 1
    with safe_open(tmp_path / "t", "pt") as file:
        assert file.metadata()["source"] == "chats.jsonl"
