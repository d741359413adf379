"""The one reader of text: what people have, what is skipped, what is refused, and in few words."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2d.errors import UserError
from m2d.tokens.text import files_in, read_documents, text_files

TEXTS = [f"text {i} é" for i in range(40)]
ROWS = [json.dumps({"text": text}) for text in TEXTS]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def lines(*rows: str) -> bytes:
    return "\n".join(rows).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


READ: dict[str, tuple[str, bytes]] = {
    "plain": ("a.jsonl", lines(*ROWS)),
    "upper case": ("A.JSONL", lines(*ROWS)),
    "mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(*ROWS)),
    "UTF-16": ("a.jsonl", lines(*ROWS).decode().encode("utf-16")),
    "UTF-32": ("a.jsonl", lines(*ROWS).decode().encode("utf-32")),
    "UTF-32, big end first": ("a.jsonl", b"\0\0\xfe\xff" + "\n".join(ROWS).encode("utf-32-be")),
    "Windows": ("a.jsonl", "\r\n".join(ROWS).encode()),
    "blank lines": ("a.jsonl", lines("", *ROWS, "", " ", "")),
    "escaped": ("a.jsonl", lines(*(json.dumps({"text": t}, ensure_ascii=False) for t in TEXTS))),
    "gz": (
        "a.jsonl.gz",
        gzip.compress(lines(*ROWS[:20])) + gzip.compress(b"\n" + lines(*ROWS[20:])),
    ),
    "zst": ("a.jsonl.zst", zstd(lines(*ROWS[:20])) + zstd(b"\n" + lines(*ROWS[20:]))),
    "array": ("a.json", b"[" + ",".join(ROWS).encode() + b"]"),
    "array of texts": ("a.json", json.dumps(TEXTS).encode()),
    "object with rows": ("a.json", b'{"version": "1", "data": [' + ",".join(ROWS).encode() + b"]}"),
    "lines called json": ("a.json", lines(*ROWS)),
    "packed json": ("a.json.zst", zstd(b"[" + ",".join(ROWS).encode() + b"]")),
    "texts a line": ("a.jsonl", lines(*map(json.dumps, TEXTS))),
    "content": ("a.jsonl", lines(*(json.dumps({"id": 1, "content": t}) for t in TEXTS))),
    "only text column": ("a.jsonl", lines(*(json.dumps({"n": 1, "prose": t}) for t in TEXTS))),
}


@pytest.mark.parametrize("case", READ)
def test_what_people_have_is_read(case: str, tmp_path: Path) -> None:
    name, content = READ[case]
    (tmp_path / name).write_bytes(content)
    assert list(read_documents([tmp_path / name])) == TEXTS


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"three"))
    found = read_documents([tmp_path / "a.txt", tmp_path / "b.md.gz"])
    assert list(found) == ["one\ntwo\n", "three"]


PARQUET: dict[str, Callable[[], dict[str, Any]]] = {
    "text": lambda: {"text": TEXTS},
    "dictionary": lambda: {"text": pa.array(TEXTS, pa.large_string()).dictionary_encode()},
    "bytes": lambda: {"text": pa.array([t.encode() for t in TEXTS], pa.binary())},
    "content": lambda: {"n": list(range(40)), "content": TEXTS},
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet(case: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(PARQUET[case]()), tmp_path / "a.parquet", row_group_size=7)
    assert list(read_documents([tmp_path / "a.parquet"])) == TEXTS


def test_a_named_column_is_the_text(tmp_path: Path) -> None:
    both = [json.dumps({"text": "no", "answer": t}) for t in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(lines(*both))
    assert list(read_documents([tmp_path / "a.jsonl"], "answer")) == TEXTS
    with pytest.raises(UserError, match=r"no column 'x'; its columns are text \(str\), answer"):
        list(read_documents([tmp_path / "a.jsonl"], "x"))


def test_chats(tmp_path: Path) -> None:
    """Messages by role and content, ShareGPT's, structs of Parquet, JSON in a string."""
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    (tmp_path / "a.jsonl").write_bytes(lines(json.dumps({"messages": CHAT})))
    (tmp_path / "b.jsonl").write_bytes(lines(json.dumps({"conversations": shared})))
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_bytes(lines(json.dumps({"messages": json.dumps(CHAT)})))
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.parquet", "d.jsonl")]
    assert list(read_documents(files)) == [CHAT] * 4


