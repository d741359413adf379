"""lm-eval's own task definitions on local data, against log-likelihoods computed here.

Prompts, few-shot sampling and scores are written out again from the tasks' descriptions; nothing
here calls lm-eval except through m2d.
"""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import family_teachers
import pytest
import torch
from evaluation_data import make_dataset, winogrande, words, write_split
from family_reference import slow_emo
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from m2d.evaluate.lm_eval import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")


SEED = 1234  # lm-eval's default seed for drawing few-shot examples


def hellaswag(rng: random.Random) -> dict:
    return {
        "activity_label": words(rng, 1).capitalize(),
        "ctx_a": words(rng, 4) + ".",
        "ctx_b": words(rng, 2),
        "endings": [f"{words(rng, n)} [title] {words(rng, 2)}." for n in (1, 2, 3, 4)],
        "label": rng.choice("0123"),
    }


def arc(rng: random.Random) -> dict:
    # The real data has both kinds of labels, and questions with three choices.
    labels = rng.choice([list("ABCD"), list("1234"), list("ABC")])
    choices = [words(rng, n + 1) for n in range(len(labels))]
    return {
        "id": str(rng.random()),
        "question": words(rng, 4) + "?",
        "choices": {"text": choices, "label": labels},
        "answerKey": rng.choice(labels),
    }


def mmlu(rng: random.Random) -> dict:
    return {
        "question": words(rng, 3) + "? ",
        "subject": "any",
        "choices": [words(rng, 1) for _ in range(4)],
        "answer": rng.randrange(4),
    }


