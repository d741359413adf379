"""Demo tasks from a made-up corpus: right answers are right, and lm-eval runs what is written."""

import json
import random
from pathlib import Path

import pytest

from m2d.demo.tasks import CHOICES, TASKS, cut, described_parameters, write_demo_tasks
from m2d.errors import UserError
from m2d.evaluate.lm_eval import evaluate

WORDS = ["expert", "router", "token", "layer", "dense", "sparse", "merge", "score", "large"]
STYLES = (
    "Parameters\n----------\n{0} : int\n    {1}\n    {2}\n",
    "Args:\n    {0} (`int`, *optional*):\n        {1}\n        {2}\n",
    ":param {0}: {1}\n    {2}\n",
)


def make_corpus(folder: Path) -> dict[str, str]:
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    documents = []
    for number in range(24):
        style = STYLES[number % 3].format(f"name{number}", words(6), words(4))
        text = f"{words(60)}.\n\n{style}\n{words(30)}."
        documents.append({"text": text, "domain": f"d{number % 5}", "name": f"doc{number}"})
    folder.mkdir()
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / "test.jsonl").write_text(lines, encoding="utf-8")
    return {document["name"]: document["text"] for document in documents}


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, str]:
    return make_corpus(tmp_path / "corpus")


def items(folder: Path, task: str) -> list[dict]:
    lines = (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_right_answers_are_from_the_document_and_wrong_ones_are_not(
    tmp_path: Path, corpus: dict[str, str]
) -> None:
    out = tmp_path / "tasks"
    write_demo_tasks(tmp_path / "corpus", out)
    positions = set()
    for task in TASKS:
        assert len(items(out, task)) == 24
        for item in items(out, task):
            assert len(set(item["choices"])) == CHOICES
            positions.add(item["answer"])
    for item in items(out, "demo_continuation"):
        right = item["choices"][item["answer"]]
        assert f"{item['context']} {right}" in corpus[item["name"]]
        for wrong in set(item["choices"]) - {right}:
            assert f"{item['context']} {wrong}" not in corpus[item["name"]]
    for item in items(out, "demo_package"):
        assert item["text"] in corpus[item["name"]]
        sources = [
            next(name for name, text in corpus.items() if text.startswith(choice))
            for choice in item["choices"]
        ]
        domains = [int(name.removeprefix("doc")) % 5 for name in sources]
        assert domains[item["answer"]] == int(item["name"].removeprefix("doc")) % 5
        assert len(set(domains)) == CHOICES
        assert item["name"] not in sources
    for item in items(out, "demo_parameter"):
        right = item["choices"][item["answer"]]
        joined = " ".join((item["context"] + right).split())
        assert joined in " ".join(corpus[item["name"]].split())
        assert f"name{item['name'].removeprefix('doc')}" in item["context"]
    assert positions == set(range(CHOICES))


def test_the_same_corpus_gives_the_same_files(tmp_path: Path, corpus: dict[str, str]) -> None:
    for name in ("one", "two"):
        write_demo_tasks(tmp_path / "corpus", tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(f"{task}.{kind}" for task in TASKS for kind in ("yaml", "jsonl"))
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert str(tmp_path) not in (tmp_path / "one" / name).read_text(encoding="utf-8")


def test_lm_eval_runs_them_from_wherever_they_are(
    tmp_path: Path, corpus: dict[str, str], tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_demo_tasks(tmp_path / "corpus", tmp_path / "tasks")
    (tmp_path / "tasks").rename(tmp_path / "moved")
    results = evaluate(
        str(tiny_teacher), list(TASKS), include=tmp_path / "moved", limit=4, batch_size="8"
    )
    for task, result in results.items():
        measures = {"acc,none"} if task == "demo_package" else {"acc,none", "acc_norm,none"}
        assert measures <= result["results"][task].keys()
        assert result["n-samples"][task] == {"original": 24, "effective": 4}


def test_cut_keeps_the_text_as_it_stands() -> None:
    text = "one two three four  five\n six seven eight nine ten"
    before, after = cut(text, 5, 12) or ("", "")
    assert (before, after) == ("one two", "three four")
    assert cut("word" * 20, 5, 12) is None
    assert cut("a b", 1, 30) is None


def test_parameters_are_found_in_every_style() -> None:
    for style in STYLES:
        text = style.format("alpha", "the first line of it", "and the second")
        ((name, before, description),) = described_parameters(
            {"text": text, "domain": "d", "name": "n"}
        )
        assert name == "alpha"
        assert "alpha" in before
        assert " ".join(description.split()) == "the first line of it and the second"


def test_bad_corpus_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for content, message in (
        (None, "not a split of the demo corpus"),
        ("no json\n", "not a split of the demo corpus"),
        ('{"text": "x"}\n', "needs text, domain and name"),
        ('{"text": "x", "domain": "d", "name": "n"}\n', "too few documents"),
    ):
        if content is not None:
            (tmp_path / "corpus" / "test.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            write_demo_tasks(tmp_path / "corpus", tmp_path / "out")
        assert not (tmp_path / "out").exists()
