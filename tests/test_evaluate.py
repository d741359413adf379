"""lm-eval's own task definitions on local data, against log-likelihoods computed here.

Prompts, few-shot sampling and scores are written out again from the tasks' descriptions; nothing
here calls lm-eval except through m2d.
"""

import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import family_teachers
import pytest
import torch
from conftest import make_teacher
from family_reference import slow_emo
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from m2d import cli
from m2d.errors import UserError
from m2d.evaluate.lm_eval import evaluate
from m2d.models.fingerprint import fingerprint

WORDS = ["expert", "router", "token", "layer", "dense", "sparse", "merge", "score", "large"]
SEED = 1234  # lm-eval's default seed for drawing few-shot examples


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_split(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def winogrande(rng: random.Random) -> dict:
    return {
        "sentence": f"The {words(rng, 2)} is a _ because {words(rng, 3)}.",
        "option1": words(rng, 1),
        "option2": words(rng, 2),
        "answer": rng.choice("12"),
    }


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
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_teacher(folder, seed=3, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_dataset(folder: Path, make, splits: dict[str, int], seed: int = 0) -> dict:
    rng = random.Random(seed)
    rows = {split: [make(rng) for _ in range(count)] for split, count in splits.items()}
    for split, documents in rows.items():
        write_split(folder, split, documents)
    return rows


def scores(model: Path, datasets: Path, task: str, shots: int | None) -> dict:
    return evaluate(
        str(model),
        [task],
        shots=shots,
        datasets=datasets,
        batch_size="7",
        dtype="float32",
        device="cpu",
    )[task]


def test_winogrande_five_shot(tmp_path: Path, model: Path, reference: Reference) -> None:
    rows = make_dataset(
        tmp_path / "allenai/winogrande/winogrande_xl", winogrande, {"train": 12, "validation": 30}
    )
    result = scores(model, tmp_path, "winogrande", 5)

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


def test_hellaswag_ten_shot(tmp_path: Path, model: Path, reference: Reference) -> None:
    rows = make_dataset(tmp_path / "hellaswag", hellaswag, {"train": 14, "validation": 20})
    result = scores(model, tmp_path, "hellaswag", 10)["results"]["hellaswag"]

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
    tmp_path: Path, model: Path, reference: Reference, task: str, configuration: str
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
    result = scores(model, tmp_path, task, 25)["results"][task]

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


def test_mmlu_five_shot_and_its_groups(tmp_path: Path, model: Path, reference: Reference) -> None:
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
    result = scores(model, tmp_path, "mmlu", 5)

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


def test_wikitext_perplexity(tmp_path: Path, model: Path, reference: Reference) -> None:
    rng = random.Random(0)
    pages = [{"page": f" = {words(rng, 2)} = \n {words(rng, 40)} . \n"} for _ in range(3)]
    folder = tmp_path / "wikitext_document_level" / "wikitext-2-raw-v1"
    for split in ("train", "validation", "test"):
        write_split(folder, split, pages)
    result = scores(model, tmp_path, "wikitext", None)["results"]["wikitext"]
    total, count = 0.0, 0
    for page in pages:
        # The detokenizer joins the space around a line break and before a full stop.
        text = page["page"].replace(" . ", ". ").replace(" \n", "\n").replace("\n ", "\n")
        end = reference.tokenizer.eos_token_id  # stands before the first token
        total += reference.log_probs([end, *reference.tokenizer.encode(text)]).sum().item()
        count += len(re.split(r"\s+", page["page"]))
    assert result["word_perplexity,none"] == pytest.approx(math.exp(-total / count), rel=1e-4)


def test_same_evaluation_same_file_without_local_paths(tmp_path: Path, model: Path) -> None:
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 6, "validation": 4})
    arguments = ["evaluate", str(model), "--task", "winogrande", "--shots", "2"]
    arguments += ["--datasets", str(tmp_path), "--batch-size", "4", "--device", "cpu"]
    outs = [tmp_path / "one.json", tmp_path / "two.json"]
    for out in outs:
        assert cli.main([*arguments[:2], str(out), *arguments[2:]]) == 0
    texts = [out.read_text(encoding="utf-8") for out in outs]
    assert texts[0] == texts[1]
    result = json.loads(texts[0])
    assert result["config"].pop("model_args")["pretrained"] == str(model)
    rest = json.dumps({key: value for key, value in result.items() if key != "model_name"})
    assert sys.prefix not in rest
    assert str(tmp_path) not in rest