def test_what_is_skipped_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    odd = ['{"text": null}', '{"text": 7}', '{"content": "x"}', '{"text": ""}', '{"text": " "}']
    odd += ['{"text": "a \\udceb b"}', '{"text": []}', '{"text": [{"role": 1}]}', "[1]"]
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*ROWS[:20], *odd, *ROWS[20:]))
    assert list(read_documents([file])) == TEXTS
    assert capsys.readouterr().err == (
        f"{file}: skipped 9 of 49 rows (2 without the column, 2 empty, 2 not a list of messages, "
        "1 null, 1 not text but int, 1 with half a surrogate pair)\n"
    )


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "Latin-1": ("a.txt", b"caf\xe9 " * 4_000_000, "byte 0xe9 is not UTF-8"),
    "Latin-1 line": ("a.jsonl", lines(*ROWS) + b'\n{"text": "\xe9"}', "not UTF-8"),
    "UTF-16 without a mark": ("a.txt", "plain words".encode("utf-16-le"), "1 of NUL characters"),
    "no JSON": ("a.jsonl", lines(*ROWS, "{" + "x" * 10**6), "line 41 is not JSON"),
    "empty": ("a.txt", b"", "holds no text (1 empty)"),
    "no rows": ("a.jsonl", b"\n\n", "holds no text"),
    "all null": ("a.jsonl", lines(*['{"text": null}'] * 3), "no column holds text"),
    "unclear": ("a.jsonl", b'{"a": "x", "b": "y"}', "not clear; its columns are a (str), b (str)"),
    "deep": ("a.jsonl", b"[" * 10**6, "line 1 is not JSON"),
    "deep json": ("a.json", b"[" * 10**6, "no text can be read"),
    "number": ("a.json", b"7", "an array of rows is expected, not int"),
    "cut gz": ("a.jsonl.gz", gzip.compress(lines(*ROWS))[:-20], "no text can be read"),
    "broken gz": ("a.txt.gz", gzip.compress(b"text")[:10] + b"\xff" * 9, "no text can be read"),
    "no zst": ("a.txt.zst", b"text", "no text can be read"),
    "no Parquet": ("a.parquet", b"PAR1" * 9, "not a readable Parquet file"),
    "empty Parquet": ("a.parquet", b"", "not a readable Parquet file"),
    "kind": ("a.pdf", b"%PDF", "unknown kind of text file"),
    "huge number": ("a.jsonl", b'{"text": ' + b"1" * 10**5 + b"}", "line 1 is not JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_few_words(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_documents([tmp_path / name]))
    said = str(caught.value)
    assert said.startswith(str(tmp_path / name))
    assert message in said
    assert len(said) < 500 + len(str(tmp_path))
    assert "\n" not in said


def test_structs_are_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [{"value": t} for t in TEXTS]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column holds text; its columns are text \(dict\)"):
        list(read_documents([tmp_path / "a.parquet"]))


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="not a regular file"):
        list(text_files([tmp_path / "a.txt"]))
    with pytest.raises(UserError, match="no text file in this folder"):
        list(read_documents([tmp_path]))


def test_a_folder_is_its_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No README.md, nothing hidden, no checkpoints, no other splits; what is left out is said."""
    text = ["data/train-0.jsonl", "data/train-1.jsonl.gz", "more/notes.md", "strain.txt"]
    others = ["README.md", "LICENSE.txt", ".cache/a.txt", ".ipynb_checkpoints/a.txt", ".a.txt"]
    others += ["checkpoint-10/a.txt", "dataset_infos.json", "config.json", "vocab.txt"]
    splits = ["data/test-0.jsonl", "data/test-1.jsonl", "validation/a.txt"]
    for name in (*text, *others, *splits, "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert files_in(tmp_path) == ([tmp_path / name for name in text], {"test": 2, "validation": 1})
    assert [*text_files([tmp_path / "validation"])] == [tmp_path / "validation" / "a.txt"]
    list(read_documents([tmp_path]))
    said = capsys.readouterr().err
    assert f"{tmp_path}: 4 text files; left out 2 of test, 1 of validation\n" == said
    for name in text:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="holds the splits test, validation; name one's files"):
        files_in(tmp_path)
