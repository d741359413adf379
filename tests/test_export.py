"""GGUF export around llama.cpp's converter, for which a small script stands here.

The converter itself and llama.cpp are run by `make test-serving`.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers
from transformers import Qwen3Config, Qwen3ForCausalLM

from m2d.cli import main
from m2d.errors import UserError
from m2d.export import check, command, engine
from m2d.export.pre_tokenizer import DEEPSEEK_V3, LLAMA3, QWEN2, pre_tokenizer_name

# What llama.cpp's script has of the parts that are touched: it knows one tokenizer, and writes what
# it was called with.
CONVERTER = """
import json, os, sys
from pathlib import Path

class TextModel:
    def __init__(self, folder):
        self.folder = Path(folder)

    def get_vocab_base_pre(self, tokenizer):
        if (self.folder / "known").exists():
            return "a-known-one"
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update it")

def main():
    folder, *options = sys.argv[1:]
    options = dict(zip(options[::2], options[1::2]))
    files = {p.name: p.read_text() for p in Path(folder).iterdir() if p.suffix in (".json", ".py")}
    if json.loads(files["config.json"]).get("needs"):
        import a_package_that_is_not_there
    if json.loads(files["config.json"]).get("fails"):
        raise ValueError("Can not map tensor 'model.x'")
    told = {"pre": TextModel(folder).get_vocab_base_pre(None), "type": options["--outtype"]}
    told |= {"files": files, "offline": os.environ["HF_HUB_OFFLINE"]}
    Path(options["--outfile"]).write_text(json.dumps(told))
