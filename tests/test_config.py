"""The config: the repository's own is valid, and every mistake is one line."""

import copy
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from m2d.cli import build_parser
from m2d.distill.settings import DistillSettings
from m2d.errors import UserError
from m2d.pipeline.commands import token_options
from m2d.pipeline.schema import DistillationTokenSettings, Settings, TokensSettings
from m2d.pipeline.settings import check_config, load_config
from m2d.settings import as_options
from m2d.tokens.encode import BOS, LOSS_ON

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "config.yaml").read_text(encoding="utf-8"))


def changed(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """A copy with the dotted `key` set, or removed where `value` is ...."""
    config = copy.deepcopy(config)
    *parents, last = key.split(".")
    place: Any = config
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return config


def test_repository_config(original: dict[str, Any]) -> None:
    config = load_config(REPOSITORY / "config.yaml")
    assert config["students"]["do-acp-k4"]["scoring"] == "gld_reap"
    assert config["students"]["sf-wc-k16"]["grouping"] == "weight_cluster"
    assert config["pipelines"]["all_grid"]["students"] == []
    assert config["grid"]["groupings"][0] == "round_robin"
    tasks = config["evaluations"]
    shots = {task: e["shots"] for e in tasks.values() for task in e["tasks"]}
    papers = {"winogrande": 5, "hellaswag": 10, "arc_easy": 25, "arc_challenge": 25, "mmlu": 5}
    assert papers.items() <= shots.items()
    assert original["students"]["do-acp-k4-refit"]["scoring"] == "DO-ACP"


def test_a_teacher_needs_its_model_alone(original: dict[str, Any]) -> None:
    """The paper's five values of K and its tokens, of nothing but a name on the hub."""
    assert original["teachers"]["qwen3-30b-a3b"] == {"model": "Qwen/Qwen3-30B-A3B"}
    teacher = load_config(REPOSITORY / "config.yaml")["teachers"]["qwen3-30b-a3b"]
    assert (teacher["experts"], teacher["top_k"]) == (128, 8)
    assert teacher["batch"] == 4
    assert teacher["tokens"]["calibration"] == {
        "dataset": "fineweb-edu",
        "sequences": 512,
        "length": 2048,
    }
    assert teacher["keeps"] == [8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("recipes.demo.learning_rat", 1, "recipes.demo: unknown key 'learning_rat'; did you mean "
         "learning_rate? allowed: steps, batch"),
        ("recipe", {}, "unknown key 'recipe'; did you mean recipes?"),
        ("recipes.demo.steps", ..., "recipes.demo: the key steps is missing (Optimizer"),
        ("recipes.demo.learning_rate", "fast", "demo.learning_rate: 'fast' is not a number"),
        ("recipes.demo.learning_rate", True, "recipes.demo.learning_rate: True is not a number"),
        ("recipes.demo.learning_rate", "inf", "learning_rate: 'inf': must be a finite number"),
        ("recipes.demo.steps", "1.5", "recipes.demo.steps: 1.5: must be a valid integer"),
        ("recipes.demo.steps", [1] * 999, "recipes.demo.steps: must be a valid integer"),
        ("students.d2d.baseline", "d3d", "students.d2d.baseline: unknown value 'd3d'; did you "
         "mean d2d? allowed: d2d, random_ffn, random_init"),
        ("students.d2d.baseline", "neurons", "students.d2d.baseline: unknown value 'neurons'; "),
        ("students.d2d.baseline", ["d2d"], "students.d2d.baseline: unknown value \"['d2d']\"; "),
        ("recipes.demo.learning_rate", 0, "recipes.demo.learning_rate: 0: must be greater than 0"),
        ("recipes.demo.decay", "lineer", "recipes.demo.decay: unknown value 'lineer'; did you mean "
         "linear? allowed: linear, cosine, 1-sqrt"),
        ("recipes.demo.warmup_steps", 79, "recipes.demo.steps: 80 is less than"),
        ("recipes.demo.min_learning_rate", 1, "recipes.demo.min_learning_rate: 1 is more than"),
        ("recipes.paper-300m-stored.loss", "reverse_kl", "recipes.paper-300m-stored.loss: "
         "reverse_kl, but with teacher_logits it is forward_kl"),
        ("students.top-k8.keep", 10, "students.top-k8.keep: 10 is not among teachers.qwen3-30b-a3b"
         ".keeps, 8, 16, 32, 64, 128"),
        ("students.top-k8.best_of", [], "students.top-k8.best_of: "),
        ("recipes.paper-300m-stored.teacher_logits.kind", "best", "kind: unknown value 'best'"),
        ("recipes.paper-4b.gpus", 7, "paper-4b.batch: 384 is not a multiple of device_batch times"),
        ("students.do-acp-k4-refit.scoring", "DO-APC", "students.do-acp-k4-refit.scoring: unknown "
         "scoring 'DO-APC'; did you mean gld_reap?"),
        ("students.do-acp-k4-refit.keep", 3, "students.do-acp-k4-refit.keep: 3 experts cannot "
         "be kept of demo; from 4 (its top_k) to 32"),
        ("students.do-acp-k4-refit.keep", ..., "students.do-acp-k4-refit: the key keep of a "
         "student of experts is missing (K, the number"),
        ("students.neurons-refit.keep", 4, "students.neurons-refit: unknown key 'keep' of a "
         "student of neurons; allowed: fold, refit, weighting, align, neurons, width, params, "
         "multiple"),
        ("students.neurons-fold-align.align", 0, "students.neurons-fold-align.align: 0: must be"),
        ("students.neurons-fold.fold", "nueron", "students.neurons-fold.fold: unknown value "
         "'nueron'; did you mean neuron?"),
        ("students.neurons-refit", {"neurons": "greedy", "width": 8, "params": 9},
         "students.neurons-refit: width and params exclude each other"),
        ("students.neurons-refit", {"neurons": "greedy", "weighting": "equal"},
         "students.neurons-refit: weighting is of use with refit alone"),
        ("datasets.demo-test", {"mix": {"demo-trian": 1, "wikitext-2": 2}}, "demo-test.mix."
         "demo-trian: unknown name in datasets 'demo-trian'; did you mean demo-train?"),
        ("datasets.demo-test", {"mix": {"demo-test": 1, "wikitext-2": 2}}, "demo-test.mix."
         "demo-test: is itself of several parts"),
        ("datasets.demo-test", {"mix": {"demo-train": 0, "wikitext-2": 2}}, "mix.demo-train: 0: "),
        ("students.d2d.layers", ..., "students.d2d: the key layers of a student of d2d is missing"),
        ("students.d2d.baseline", "random_ffn", "unknown key 'layers' of a student of "
         "random_ffn; allowed: baseline"),
        ("students.do-acp-k4-refit.layers", 4, "students.do-acp-k4-refit: unknown key 'layers' of "
         "a student of experts; allowed: fold, refit"),
        ("pipelines.all_baselines.teachers", ["demo"], "students.d2d is made from no teacher of "
         "it; none of demo is dense"),
        ("pipelines.all_demo.teachers", ["demo-dense"], "pipelines.all_demo.scorings: none of its "
         "teachers has experts"),
        ("teachers.demo.model", "no/such", "teachers.demo: no/such: nothing is known of it ("),
        ("pipelines.all_demo.each", {"all_a": "demo"}, "all_demo: needs teachers or each, one of"),
        ("pipelines.further-teachers.each", {"all_demo": "demo"}, "all_demo stands there twice"),
        ("pipelines.all_demo.students.0", "{sf,cp", "all_demo.students.0: '{sf,cp': a brace"),
        ("pipelines.all_demo.students.0", "sf-k{topk}", "students.0: {topk}: neither top_k, 2*"),
        ("pipelines.all_demo.students.0", "sf-k{2*experts}", "students.sf-k64.keep: 64 experts "
         "cannot be kept of demo"),
        ("pipelines.further-teachers.each", {"all_x": ["emo", "gpt-oss-20b"]}, "pipelines.all_x."
         "distill.0.student: {sf,cp,acp,do-acp}-k{top_k}: not the same for all its teachers"),
        ("teachers.demo.keeps", [4, 33], "teachers.demo.keeps.1: 33 experts cannot be kept"),
        ("teachers.demo.shares", 9, "teachers.demo.shares: 9 jobs cannot share 8 batches (128"),
        ("teachers.demo.top_k", 40, "teachers.demo.top_k: 40, but "),
        ("teachers.demo.tokens.test.dataset", "demo-tst", "teachers.demo.tokens.test.dataset: "
         "unknown name in datasets 'demo-tst'; did you mean demo-test?"),
        ("teachers.demo.tokens.distillation", ..., "pipelines.all_demo.distill: "
         "teachers.demo.tokens has no `distillation`; add it"),
        ("teachers.Demo", {}, "'Demo': lower-case letters"),
        ("datasets.mine", {}, "datasets.mine: has 0 keys; exactly one of corpus, files, hub"),
        ("datasets.demo-test", {"corpus": "tests"}, "datasets.demo-test.corpus: unknown value"),
        ("recipes.merged", {"steps": 1, "learning_rate": 1, "gpus": 0, "mem_mb": 1, "runtime": 1},
         "recipes.merged: this name is reserved"),
        ("pipelines.all_demo.students.0", "do-acp", "all_demo.students.0: unknown name in "
         "students 'do-acp'; did you mean do-acp-k"),
        ("pipelines.all_demo.scorings", ["SF", "sf"], "scorings: selection_freq may stand"),
        ("pipelines.demo", {"teachers": []}, "pipelines.demo: a pipeline is a target"),
        ("pipelines.all_demo.distill.0.recipe", "dem", "pipelines.all_demo.distill.0.recipe: "
         "unknown name in recipes 'dem'; did you mean demo?"),
        ("evaluations.mmlu.tasks", ["winogrande"], "evaluations.mmlu.tasks: winogrande stands in"),
        ("evaluations.mmlu.tasks", ["mmlu", "../../escaped"], "evaluations.mmlu.tasks.1: "
         "'../../escaped' is no task's name; "),
        ("grid.groupings", ["RR", "round_robin"], "groupings: round_robin may stand"),
    ],
)  # fmt: skip
def test_mistakes(original: dict[str, Any], key: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as raised:
        check_config(changed(original, key, value))
    text = str(raised.value)
    assert text.startswith("config: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("values", [None, [], "text"])
def test_not_a_mapping(values: object) -> None:
    with pytest.raises(UserError, match="config: "):
        check_config(values)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9")
    with pytest.raises(UserError, match="0xe9 is not UTF-8"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(UserError, match="not YAML"):
        load_config(tmp_path / "broken.yaml")


def test_numbers_that_yaml_reads_as_text(original: dict[str, Any]) -> None:
    """1e-4 is text to YAML 1.1, which wants a dot: 1.0e-4."""
    text = yaml.safe_load("{learning_rate: 1e-4, steps: 1e3, warmup_steps: '5'}")
    assert text == {"learning_rate": "1e-4", "steps": "1e3", "warmup_steps": "5"}
    recipe = {**original["recipes"]["demo"], **text}
    found = check_config(changed(original, "recipes.demo", recipe))["recipes"]["demo"]
    assert {key: found[key] for key in text} == {
        "learning_rate": 1e-4,
        "steps": 1000,
        "warmup_steps": 5,
    }
    assert type(found["steps"]) is int


def test_a_recipe_is_the_options_of_distill(original: dict[str, Any]) -> None:
    """What the workflow passes, the command parses back to the same values."""
    recipe = check_config(original)["recipes"]["paper-4b"]
    words = as_options(recipe, DistillSettings.model_fields)
    assert words[:2] == ["--steps", "5086"]
    assert "--gradient-checkpointing" in words
    args = build_parser("distill").parse_args(["distill", "s", "t", "o", "--tokens", "f", *words])
    for name in DistillSettings.model_fields:
        assert getattr(args, name) == recipe.get(name), name


def test_every_key_is_described() -> None:
    schema = Settings.model_json_schema()
    undescribed = [
        f"{section}.{name}"
        for section, node in {**schema["$defs"], "Settings": schema}.items()
        for name, child in node["properties"].items()
        if "description" not in child and "$ref" not in child
    ]
    assert undescribed == []
    assert all(node["additionalProperties"] is False for node in schema["$defs"].values())


def test_the_schema_for_editors_is_the_models() -> None:
    """`make schema` writes it; a stock validator takes the repository's config by it."""
    file = REPOSITORY / "workflow" / "schemas" / "config.schema.json"
    schema = json.loads(file.read_text(encoding="utf-8"))
    assert schema == Settings.model_json_schema()


def test_token_sequences_take_the_options_of_tokenize() -> None:
    kinds = DistillationTokenSettings.model_fields
    words = {"bos": BOS, "loss_on": LOSS_ON}
    for name, known in words.items():
        choices = get_args(get_args(kinds[name].annotation)[0])
        assert choices == tuple(known)
    tokens = {"dataset": "chats", "sequences": 4, "length": 16, "column": "turns of talk"}
    chosen = TokensSettings(
        calibration=tokens,
        test={**tokens, "bos": "none"},
        distillation={**tokens, "loss_on": "assistant"},
    ).model_dump(exclude_none=True)
    first = ["--sequences", "4", "--length", "16", "--column", "turns of talk"]
    assert token_options(chosen["calibration"]) == first
    assert token_options(chosen["test"]) == [*first, "--bos", "none"]
    assert token_options(chosen["distillation"]) == [*first, "--loss-on", "assistant"]
    parsed = build_parser("tokenize").parse_args(
        ["tokenize", "t", "o", "--text", "f", *token_options(chosen["distillation"])]
    )
    assert (parsed.loss_on, parsed.column) == ("assistant", "turns of talk")
    with pytest.raises(ValidationError, match="loss_on"):  # statistics are of all tokens
        TokensSettings(calibration={**tokens, "loss_on": "assistant"}, test=tokens)
