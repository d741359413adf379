"""`m2d verify`, and what it knows of a result."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bound import DISTILL, Run, chosen, flip, run
from safetensors.torch import load_file

from m2d.artifacts import read_json, sha256_of
from m2d.errors import UserError
from m2d.models.fingerprint import fingerprint
from m2d.pipeline.best import best_configuration
from m2d.report.results import read_grid
from m2d.statistics.files import read_gram, read_routing, write_gram, write_routing


def edit(file: Path, key: str) -> None:
    """Another number in m2d.json than was written."""
    text = file.read_text()
    changed = re.sub(rf'("{key}": )(\d+)', r"\g<1>7\2", text, count=1)
    assert changed != text
    file.write_text(changed)


def test_verify_finds_nothing_in_what_was_not_touched(
    own_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", own_run["teacher"].parent) == 0
    assert "7 of 7 artifacts are as they were written" in capsys.readouterr().err
    assert run("verify", own_run["student"], own_run["gram"], "--teacher", own_run["teacher"]) == 0
    own = (own_run["refit"], own_run["teacher"], own_run["student"].with_name("distilled"))
    assert run("distill", *own, "--tokens", own_run["tokens"], *DISTILL) == 0
    capsys.readouterr()
    assert run("verify", own_run["teacher"].parent) == 0
    assert "8 of 8 artifacts are as they were written" in capsys.readouterr().err
    plain = Path(shutil.copy(own_run["stats"], own_run["stats"].with_name("statistics")))
    assert run("verify", plain) == 0  # whatever it is called


@pytest.mark.parametrize(
    ("key", "spoil", "said"),
    [
        ("gram", lambda p: flip(p, 0.9), "was changed or damaged"),
        ("neurons", lambda p: flip(p, 0.9), "was changed or damaged"),
        ("fold", lambda p: flip(p, 0.9), "was changed or damaged"),
        ("student", lambda p: flip(p / "model.safetensors", 0.9), "model.safetensors was changed"),
        ("student", lambda p: flip(p / "config.json", 0.5), "config.json was changed"),
        ("student", lambda p: (p / "plan.json").unlink(), "plan.json is missing"),
        ("refit", lambda p: flip(p / "model.safetensors", 0.5), "model.safetensors was changed"),
        ("logits", lambda p: flip(p / "shard-00000.safetensors", 0.9), "shard-00000.safetensors"),
        ("logits", lambda p: (p / "shard-00001.safetensors").unlink(), "is missing"),
        ("stats", lambda p: p.write_bytes(p.read_bytes()[:-9]), "cut off, or damaged"),
        (
            "student",
            lambda p: edit(p / "m2d.json", "parameters"),
            "m2d.json was changed or damaged",
        ),
        ("student", lambda p: (p / "m2d.json").write_text("{"), "m2d.json is not readable"),
    ],
)
def test_verify_names_what_was_changed(
    key: str,
    spoil: Callable[[Path], Any],
    said: str,
    own_run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(own_run[key])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run("verify", own_run["teacher"].parent)
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(str(own_run[key]))
    assert said in lines[0]


def test_verify_names_what_is_of_another_run(
    own_run: Run, both_runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(both_runs[1]["gram"], own_run["gram"])
    with pytest.raises(SystemExit):
        run("verify", own_run["teacher"].parent)
    assert "gram.safetensors: belongs to another run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("verify", own_run["student"], "--teacher", both_runs[1]["teacher"])
    assert "belongs to another run" in capsys.readouterr().out


def test_a_result_is_of_the_weights_beside_it(
    own_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    student, tokens = own_run["student"], own_run["tokens"]
    file = student.with_name("student.perplexity.json")
    measure = ("perplexity", student, "--tokens", tokens, "--out", file, "--dtype", "float32")
    assert run(*measure) == 0
    result = read_json(file)
    ids = load_file(tokens)["input_ids"].long().numpy()
    assert result["tokens_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert result["model_fingerprint"] == fingerprint(student)
    assert (result["dtype"], result["computed_on"]["device"]) == ("float32", "cpu")
    assert result["computed_on"]["threads"] == torch.get_num_threads()
    assert verify(capsys, own_run["teacher"].parent)[0] == 0
    shutil.rmtree(student)
    assert run("merge", own_run["teacher"], student, *chosen(own_run)[:-1], 2) == 0
    shutil.rmtree(own_run["refit"])  # of the student that was there
    code, said, _ = verify(capsys, own_run["teacher"].parent)
    assert code == 1
    assert "student.perplexity.json was measured on other weights" in said
    assert run(*measure) == 0
    assert verify(capsys, own_run["teacher"].parent)[0] == 0


def verify(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    try:
        code = run("verify", *words)
    except SystemExit as stopped:
        code = int(str(stopped.code))
    return code, *capsys.readouterr()


def test_verify_names_a_student_made_from_other_files_than_lie_there(
    own_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same teacher, so that the fingerprint is the same."""
    folder = own_run["teacher"].parent
    layers, about = read_routing(own_run["stats"])
    layers[0].prob_sum[0] *= 1.5
    write_routing(own_run["stats"], layers, {k: v for k, v in about.items() if k != "sha256"})
    code, out, _ = verify(capsys, folder)
    assert code == 1
    said = "was made from other statistics than lie there (stats.parquet)"
    assert out == f"{own_run['refit']}: {said}\n{own_run['student']}: {said}\n"
    own_run["stats"].unlink()  # of what is not there, nothing can be said
    assert verify(capsys, folder)[0] == 0
    own_run["rank"].write_text(json.dumps(read_json(own_run["rank"]) | {"scoring": "mine"}))
    assert "was made from other ranking than lie there (rank.json)" in verify(capsys, folder)[1]
    own_run["rank"].unlink()
    record = read_json(own_run["student"] / "m2d.json")
    record["files_sha256"]["model.safetensors"] = "0" * 64
    (own_run["student"] / "m2d.json").write_text(json.dumps(record))
    out = verify(capsys, folder)[1]
    said = "was made from another student than the one of its plan beside it"
    assert f"{own_run['refit']}: {said}" in out