class Reference:
    """Log-likelihoods of a model, one unpadded sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """log p(ids[t] | ids[:t]) for t >= 1: [len(ids) - 1]."""
        logits = self.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def continuation(self, context: str, text: str) -> float:
        start = len(self.tokenizer.encode(context))
        ids = self.tokenizer.encode(context + text)
        return self.log_probs(ids)[start - 1 :].sum().item()

    def best(self, contexts: list[str], texts: list[str], lengths: list[int]) -> int:
        scores = [
            self.continuation(context, text) / length
            for context, text, length in zip(contexts, texts, lengths, strict=True)
        ]
        return max(range(len(scores)), key=scores.__getitem__)


@pytest.fixture(scope="module")
def reference(scored_model: Path) -> Reference:
    return Reference(scored_model)


def scores(scored_model: Path, datasets: Path, task: str, shots: int | None) -> dict:
    return evaluate(
        str(scored_model),
        [task],
        shots=shots,
        datasets=datasets,
        batch_size="7",
        dtype="float32",
        device="cpu",
    )[task]


def test_winogrande_five_shot(tmp_path: Path, scored_model: Path, reference: Reference) -> None:
    rows = make_dataset(
        tmp_path / "allenai/winogrande/winogrande_xl", winogrande, {"train": 12, "validation": 30}
    )
    result = scores(scored_model, tmp_path, "winogrande", 5)

    def parts(doc: dict) -> tuple[list[str], str]:
        before, after = doc["sentence"].split("_")
        return [before + doc["option1"], before + doc["option2"]], after.strip()

    rng, right = random.Random(SEED), 0
    for doc in rows["validation"]:
        shots = ""
        # Without a test split, one spare example is drawn, in case the question is among them.
        for shot in rng.sample(rows["train"], 6)[:5]:
            choices, rest = parts(shot)
            shots += f"{choices[int(shot['answer']) - 1]} {rest}\n\n"
        choices, rest = parts(doc)
        picked = reference.best([shots + choice for choice in choices], [" " + rest] * 2, [1, 1])
        right += picked == int(doc["answer"]) - 1
    assert result["results"]["winogrande"]["acc,none"] == pytest.approx(right / 30)
    assert result["n-shot"]["winogrande"] == 5
    assert result["n-samples"]["winogrande"]["effective"] == 30


def test_hellaswag_ten_shot(tmp_path: Path, scored_model: Path, reference: Reference) -> None:
    rows = make_dataset(tmp_path / "hellaswag", hellaswag, {"train": 14, "validation": 20})
    result = scores(scored_model, tmp_path, "hellaswag", 10)["results"]["hellaswag"]

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    def query(doc: dict) -> str:
        return clean(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")

    rng, right, right_norm = random.Random(SEED), 0, 0
    for doc in rows["validation"]:
        shots = ""
        for shot in rng.sample(rows["train"], 11)[:10]:
            shots += f"{query(shot)} {clean(shot['endings'][int(shot['label'])])}\n\n"
        endings = [clean(ending) for ending in doc["endings"]]
        contexts, texts = [shots + query(doc)] * 4, [" " + ending for ending in endings]
        label = int(doc["label"])
        right += reference.best(contexts, texts, [1] * 4) == label
        right_norm += reference.best(contexts, texts, [len(e) for e in endings]) == label
    assert result["acc,none"] == pytest.approx(right / 20)
    assert result["acc_norm,none"] == pytest.approx(right_norm / 20)


@pytest.mark.parametrize(
    ("task", "configuration"), [("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")]
)
def test_arc_25_shot(
    tmp_path: Path, scored_model: Path, reference: Reference, task: str, configuration: str
) -> None:
    # As a copy of the hub's repository: the README's header names the configurations.
    folder = tmp_path / "allenai/ai2_arc"
    splits = {"train": 30, "validation": 1, "test": 16}
    rows = make_dataset(folder / configuration, arc, splits, seed=len(configuration))
    files = "".join(
        f"  - split: {split}\n    path: {configuration}/{split}.jsonl\n" for split in splits
    )
    header = f"configs:\n- config_name: {configuration}\n  data_files:\n{files}"
    (folder / "README.md").write_text(f"---\n{header}---\n# ARC\n", encoding="utf-8")
    result = scores(scored_model, tmp_path, task, 25)["results"][task]

    def query(doc: dict) -> str:
        return f"Question: {doc['question']}\nAnswer:"

    rng, right, right_norm = random.Random(SEED), 0, 0
    for doc in rows["test"]:
        shots = ""
        for shot in rng.sample(rows["train"], 25):
            gold = shot["choices"]["label"].index(shot["answerKey"])
            shots += f"{query(shot)} {shot['choices']['text'][gold]}\n\n"
        choices = doc["choices"]["text"]
        contexts, texts = [shots + query(doc)] * len(choices), [" " + text for text in choices]
        label = doc["choices"]["label"].index(doc["answerKey"])
        right += reference.best(contexts, texts, [1] * len(choices)) == label
        right_norm += reference.best(contexts, texts, [len(text) for text in choices]) == label
    assert result["acc,none"] == pytest.approx(right / 16)
    assert result["acc_norm,none"] == pytest.approx(right_norm / 16)


def test_mmlu_five_shot_and_its_groups(
    tmp_path: Path, scored_model: Path, reference: Reference
) -> None:
    import lm_eval.tasks

    definitions = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    subjects = {}  # subject -> its group
    for file in definitions.glob("mmlu_*.yaml"):
        tag = re.search(r'"tag": "mmlu_(\w+)_tasks"', file.read_text(encoding="utf-8"))
        assert tag
        subjects[file.stem.removeprefix("mmlu_")] = tag[1]
    assert len(subjects) == 57
    rows = {}
    for number, subject in enumerate(subjects):
        # Sizes differ, so that averaging over subjects and over questions differ.
        counts = {"dev": 5, "validation": 1, "test": 1 + number % 3}
        rows[subject] = make_dataset(tmp_path / "cais/mmlu" / subject, mmlu, counts, seed=number)
    result = scores(scored_model, tmp_path, "mmlu", 5)

    def query(doc: dict) -> str:
        options = "".join(
            f"\n{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True)
        )
        return f"{doc['question'].strip()}{options}\nAnswer:"

    right: dict[str, list[bool]] = {}
    for subject, group in subjects.items():
        name = subject.replace("_", " ")
        description = f"The following are multiple choice questions (with answers) about {name}."
        shots = "".join(f"{query(d)} {'ABCD'[d['answer']]}\n\n" for d in rows[subject]["dev"])
        for doc in rows[subject]["test"]:
            context = f"{description}\n\n{shots}{query(doc)}"
            picked = reference.best([context] * 4, [" A", " B", " C", " D"], [1] * 4)
            for key in (subject, group, "all"):
                right.setdefault(key, []).append(picked == doc["answer"])

    def mean(key: str) -> float:
        return sum(right[key]) / len(right[key])

    for subject in subjects:
        assert result["results"][f"mmlu_{subject}"]["acc,none"] == pytest.approx(mean(subject))
    for group in set(subjects.values()):
        assert result["groups"][f"mmlu_{group}"]["acc,none"] == pytest.approx(mean(group))
    assert result["results"]["mmlu"]["acc,none"] == pytest.approx(mean("all"))
    assert 0 < mean("all") < 1


def test_wikitext_perplexity(tmp_path: Path, scored_model: Path, reference: Reference) -> None:
    rng = random.Random(0)
    pages = [{"page": f" = {words(rng, 2)} = \n {words(rng, 40)} . \n"} for _ in range(3)]
    folder = tmp_path / "wikitext_document_level" / "wikitext-2-raw-v1"
    for split in ("train", "validation", "test"):
        write_split(folder, split, pages)
    result = scores(scored_model, tmp_path, "wikitext", None)["results"]["wikitext"]
    total, count = 0.0, 0
    for page in pages:
        # The detokenizer joins the space around a line break and before a full stop.
        text = page["page"].replace(" . ", ". ").replace(" \n", "\n").replace("\n ", "\n")
        end = reference.tokenizer.eos_token_id  # stands before the first token
        total += reference.log_probs([end, *reference.tokenizer.encode(text)]).sum().item()
        count += len(re.split(r"\s+", page["page"]))
    assert result["word_perplexity,none"] == pytest.approx(math.exp(-total / count), rel=1e-4)


class SlowEmo(Reference):
    """An EMO teacher's log-likelihoods, written out token by token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        logits = slow_emo(self.folder, torch.tensor(ids))[0][:-1].double().log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", ["emo", "emo_always_active"])
