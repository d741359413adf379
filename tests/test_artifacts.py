"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from m2d.artifacts import atomic_path, read_json, require_absent, sha256_of, write_json
from m2d.errors import UserError


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    final = tmp_path / "new" / "file.txt"
    with atomic_path(final) as temporary:
        temporary.write_text("done")
        assert not final.exists()
        assert temporary.suffix == ".txt"
    assert final.read_text() == "done"
    assert list(final.parent.iterdir()) == [final]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    final = tmp_path / "file.txt"
    final.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(final) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_replaces_an_empty_one_but_no_other(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    final.mkdir()
    with atomic_path(final) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("1")
    assert (final / "a").read_text() == "1"
    with pytest.raises(OSError), atomic_path(final) as temporary:  # noqa: PT011 (any kind)
        temporary.mkdir()
        (temporary / "b").write_text("2")
    assert [file.name for file in final.iterdir()] == ["a"]


def test_json_is_the_same_bytes_for_the_same_value(tmp_path: Path) -> None:
    for name in "ab":
        write_json(tmp_path / name, {"z": [1, 2.5], "a": "é"})
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")
    assert read_json(tmp_path / "a") == {"z": [1, 2.5], "a": "é"}


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    for name, says in [("x.json", "not readable as JSON"), ("y.json", "no such file")]:
        with pytest.raises(UserError, match=rf"{name}: {says}"):
            read_json(tmp_path / name)


def test_require_absent(tmp_path: Path) -> None:
    require_absent(tmp_path / "new")
    require_absent(tmp_path)  # empty
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists already"):
            require_absent(taken)