def test_several_tasks_from_yaml_of_ones_own(tmp_path: Path, model: Path) -> None:
    rng = random.Random(1)
    items = [
        {"context": words(rng, 3), "choices": [words(rng, 1), words(rng, 2)], "answer": 1}
        for _ in range(5)
    ]
    tasks = tmp_path / "tasks"
    write_split(tasks, "own", items)
    for name in ("own_a", "own_b"):
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            "dataset_kwargs:\n  data_files:\n    test: own.jsonl\n"
            "test_split: test\noutput_type: multiple_choice\n"
            'doc_to_text: "{{context}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n',
            encoding="utf-8",
        )
    out = tmp_path / "out"
    options = ["--include", str(tasks), "--shots", "0", "--batch-size", "4", "--device", "cpu"]
    options += ["--task", "own_a", "--task", "own_b", "--limit", "3"]
    assert cli.main(["evaluate", str(model), str(out), *options]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["own_a.json", "own_b.json"]
    result = json.loads((out / "own_b.json").read_text(encoding="utf-8"))
    assert result["n-samples"]["own_b"] == {"original": 5, "effective": 3}


def test_batch_size_is_found_and_stdout_stays_clean(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 3, "validation": 4})
    options = {"shots": 1, "datasets": tmp_path, "dtype": "float32", "device": "cpu"}
    found = evaluate(str(model), ["winogrande"], **options)["winogrande"]
    fixed = evaluate(str(model), ["winogrande"], batch_size="1", **options)["winogrande"]
    assert found["model_fingerprint"] == fingerprint(Path(model))
    assert (found["dtype"], found["computed_on"]["device"]) == ("float32", "cpu")
    assert found["config"]["batch_size"] == "auto"
    assert found["config"]["batch_sizes"]
    assert found["results"] == fixed["results"]
    assert capsys.readouterr().out == ""