def test_an_emo_teacher(tmp_path: Path, name: str) -> None:
    """Its classes are not transformers' own; in new processes, where nothing has named them yet."""
    teacher = family_teachers.make(name, tmp_path / "emo")
    rows = make_dataset(tmp_path / "winogrande", winogrande, {"train": 1, "validation": 12})
    tokens = torch.randint(1, 300, (3, 16), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": tokens}, tmp_path / "tokens.safetensors")

    def run(*arguments: object) -> None:
        command = [sys.executable, "-m", "m2d.cli", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)

    options = ["--dtype", "float32", "--device", "cpu"]
    task = ["--task", "winogrande", "--shots", "0", "--datasets", tmp_path, "--batch-size", "5"]
    run("evaluate", teacher, tmp_path / "scores.json", *task, *options)
    measure = ["--tokens", tmp_path / "tokens.safetensors", "--out", tmp_path / "p.json"]
    run("perplexity", teacher, *measure, *options)

    slow, right = SlowEmo(teacher), 0
    for doc in rows["validation"]:
        before, after = doc["sentence"].split("_")
        contexts = [before + doc["option1"], before + doc["option2"]]
        right += slow.best(contexts, [" " + after.strip()] * 2, [1, 1]) == int(doc["answer"]) - 1
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert result["results"]["winogrande"]["acc,none"] == pytest.approx(right / 12)

    result = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    total = sum(slow.log_probs(window).sum().item() for window in tokens.tolist())
    assert result["nll"] == pytest.approx(-total / (15 * 3), rel=1e-5)