"""


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    file = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    file.parent.mkdir()
    file.write_text(CONVERTER)
    return file


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    make_tokenizer().save_pretrained(folder)
    sizes = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"a": "b"}}))
    (folder / "modeling.py").write_text("print('never run')")
    return folder


def export(student: Path, out: Path, *options: Any) -> int:
    return main(["export", str(student), str(out), *map(str, options)])


def test_a_new_vocabulary_gets_the_pre_tokenizer_of_its_pattern(
    student: Path, converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.gguf"
    assert export(student, out, "--type", "q8_0", "--converter", converter) == 0
    told = json.loads(out.read_text())
    assert (told["pre"], told["type"], told["offline"]) == ("gpt-2", "q8_0", "1")
    # Nothing that would name code to run is handed on.
    assert "modeling.py" not in told["files"]
    assert '"qwen3"' in told["files"]["config.json"]
    assert "auto_map" not in told["files"]["config.json"]
    heard = capsys.readouterr()
    assert "vocabulary is new to llama.cpp" in heard.err
    assert "not checked" in heard.out
    assert not list(tmp_path.glob(".m2d*"))

    (student / "known").touch()
    assert export(student, tmp_path / "k.gguf", "--converter", converter.parent) == 0
    told = json.loads((tmp_path / "k.gguf").read_text())
    assert (told["pre"], told["type"]) == ("a-known-one", "bf16")


def test_a_converter_on_the_path_is_found(
    student: Path, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(converter.parent))
    assert export(student, tmp_path / "s.gguf") == 0


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"fails": True}, (), "failed (ValueError: Can not map tensor 'model.x')"),
        ({"needs": True}, (), "needs a_package_that_is_not_there: pip install"),
        ({}, ("--converter", "nowhere"), "--converter nowhere: no such file; give --converter"),
    ],
)
def test_what_fails_is_one_line_and_leaves_nothing(
    change: dict[str, Any],
    options: tuple[str, ...],
    message: str,
    student: Path,
    converter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = student / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    name = options[1] if "--out" in options else "s.gguf"
    rest = options if "--converter" in options else ("--converter", converter)
    before = sorted(tmp_path.rglob("*"))
    assert export(student, tmp_path / name, *rest) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)) == before


def test_what_the_converter_would_read_otherwise_is_refused(
    student: Path, converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        assert export(student, tmp_path / "s.gguf", "--converter", converter) == 2
        return capsys.readouterr().err

    weights = student / "model.safetensors"
    whole = load_file(weights)
    (student / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "programs do not agree on which counts" in said()
    (student / "model.safetensors.index.json").unlink()
    save_file({name: t for name, t in whole.items() if "q_proj" not in name}, weights)
    assert "1 tensor is missing (model.layers.0.self_attn.q_proj.weight)" in said()
    whole["model.norm.weight"][0] = math.nan
    save_file(whole, weights)
    assert "numbers are not finite" in said()
    weights.unlink()
    assert "student: no model.safetensors" in said()


def test_no_converter_is_one_line_that_says_what_to_get(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert export(student, tmp_path / "s.gguf") == 2
    line = capsys.readouterr().err.strip()
    assert "not on the PATH" in line
    assert "pip download" in line
    assert "\n" not in line


def test_a_splitting_that_nobody_knows_is_asked_for(
    student: Path, converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = student / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(content))
    assert export(student, tmp_path / "s.gguf", "--converter", converter) == 2
    assert "give --pre NAME" in capsys.readouterr().err
    call = ("--converter", converter, "--pre", "mine")
    assert export(student, tmp_path / "s.gguf", *call) == 0
    assert json.loads((tmp_path / "s.gguf").read_text())["pre"] == "mine"


def splitting(*steps: pre_tokenizers.PreTokenizer, **model: Any) -> dict[str, Any]:
    """A tokenizer.json whose pre-tokenizer is these steps, as tokenizers writes it."""
    tokenizer = make_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    content = json.loads(tokenizer.to_str())
    content["model"] |= model
    return content


def test_names_of_pre_tokenizers() -> None:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Split(Regex(pattern), behavior)

    named = {
        "gpt-2": splitting(whole),
        "smollm": splitting(pre_tokenizers.Digits(individual_digits=True), whole),
        "qwen2": splitting(split(QWEN2), last),
        "llama-bpe": splitting(split(LLAMA3), last, ignore_merges=True),
        "dbrx": splitting(split(LLAMA3), last),
        "deepseek-v3": splitting(*map(split, DEEPSEEK_V3), last),
    }
    assert {name: pre_tokenizer_name(content) for name, content in named.items()} == {
        name: name for name in named
    }
    for other in (
        splitting(split(QWEN2 + "|x"), last),
        splitting(split(QWEN2, "removed"), last),
        splitting(split(QWEN2), whole),  # split twice
        splitting(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        splitting(pre_tokenizers.Metaspace()),
        splitting(whole) | {"model": {"type": "WordPiece"}},
    ):
        assert pre_tokenizer_name(other) is None


class FakeEngine:
    """A llama.cpp that gives token t the probability 1 / (t + 2), and is silent on token 7."""

    def tokenize(self, text: str) -> list[int]:
        return [0] if text == "odd" else make_tokenizer()(text)["input_ids"]

    def log_probability(self, prompt: list[int], token: int) -> float | None:
        return None if token == 7 else -math.log(token + 2)

    def top(self, prompt: list[int], count: int, safe: int) -> dict[int, float]:
        return {7: -math.log(9)}


def test_a_check_compares_tokens_and_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    @engine.contextlib.contextmanager
    def serving(*_: Any) -> Any:
        yield FakeEngine()

    monkeypatch.setattr(check, "serving", serving)
    tokens = torch.tensor([[5, 0, 7], [9, 2, 2]])
    expected = (2 * 9 * 4 * 4) ** 0.25  # by hand: the geometric mean of what was predicted
    texts = ["a"] * 100

    def call(documents: list[str], student: float) -> check.Check:
        return check.check_gguf(Path("f"), make_tokenizer(), documents, tokens, student, 1)

    found = call([*texts, "odd"], expected / 1.01)
    assert found.perplexity_gguf == pytest.approx(expected)
    assert found.change == pytest.approx(0.01)
    assert (found.n_tokens, found.documents, found.documents_different) == (4, 101, 1)
    assert "100 of 101 documents tokenized alike" in found.text()
    for wrong in (expected / 1.03, expected * 1.03, float("nan")):
        with pytest.raises(UserError, match="not the student"):
            call(texts, wrong)
    with pytest.raises(UserError, match=r"tokenizes 1 of 2 documents otherwise, the first: 'odd'"):
        call(["a", "odd"], expected)


def test_a_server_that_ends_tells_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "import sys; print('loading'); sys.exit('error: unknown model architecture')"
    monkeypatch.setattr(engine, "server_command", lambda: [sys.executable, "-c", script])
    with (
        pytest.raises(UserError, match=r"does not load it .error: unknown model architecture"),
        engine.serving(tmp_path / "x.gguf", 8),
    ):
        pass


def test_a_check_without_llama_cpp_is_refused_before_anything_is_written(
    student: Path, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "server_command", lambda: None)
    (tmp_path / "t.txt").write_text("some text")
    call = ("--converter", converter, "--text", tmp_path / "t.txt")
    assert export(student, tmp_path / "s.gguf", *call) == 2
    assert "pip install xllamacpp" in capsys.readouterr().err
    assert not (tmp_path / "s.gguf").exists()


def test_the_forced_token_is_checked() -> None:
    asked = engine.Engine("http://nowhere", SimpleNamespace())  # type: ignore[arg-type]
    answers: list[dict[str, Any]] = [
        {"completion_probabilities": [{"id": 3, "logprob": -1.5, "top_logprobs": []}]},
        {},
        {"completion_probabilities": [{"id": 4, "logprob": -1.5, "top_logprobs": []}]},
    ]
    asked.ask = lambda path, **fields: answers.pop(0)  # type: ignore[method-assign]
    assert asked.log_probability([1], 3) == -1.5
    assert asked.log_probability([1], 3) is None
    with pytest.raises(UserError, match="did not take token 3"):
        asked.log_probability([1], 3)