def test_what_the_vllm_backend_is_given(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm itself needs a GPU: in its place stands the hf backend, which records its arguments."""
    import lm_eval.api.registry

    hf = lm_eval.api.registry.get_model("hf")
    given = []

    class Recorder:
        @staticmethod
        def create_from_arg_obj(arguments: dict, more: dict) -> object:
            given.append({**arguments, **more})
            plain = {key: arguments[key] for key in ("pretrained", "dtype")}
            return hf.create_from_arg_obj(plain, {"batch_size": "4", "device": "cpu"})

    def get_model(name: str) -> type:
        return {"vllm": Recorder}[name]

    monkeypatch.setattr(lm_eval.api.registry, "get_model", get_model)
    # Of vllm alone: other libraries look for their hardware in the same way.
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: object() if name == "vllm" else find(name, *rest),
    )
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 3, "validation": 4})
    options = ["--backend", "vllm", "--shots", "0", "--datasets", str(tmp_path)]
    options += ["--model-arg", "tensor_parallel_size=4", "--model-arg", "quantization=fp8"]
    out = tmp_path / "out.json"
    task = ["--task", "winogrande", "--dtype", "bfloat16"]
    assert cli.main(["evaluate", str(model), str(out), *task, *options]) == 0
    assert given == [
        {
            "pretrained": str(model),
            "dtype": "bfloat16",
            "tensor_parallel_size": 4,
            "quantization": "fp8",
            "batch_size": "auto",
            "max_batch_size": None,
            "device": None,
        }
    ]
    assert json.loads(out.read_text(encoding="utf-8"))["config"]["model"] == "vllm"


@pytest.mark.parametrize(("gpus", "more"), [(1, {}), (2, {"parallelize": True})])
def test_a_model_is_spread_over_several_gpus(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, more: dict
) -> None:
    import lm_eval.api.registry

    hf = lm_eval.api.registry.get_model("hf")
    given = []

    class Recorder:
        @staticmethod
        def create_from_arg_obj(arguments: dict, _: dict) -> object:
            given.append(arguments)
            plain = {key: arguments[key] for key in ("pretrained", "dtype")}
            return hf.create_from_arg_obj(plain, {"batch_size": "4", "device": "cpu"})

    monkeypatch.setattr(lm_eval.api.registry, "get_model", lambda name: Recorder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("m2d.devices.pick_device", lambda _: torch.device("cpu"))
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 3, "validation": 4})
    evaluate(str(model), ["winogrande"], shots=0, datasets=tmp_path)
    assert given == [{"pretrained": str(model), "dtype": "float32", **more}]


def test_a_folder_for_one_dataset(tmp_path: Path, model: Path) -> None:
    make_dataset(tmp_path / "any/where", winogrande, {"train": 3, "validation": 4})
    options = ["--task", "winogrande", "--shots", "1", "--batch-size", "4", "--device", "cpu"]
    options += ["--dataset", f"allenai/winogrande={tmp_path / 'any/where'}"]
    out = tmp_path / "out.json"
    assert cli.main(["evaluate", str(model), str(out), *options]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["n-samples"]["winogrande"]["effective"] == 4


@pytest.mark.parametrize("task", ["winogrande", "wikitext"])
def test_without_network_and_data_one_line_says_what_is_missing(
    tmp_path: Path, model: Path, task: str
) -> None:
    """In a process of its own: whether the hub is offline is read when `datasets` is imported."""
    command = [sys.executable, "-m", "m2d.cli", "evaluate", str(model), str(tmp_path / "out.json")]
    done = subprocess.run(
        [*command, "--task", task],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    name = {"winogrande": "allenai/winogrande", "wikitext": "EleutherAI/wikitext_document_level"}
    assert len(lines) == 1
    assert f"dataset {name[task]}" in lines[0]
    assert f"--dataset {name[task]}=FOLDER/{name[task]}" in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


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


def test_too_many_examples_are_refused(tmp_path: Path, model: Path) -> None:
    make_dataset(tmp_path / "winogrande", winogrande, {"train": 3, "validation": 4})
    with pytest.raises(UserError, match="winogrande has only 3 examples"):
        evaluate(str(model), ["winogrande"], shots=4, datasets=tmp_path)
    for split in ("train", "validation", "test"):
        write_split(tmp_path / "wikitext_document_level", split, [{"page": "a b"}])
    with pytest.raises(UserError, match="wikitext takes no examples"):
        evaluate(str(model), ["wikitext"], shots=5, datasets=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["hellaswagg"]}, "no such task; did you mean hellaswag"),
        ({"tasks": ["hellaswag", "../../escaped"]}, "--task '../../escaped': is no task's name"),
        ({"tasks": ["/tmp/escaped"]}, "--task '/tmp/escaped': is no task's name"),
        ({"tasks": ["hellaswag"]}, "dataset Rowan/hellaswag is not available"),
        ({"model": "/no/such/folder"}, "no such folder; give a model folder or a hub id"),
        ({"model": "."}, "no config.json in it"),
        ({"include": "/no/such/folder"}, "--include /no/such/folder: no such folder"),
        ({"datasets": "/no/such/folder"}, "--datasets /no/such/folder: no such folder"),
        ({"dataset_folders": {"a/b": "/no/such"}}, "--dataset a/b=/no/such: no such folder"),
        ({"backend": "vllm"}, "vllm is not installed"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, model: Path, changes: dict, message: str) -> None:
    settings = {"model": str(model), "tasks": ["hellaswag"], "datasets": str(tmp_path), **changes}
    with pytest.raises(UserError, match=message) as caught:
        evaluate(**settings)
    assert "\n" not in str(caught.value)


def test_a_task_named_like_a_path_writes_nothing_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though a definition of that name is there, which lm-eval takes."""
    model, own = make_teacher(tmp_path / "model"), tmp_path / "own"
    own.mkdir()
    (own / "escaped.yaml").write_text("task: ../../escaped\ndataset_path: json\n", encoding="utf-8")
    out = tmp_path / "a" / "b" / "out"
    out.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    words = ["evaluate", str(model), str(out), "--include", str(own), "--task", "hellaswag"]
    assert cli.main([*words, "--task", "../../escaped"]) == 2
    assert "--task '../../escaped': is no task's name" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
