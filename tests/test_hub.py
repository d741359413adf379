"""Models of the hub: what is fetched, what goes along, what they are called, and no network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import COMMITS, serving

from m2d.errors import UserError
from m2d.models.hub import is_wanted, licence_of, locate, name_of, other_files, revision_of
from m2d.students.card import model_card
from m2d.students.files import copy_others, tokenizer_code
from m2d.students.record import StudentRecord
from tests.conftest import make_teacher

BESIDE = {
    "README.md": '---\nlicense: "other" # as upstream\nlicense_name: acme-1\n'
    "license_link: https://acme.example/licence\n---\n# Mini\n",
    "LICENSE": "terms",
    "NOTICE": "notice",
    "tiktoken.model": "tokens",
    "vocab.txt": "a",
    "tekken.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
}
UNWANTED = {
    "original/model.safetensors": "second copy",
    "original/config.json": "{}",
    "metal/model.bin": "third copy",
    "consolidated.00.safetensors": "fourth copy",
    "pytorch_model-00001-of-00002.bin": "fifth copy",
    "model.Q4_K.gguf": "sixth copy",
    "figure.png": "picture",
    ".gitattributes": "x",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_teacher(tmp_path_factory.mktemp("hub") / "mini")
    for name, text in (BESIDE | UNWANTED).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def in_process(code: str, environment: dict[str, str], folder: Path) -> None:
    """Run Python with m2d's `main` and the command `hf` at hand; both must succeed."""
    head = (
        "import subprocess, sys\nfrom m2d.cli import main\n"
        "def m2d(*words): assert main([*map(str, words)]) == 0\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", head + code], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "home"), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_repository_is_converted_and_then_used_offline(
    repository: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """By id and revision; nothing is fetched that is not needed, and all that is goes along."""
    options = f"'--text', {str(tiny_text)!r}, '--sequences', 4, '--length', 16"
    with serving({("acme/mini", "v2"): repository}) as (online, fetched):
        in_process(f"m2d('convert', 'acme/mini@v2', 'student', {options})", online, tmp_path)
        own = [f for f in repository.iterdir() if f.is_file() and f.name not in UNWANTED]
        names = {f.name for f in own} | {"additional_chat_templates/rag.jinja"}
        assert sorted(fetched) == sorted(names)
    student = tmp_path / "student"
    for name in BESIDE.keys() - {"README.md"}:
        assert (student / name).read_text() == BESIDE[name]
    teacher = json.loads((student / "m2d.json").read_text())["teacher"]
    assert teacher["name"] == "acme/mini"
    assert teacher["revision"] == COMMITS["v2"]
    assert teacher["license"] == "other"
    card = (student / "README.md").read_text()
    for line in ("license: other", "license_name: acme-1", "base_model: acme/mini"):
        assert f"\n{line}\n" in card
    umask = os.umask(0o022)
    os.umask(umask)
    for file in student.rglob("*"):
        assert file.stat().st_mode & 0o777 == (0o777 if file.is_dir() else 0o666) & ~umask, file
    snapshot = tmp_path / "home/hub/models--acme--mini/snapshots" / COMMITS["v2"]
    assert name_of(snapshot) == "acme/mini"
    offline = {"HF_HUB_OFFLINE": "1"}
    in_process(
        "m2d('inspect', 'acme/mini@v2')\n"
        f"m2d('convert', 'acme/mini@v2', 'again', {options})\n"
        f"m2d('convert', {str(snapshot)!r}, 'third', {options})\n",
        offline,
        tmp_path,
    )
    for other in ("again", "third"):
        for name in ("m2d.json", "model.safetensors", "README.md"):
            assert (tmp_path / other / name).read_bytes() == (student / name).read_bytes()


def test_downloads_by_other_commands_serve_offline(
    repository: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """By hf with patterns, as a cluster's notes may have it: the hub's client calls it partial."""
    words = ["--include", "*.json", "--include", "*.safetensors", "--exclude", "*/*"]
    hf = str(Path(sys.executable).with_name("hf"))
    with serving({("acme/mini", "main"): repository}) as (online, _):
        code = f"subprocess.run({[hf, 'download', 'acme/mini', *words]}, check=True)"
        in_process(code, online, tmp_path)
    text = f"'--text', {str(tiny_text)!r}, '--sequences', 4, '--length', 16"
    in_process(
        f"m2d('tokenize', 'acme/mini', 'tokens', {text})\n"
        "m2d('convert', 'acme/mini', 'student', '--tokens', 'tokens')",
        {"HF_HUB_OFFLINE": "1"},
        tmp_path,
    )


def test_what_belongs_to_a_model() -> None:
    assert [name for name in BESIDE if not is_wanted(name)] == []
    assert [name for name in UNWANTED if is_wanted(name)] == []


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--acme--my--mini" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "link"):
        assert name_of(place) == "acme/my--mini"
        assert revision_of(place) == "a" * 40
    assert name_of(tmp_path) == tmp_path.name
    assert revision_of(tmp_path) is None
    assert name_of("acme/mini@refs/pr/1") == "acme/mini"
    for wrong in ("a/b/c", "acme/mini@", "/acme/mini", "acme"):
        with pytest.raises(UserError, match="no such folder, and not a hub id"):
            locate(wrong)


LICENCES: dict[str, tuple[str, Any]] = {
    "plain": ("---\nlicense: mit\n---\n", {"license": "mit"}),
    "quoted": ('---\nlicense: "mit"\n---\n', {"license": "mit"}),
    "comment": ("---\nlicense: mit # really\ntags: [a]\n---\n", {"license": "mit"}),
    "list": ("---\nlicense:\n- mit\n- apache-2.0\n---\n", {"license": "mit, apache-2.0"}),
    "mark": ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
    "named": (
        "---\nlicense: other\nlicense_name: deepseek\nlicense_link: LICENSE\n---\n",
        {"license": "other", "license_name": "deepseek", "license_link": "LICENSE"},
    ),
    "broken elsewhere": ("---\ntitle: a: b\nlicense: 'mit'\n---\n", {"license": "mit"}),
    "none": ("# Mini\nlicense: mit\n", {}),
    "empty": ("---\nlicense:\n---\n", {}),
    "no mapping": ("---\n- a\n---\n", {}),
    "deep": ("---\nlicense: " + "[" * 20000 + "\n---\n", {}),
}


@pytest.mark.parametrize("case", LICENCES)
def test_the_licence_of_a_card(case: str, tmp_path: Path) -> None:
    text, expected = LICENCES[case]
    with (tmp_path / "README.md").open("w", newline="") as file:
        file.write(text)
    found = licence_of(tmp_path)
    assert found == expected or (case == "deep" and set(found) <= {"license"})
    card = model_card(StudentRecord.model_validate({"teacher": {"name": "acme/mini", **found}}))
    assert card.startswith("---\n")


def test_several_licences_stay_a_list() -> None:
    record = {"teacher": {"name": "x", "license": "mit, apache-2.0"}}
    card = model_card(StudentRecord.model_validate(record))
    assert "license:\n- mit\n- apache-2.0\n" in card


def test_links_lead_no_further_than_the_model(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password")
    model = tmp_path / "model"
    model.mkdir()
    (model / "vocab.json").write_text("{}")
    (model / "same.json").symlink_to("vocab.json")
    (model / "modeling_x.py").write_text("")
    (model / "hf_quant_config.json").write_text("{}")
    (model / "tokenization_x.py").write_text("")
    assert [str(f) for f in other_files(model)] == ["same.json", "tokenization_x.py", "vocab.json"]
    (model / "merges.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"merges.txt: is a link to .*, outside of the model's"):
        copy_others(model, tmp_path)
    cache = tmp_path / "models--acme--mini"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "1234").write_text("merges")
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "merges.txt").symlink_to("../../blobs/1234")
    assert [str(f) for f in other_files(snapshot)] == ["merges.txt"]
    (snapshot / "vocab.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"vocab.json: is a link"):
        other_files(snapshot)


def test_a_tokenizer_that_needs_code_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    named = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    (model / "tokenization_x.py").write_text("")
    assert tokenizer_code(model) == "tokenization_x.XTokenizer"
    copy_others(model, out)
    assert (out / "tokenization_x.py").exists()
    assert "its tokenizer is Python code of the repository (tokenization_x.XTokenizer), which" in (
        capsys.readouterr().err
    )
    (model / "tokenizer.json").write_text("{}")
    assert tokenizer_code(model) is None
