"""Model cards: from provenance alone, and renewed with scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import synthetic_run as run
import yaml
from safetensors.numpy import save_file

from m2d import cli
from m2d.errors import UserError
from m2d.report import cards as card
from m2d.students.card import Score, model_card
from m2d.students.record import StudentRecord

PROVENANCE = {
    "teacher": {"name": "Qwen/Qwen3-30B-A3B", "model_type": "qwen3_moe", "license": "apache-2.0"},
    "student": {"architecture": "Qwen3ForCausalLM", "parameters": 3340449792},
    "plan": {
        "scoring": "gld_reap",
        "grouping": "weight_cluster",
        "scaling": "uniform",
        "keep": 16,
        "groups": 8,
        "num_experts": 128,
        "moe_layers": 48,
    },
    "calibration": {"source": "FineWeb-Edu", "sequences": 512, "length": 2048},
    "distillation": {"source": "FineWeb-Edu", "tokens": 4_000_000_000, "learning_rate": 1e-4},
    "dtype": "bfloat16",
}


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_card_says_what_the_student_is_and_where_it_came_from() -> None:
    scores = {"mmlu, 5-shot, acc": Score(0.461, 0.004)}
    text = model_card(StudentRecord(**PROVENANCE), scores)
    assert front_matter(text)["license"] == "apache-2.0"
    assert front_matter(text)["base_model"] == "Qwen/Qwen3-30B-A3B"
    for words in (
        "3,340,449,792 parameters",
        "16 of 128 routed experts in each of 48 layers, chosen by `gld_reap` (DO-ACP)",
        "into 8 groups by `weight_cluster` (WC)",
        "512 sequences of 2,048 tokens (1,048,576 in all)",
        "4,000,000,000 tokens",
        "| mmlu, 5-shot, acc | 0.461 ± 0.004 |",
        "inherited from the teacher",
        "from_pretrained",
    ):
        assert words in text
    assert text == model_card(
        StudentRecord(**PROVENANCE), {"mmlu, 5-shot, acc": Score(0.461, 0.004)}
    )


def test_pure_pruning_without_distillation() -> None:
    plan = {**PROVENANCE["plan"], "keep": 8}
    text = model_card(StudentRecord(teacher={"name": "demo-teacher"}, plan=plan))
    assert "copied exactly (pure pruning)" in text
    assert "Distillation: none" in text
    # A folder's name is no hub id, and the teacher stated no licence.
    assert set(front_matter(text)) == {"library_name", "pipeline_tag", "tags"}
    assert "did not state one" in text


def test_nothing_known_still_gives_a_card() -> None:
    assert "## How to load it" in model_card(StudentRecord())


def run_card(*words: object) -> int:
    return cli.main(["card", *map(str, words)])


def test_card_renewed_with_scores(tmp_path: Path) -> None:
    student = tmp_path / "student"
    run.write_json(student / "m2d.json", PROVENANCE)
    evaluation = tmp_path / "demo_package.json"
    run.write_json(evaluation, run.evaluation("demo_package", "acc_norm", 0.75))
    perplexity = run.write_json(tmp_path / "p.json", {"perplexity": 12.5, "n_tokens": 9000})
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": np.zeros((4, 16), np.int64)}, tokens, {"source": "other text"})
    files = ["--perplexity", perplexity, "--evaluation", evaluation, "--tokens", tokens]
    assert run_card("--out", tmp_path / "cards", student, *files) == 0
    text = (student / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "cards" / "student.md").read_text(encoding="utf-8") == text
    assert "| perplexity (9,000 tokens of test text) | 12.5 |" in text
    assert "| demo_package, 0-shot, acc_norm | 0.75 ± 0.028 |" in text
    assert "other text: 4 sequences of 16 tokens (64 in all)" in text
    assert json.loads((student / "m2d.json").read_text()) == PROVENANCE


def test_each_of_several_students_gets_its_own_scores(tmp_path: Path) -> None:
    files = run.write_students(tmp_path)
    tokens = tmp_path / run.TEACHER / "tokens" / "calibration.safetensors"
    tokens.parent.mkdir()
    save_file({"input_ids": np.zeros((4, 16), np.int64)}, tokens, {"source": "own text"})
    fresh = tmp_path / run.TEACHER / "students" / "fresh" / "merged"
    run.write_json(fresh / "m2d.json", {"baseline": {"kind": "random_ffn"}})
    students = [*(file.parent for file in files["provenance"]), fresh]
    words = ["--out", tmp_path / "cards", *students, "--perplexity", *files["perplexity"]]
    words += ["--evaluation", *files["evaluation"], "--tokens", tokens]
    assert run_card(*words) == 0
    for student in students[:-1]:
        text = (student / "README.md").read_text(encoding="utf-8")
        perplexity = json.loads(student.with_name(f"{student.name}.perplexity.json").read_text())
        assert f"tokens of test text) | {perplexity['perplexity']:.4g} ± 0.25 |" in text
        assert text.count("| demo_") == 2
        assert "own text: 4 sequences" in text
        copy = tmp_path / "cards" / f"{run.TEACHER}.{student.parent.name}.{student.name}.md"
        assert copy.read_text(encoding="utf-8") == text
    text = (fresh / "README.md").read_text(encoding="utf-8")
    assert "Calibration" not in text
    assert "## Scores" not in text


def test_nothing_is_written_when_one_student_is_amiss(tmp_path: Path) -> None:
    run.write_json(tmp_path / "one" / "m2d.json", PROVENANCE)
    assert run_card(tmp_path / "one", tmp_path / "other", "--out", tmp_path / "cards") == 2
    assert not (tmp_path / "one" / "README.md").exists()
    assert not (tmp_path / "cards").exists()


@pytest.mark.parametrize("content", ["{}", '{"results": {"mmlu": {"alias": "mmlu"}}}'])
def test_a_file_without_a_score_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mmlu.json"
    file.write_text(content)
    with pytest.raises(UserError, match="holds no score of mmlu"):
        card.scores_of(None, [file])
