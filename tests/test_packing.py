"""Documents packed into sequences of tokens, of one source or several."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from m2d.cli import main
from m2d.errors import UserError
from m2d.tokens import packed as data
from m2d.tokens.packed import mixture, pack_tokens, write_packed


class Letters:
    """A tokenizer of characters."""

    eos_token_id: int | None = 0

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_packing_has_no_padding_and_closes_documents() -> None:
    def documents(read: list[int]):
        for number in range(1000):
            read.append(number)
            yield "ab"

    read: list[int] = []
    packed = pack_tokens(documents(read), Letters(), 4, 2)
    assert packed.tolist() == [[97, 98, 0, 97], [98, 0, 97, 98]]
    assert len(read) < 1000  # no more than needed
    assert pack_tokens(documents([]), Letters(), 7, None).shape == (3000 // 7, 7)
    with pytest.raises(UserError, match="fills 428 sequences of 7 tokens, not 500"):
        pack_tokens(documents([]), Letters(), 7, 500)
    endless = Letters()
    endless.eos_token_id = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        pack_tokens(documents([]), endless, 7, None)


def test_packing_to_disk_is_packing_in_memory(tmp_path: Path) -> None:
    texts = ["abc", "de", "", "fghijk"] * 50
    file = tmp_path / "tokens.safetensors"
    assert write_packed(file, texts, Letters(), 7, None, {"source": "letters"}) == 107
    assert torch.equal(load_file(file)["input_ids"], pack_tokens(texts, Letters(), 7, None))
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"source": "letters", "sequences": "107", "length": "7"}
    assert write_packed(tmp_path / "few", texts, Letters(), 7, 3, {}) == 3
    with pytest.raises(UserError, match="fills 107 sequences of 7 tokens, not 200"):
        write_packed(tmp_path / "many", texts, Letters(), 7, 200, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "tokens.safetensors"]


def test_packing_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file as without a kill, no document tokenized twice; other arguments start anew."""
    monkeypatch.setattr(data, "SECONDS_BETWEEN_POSITIONS", 0.0)
    monkeypatch.setattr(data, "DOCUMENTS_AT_ONCE", 4)
    texts = [f"{number} " * (number % 7) for number in range(100)]
    whole, file = tmp_path / "whole", tmp_path / "tokens"
    write_packed(whole, texts, Letters(), 7, None, {})
    seen: list[str] = []

    class Watched(Letters):
        def __call__(self, batch: list[str], **_: object) -> dict[str, list[list[int]]]:
            seen.extend(batch)
            return super().__call__(batch)

    def killed(at: int) -> Iterator[str]:
        yield from texts[:at]
        raise KeyboardInterrupt

    for at in (30, 62):
        with pytest.raises(KeyboardInterrupt):
            write_packed(file, killed(at), Watched(), 7, None, {}, ("a", 1))
        assert not file.exists()
    write_packed(file, texts, Watched(), 7, None, {}, ("a", 1))
    assert file.read_bytes() == whole.read_bytes()
    assert seen == texts
    file.unlink()
    # One with other arguments in between, killed before it has a position: nothing of it is taken.
    with pytest.raises(KeyboardInterrupt):
        write_packed(file, killed(30), Letters(), 7, None, {}, ("a", 1))
    with pytest.raises(KeyboardInterrupt):
        write_packed(file, killed(2), Letters(), 5, None, {}, ("b", 1))
    write_packed(file, texts, Letters(), 7, None, {}, ("a", 1))
    assert file.read_bytes() == whole.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_packed(file, killed(30), Letters(), 7, None, {}, ("a", 1))
    write_packed(file, texts[50:], Letters(), 7, None, {}, ("b", 1))
    assert torch.equal(load_file(file)["input_ids"], pack_tokens(texts[50:], Letters(), 7, None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "whole"]


def test_mixtures_hold_their_shares_from_the_beginning() -> None:
    long, short = ("a" * 30 for _ in range(1000)), ("b" * 10 for _ in range(300))
    mixed = list(mixture([(long, 3), (short, 1)]))
    for end in (40, 200, len(mixed)):
        share = sum(len(text) for text in mixed[:end] if text[0] == "a")
        assert abs(share / sum(map(len, mixed[:end])) - 0.75) < 0.02
    assert sum(text[0] == "b" for text in mixed) == 300  # the end of the first that ends
    with pytest.raises(UserError, match="weights of a mixture must be above 0"):
        next(mixture([([], 0)]))


def test_calibrate_mixes_sources(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A file and a folder, 3 : 1, as the functions have it; a file alone as in memory."""
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "folder").mkdir()
    texts = {name: [f"{name} {i} " * 9 for i in range(300)] for name in ("one", "two", "three")}
    lines = {name: [json.dumps({"text": text}) for text in found] for name, found in texts.items()}
    one = tmp_path / "one.jsonl"
    one.write_text("\n".join(lines["one"]))
    (tmp_path / "folder" / "b.jsonl").write_text("\n".join(lines["three"]))
    (tmp_path / "folder" / "a.jsonl").write_text("\n".join(lines["two"]))
    command = ["tokenize", str(tmp_path / "teacher"), "OUT", "--sequences", "50", "--length", "32"]

    def ids_of(*source: str) -> torch.Tensor:
        out = tmp_path / "tokens.safetensors"
        assert main([*(str(out) if word == "OUT" else word for word in command), *source]) == 0
        return load_file(out)["input_ids"]

    tokenizer = make_tokenizer()
    alone = ids_of("--text", str(one))
    assert torch.equal(alone, pack_tokens(texts["one"], tokenizer, 32, 50))
    both = ids_of("--mix", "3", str(one), "--mix", "1", str(tmp_path / "folder"))
    parts = [(texts["one"], 3.0), (texts["two"] + texts["three"], 1.0)]
    assert torch.equal(both, pack_tokens(mixture(parts), tokenizer, 32, 50))
    assert not torch.equal(both, alone)
    with safe_open(tmp_path / "tokens.safetensors", "np") as file:
        assert file.metadata()["source"] == f"3 {one} + 1 {tmp_path / 'folder'}"
    before = (tmp_path / "tokens.safetensors").read_bytes()
    for weight, source, message in (
        ("0", str(one), "the weight must be a number above 0"),
        ("much", str(one), "the weight must be a number above 0"),
        ("1", str(tmp_path / "missing.txt"), "no such file"),
        ("1", str(tmp_path / "teacher"), "no text file in this folder"),
        ("1", str(one), "not 5000; give more text"),
    ):
        words = [str(tmp_path / "tokens.safetensors") if w == "OUT" else w for w in command]
        words[words.index("50")] = "5000"
        capsys.readouterr()
        assert main([*words, "--mix", weight, source]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "tokens.safetensors").read_bytes() == before