def test_verify_names_what_has_no_fingerprint(
    own_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    grams, about = read_gram(own_run["gram"])
    for key in ("sha256", "teacher_fingerprint"):
        about.pop(key)
    write_gram(own_run["gram"], grams, about)
    own_run["student"].rename(own_run["student"].with_name("elsewhere"))
    code, _, said = verify(capsys, own_run["gram"])
    assert code == 0
    assert f"no fingerprint of a teacher, so of any: {own_run['gram']}" in said
    code, out, _ = verify(capsys, own_run["gram"], "--teacher", own_run["teacher"])
    assert code == 1
    assert out == f"{own_run['gram']}: has no fingerprint of its teacher; make it again to know\n"


def test_verify_compares_every_byte_of_a_teacher_on_request(
    own_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, digests = own_run["teacher"], tmp_path / "teacher.sha256"
    full = (own_run["fold"], "--teacher", teacher, "--full", digests)
    code, _, said = verify(capsys, *full)
    assert code == 0
    assert "teacher.sha256: digests of 2 files" in said
    assert f"{sha256_of(teacher / 'model.safetensors')}  model.safetensors" in digests.read_text()
    assert verify(capsys, *full)[0] == 0
    file = teacher / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    names = json.loads(content[8 : 8 + header])
    begin, end = max((v["data_offsets"] for k, v in names.items() if k != "__metadata__"),
                     key=lambda place: place[1] - place[0])  # fmt: skip
    content[8 + header + begin + 1000] ^= 1  # where the fingerprint takes no sample
    assert end - begin > 20_000
    before = fingerprint(teacher)
    file.write_bytes(content)
    assert fingerprint(teacher) == before
    code, out, _ = verify(capsys, *full)
    assert (code, out.count("\n")) == (1, 1)
    assert "model.safetensors: was changed or damaged" in out
    notes = teacher / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "model.safetensors.metadata").write_text(f"{'a' * 40}\n{'b' * 64}\n1.5\n")
    digests.unlink()
    code, out, _ = verify(capsys, *full)
    assert code == 1
    assert "model.safetensors: was changed or damaged: not of the digest that the hub" in out
    assert not digests.exists()
    digests.write_text("nonsense\n")
    assert verify(capsys, *full)[0] == 2
    assert verify(capsys, own_run["fold"], "--full", digests)[0] == 2


def test_a_changed_grid_is_noticed_on_reading_and_by_verify(
    own_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = own_run["stats"].with_name("grid") / "sf.parquet"
    grid.parent.mkdir()
    words = ("grid", own_run["teacher"], grid, *chosen(own_run)[:6], "--tokens", own_run["tokens"])
    assert run(*words, "--keeps", 2) == 0
    assert run("verify", grid) == 0
    best = best_configuration([grid])
    assert len(read_grid([grid])) > 1
    table = pq.read_table(grid)
    worst = table.column("perplexity").to_numpy().copy()
    worst[-1] = np.nextafter(worst[-1], 0)
    place = table.schema.names.index("perplexity")
    changed = table.set_column(place, table.schema.field("perplexity"), [worst])
    pq.write_table(changed, grid)
    for reader in (lambda: best_configuration([grid]), lambda: read_grid([grid])):
        with pytest.raises(UserError, match="not those that were written"):
            reader()
    with pytest.raises(SystemExit):
        run("verify", grid)
    assert "was changed or damaged" in capsys.readouterr().out
    assert best["keep"] == 2
