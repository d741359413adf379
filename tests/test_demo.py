"""The demo's corpus, balance loss, n-gram baselines, and the committed teacher's files."""

import itertools
import json
import re
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Qwen3ForCausalLM

from m2d.demo import baselines, corpus, measure, teacher
from m2d.refit.muon import orthogonalise

COMMITTED = Path(__file__).parents[1] / "workflow" / "resources" / "demo-teacher"


# --- the corpus -------------------------------------------------------------------------


DOMAINS = {"networkx": ("networkx",), "nltk": ("nltk",)}


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    """The documents of two small domains, by the same code as the whole corpus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "DOMAINS", DOMAINS)
        return corpus.build_corpus()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "_x__Y9 100 00.250 a\tb\n\n c\x00d\x1fe\x7f",
        "".join(map(chr, range(128))) * 2,
        "caf\u00e9 \u0663\u0664 12 \u00a0 x\u2003y \ud55c\uad6d",
    ],
)
def test_normalise_is_what_it_says(text: str) -> None:
    words = re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text.lower())).strip()
    assert corpus.normalise(text) == words


def test_every_domain_and_split_has_documents(documents: list[corpus.Document]) -> None:
    found = {(d.domain, d.split) for d in documents}
    assert found == set(itertools.product(DOMAINS, corpus.SPLITS))


def test_the_corpus_takes_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus, "DOMAINS", {"nltk": ("nltk",)})
    whole = corpus._sources()
    missing = {"a": ("no_such_package",), "nltk": ("nltk", "nor_this_one")}
    monkeypatch.setattr(corpus, "DOMAINS", missing)
    capsys.readouterr()
    assert corpus._sources() == whole != []
    assert "without no_such_package, nor_this_one, which are not" in capsys.readouterr().err


def test_splits_share_no_document_and_no_paragraph(documents: list[corpus.Document]) -> None:
    owner: dict[str, str] = {}
    for d in documents:
        for paragraph in corpus.paragraphs(d.text):
            key = corpus.normalise(paragraph)
            if len(key) >= corpus.HEADING:
                assert owner.setdefault(key, d.split) == d.split, paragraph
    assert len({(d.domain, d.name) for d in documents}) == len(documents)
    assert len(owner) > 1000


def test_documents_as_found_are_longer_and_no_two_the_same(
    documents: list[corpus.Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "DOMAINS", DOMAINS)
    found = {d.name: d for d in corpus.build_corpus(clean=False)}
    assert len({d.text for d in found.values()}) == len(found)
    shorter = 0
    for d in documents:
        assert (d.domain, d.split) == (found[d.name].domain, found[d.name].split)
        kept, whole = corpus.paragraphs(d.text), corpus.paragraphs(found[d.name].text)
        assert set(kept) <= set(whole)
        shorter += len(kept) < len(whole)
    assert shorter > 10


def test_split_depends_on_the_name_alone(documents: list[corpus.Document]) -> None:
    for d in documents:
        assert d.split == corpus.split_of(d.name.split("#")[0])


def test_split_proportions() -> None:
    splits = [corpus.split_of(f"package/module.py:f{i}") for i in range(20_000)]
    for split in ("calibration", "test"):
        assert splits.count(split) / len(splits) == pytest.approx(0.03, abs=0.005)


def test_corpus_files_are_the_same_in_another_process(
    documents: list[corpus.Document], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom m2d.demo import corpus\n"
        f"corpus.DOMAINS = {DOMAINS}\n"
        "if __name__ == '__main__': corpus.write_corpus(Path(sys.argv[1]))\n"
    )
    out = tmp_path / "corpus"
    # Python's own string hashes differ between processes, and must not matter.
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, str(script), str(out)], check=True, env=environment)
    assert {path.name for path in out.iterdir()} == {f"{s}.jsonl" for s in corpus.SPLITS}
    for split in corpus.SPLITS:
        lines = (out / f"{split}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        expected = [
            {"text": d.text, "domain": d.domain, "name": d.name}
            for d in documents
            if d.split == split
        ]
        assert sorted(found, key=itemgetter("name")) == sorted(expected, key=itemgetter("name"))
        # Whoever reads the beginning of a file sees every domain.
        assert {line["domain"] for line in found[:30]} >= set(DOMAINS) or len(found) < 30


def test_deduplicate_on_a_constructed_example() -> None:
    first = (
        "Compute the eigenvalues of a matrix.\n\nParameters:\n\n"
        "a : array of shape (3, 3)\nb : another array, for the generalised problem"
    )
    copy = "COMPUTE the  eigenvalues\tof a matrix!"
    near = (  # two of three lines are known, up to digits and case
        "A : array of shape (4, 4)\nb : Another array, for the generalised problem\n"
        "c : something that is quite new here"
    )
    fresh = "Solve a linear system of equations."
    second = f"{copy}\n\nParameters:\n\n{near}\n\nParameters:\n\n{fresh}"
    assert list(corpus.deduplicate([first, second])) == [first, f"Parameters:\n\n{fresh}"]


def test_held_out_copies_with_other_line_breaks_are_dropped() -> None:
    words = [f"word{chr(97 + i)}" for i in range(26)]
    known = " ".join(words)
    rewrapped = " ".join(words[:13]) + "\n" + " ".join(words[13:])
    fresh = " ".join(reversed(words))
    other = " ".join(words[::2] + words[1::2])
    made = [
        corpus.Document("d", "c", f"{rewrapped}\n\n{fresh}", "calibration"),
        corpus.Document("d", "e", f"{fresh}\n\n{other}", "test"),
        corpus.Document("d", "a", known, "train"),
        corpus.Document("d", "b", rewrapped, "train"),  # train documents stay as they are
    ]
    cleaned = {d.name: d.text for d in corpus.clean_held_out(made)}
    assert cleaned == {"a": known, "b": rewrapped, "c": fresh, "e": other}


def test_documents_in_a_source() -> None:
    long = "What this does, at some length. " * 5
    source = (
        f'"""{long}module"""\n'
        f'class A:\n    """{long}class"""\n    def f(self):\n        """{long}method"""\n'
        f'def short():\n    """Too short."""\n'
        f'add_newdoc("abs", """{long}call""")\n'
        f'query("""{long}no documentation""")\n'
    )
    found = dict(corpus.documents_in(source, "p/m.py"))
    assert found == {
        "p/m.py": f"{long}module",
        "p/m.py:A": f"{long}class\n\n{long}method",
        "p/m.py:add_newdoc.abs": f"{long}call",
    }
    assert corpus.documents_in("def broken(:", "p/m.py") == []


# --- the teacher's training -------------------------------------------------------------


def test_balance_loss_by_hand() -> None:
    """Two tokens, three experts, top-2: shares 1/2, 1/4, 1/4; mean probabilities .45, .35, .2."""
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.4, 0.3]])
    selected = torch.tensor([[0, 1], [2, 0]])
    loss = teacher.balance_loss(probabilities.log(), selected)
    assert loss.item() == pytest.approx(3 * (0.5 * 0.45 + 0.25 * 0.35 + 0.25 * 0.2), rel=1e-5)


def test_balance_is_per_layer_and_reaches_the_routers() -> None:
    """Two layers that prefer different experts are balanced in the pool, but not each by itself."""
    one = torch.tensor([[4.0, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, 4.0]], requires_grad=True)
    losses = [
        teacher.balance_loss(one, torch.tensor([[0]])),
        teacher.balance_loss(other, torch.tensor([[1]])),
    ]
    pooled = teacher.balance_loss(torch.cat([one, other]), torch.tensor([[0], [1]]))
    assert pooled.item() == pytest.approx(1.0)
    assert all(loss.item() > 1.9 for loss in losses)
    sum(losses).backward()
    assert one.grad is not None
    assert one.grad[0, 0] > 0 > one.grad[0, 1]  # descent moves probability to the unused expert


def test_orthogonalise_gives_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 20, 50), (3, 50, 20)):
        made = orthogonalise(torch.randn(shape, generator=generator), torch.bfloat16).float()
        singular = torch.linalg.svdvals(made)
        assert made.shape == shape
        assert singular.min() > 0.5
        assert singular.max() < 1.4


def test_schedule_before_its_decay_does_not_depend_on_the_number_of_steps() -> None:
    assert [teacher.schedule(s, 1000) for s in range(400)] == [
        teacher.schedule(s, 4000) for s in range(400)
    ]
    assert teacher.schedule(999, 1000) == pytest.approx(1 / 500)


def test_batches_resume_where_they_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "BATCH", 2)
    documents = [np.arange(100, dtype=np.int32) + i for i in range(40)]  # 7 batches per epoch
    whole = list(itertools.islice(teacher.batches(documents, seed=3, skip=0), 20))
    resumed = list(itertools.islice(teacher.batches(documents, seed=3, skip=9), 11))
    assert all(torch.equal(a, b) for a, b in zip(whole[9:], resumed, strict=True))
    assert not torch.equal(whole[0], whole[7])  # each epoch has an order of its own


def test_mutual_information_by_hand() -> None:
    assert measure.mutual_information(torch.tensor([[5, 0], [0, 5]])) == pytest.approx(1.0)
    assert measure.mutual_information(torch.tensor([[2, 4], [1, 2]])) == pytest.approx(0.0)


def test_the_dense_teacher_has_the_size_of_the_other_and_can_be_trained(
    documents: list[corpus.Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "build_corpus", lambda: documents[:150])
    monkeypatch.setattr(teacher, "BATCH", 2)
    torch.manual_seed(0)
    fresh = dict(teacher.new_model(True, 0).named_parameters())
    teacher.train_teacher(tmp_path / "dense", steps=2, dense=True)

    weights = tmp_path / "dense" / "model.safetensors"
    assert weights.stat().st_size <= 10_000_000
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.dtype == torch.bfloat16
    moe = teacher.new_model(False, 0).num_parameters()
    assert abs(model.num_parameters() / moe - 1) < 0.002
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    assert all(not torch.equal(p, fresh[name].bfloat16()) for name, p in matrices)
    texts = [d.text for d in documents[:20]]
    found = measure.measure_teacher(tmp_path / "dense", texts, [d.domain for d in documents[:20]])
    assert found["usage"] == []
    assert 1 < found["perplexity"] < 4096 * 1.2


# --- the n-gram baselines ---------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_probabilities_sum_to_one(order: int) -> None:
    train = np.random.default_rng(0).integers(0, 4, (1, 60)).astype(np.int32) % 3
    vocabulary = 4  # token 3 never occurs
    for context in itertools.product(range(vocabulary), repeat=2):
        test = np.array([[*context, token] for token in range(vocabulary)], dtype=np.int32)
        p = baselines.ngram_probabilities(train, test, vocabulary, order)
        assert p.shape == (vocabulary, 2)
        assert p[:, 1].sum() == pytest.approx(1.0)
        assert (p > 0).all()


def test_bigram_by_hand() -> None:
    """Train on 0 1 0 1 0 2 with a vocabulary of 4: the bigrams 01 x2, 10 x2, 02 x1."""
    train = np.array([[0, 1, 0, 1, 0, 2]], dtype=np.int32)
    p = baselines.ngram_probabilities(train, np.array([[0, 1, 3]], dtype=np.int32), 4, 2)
    # Left contexts: 1 of 0, 1 of 1, 1 of 2, so n1 = 3, n2 = 0, discount 1: all mass is uniform's.
    unigram = 1 / 4
    # Bigram counts 2, 2, 1: n1 = 1, n2 = 2, discount 1/5.
    after_zero = (2 - 0.2 + 0.2 * 2 * unigram) / 3
    after_one = (0 + 0.2 * 1 * unigram) / 2
    assert p[0] == pytest.approx([after_zero, after_one])
    assert baselines.ngram_perplexity(
        train, np.array([[0, 1, 3]], dtype=np.int32), 4, 2
    ) == pytest.approx((after_zero * after_one) ** -0.5)


# --- the committed teacher --------------------------------------------------------------


def test_committed_teacher_is_small_and_in_the_hub_layout() -> None:
    weights = COMMITTED / "model.safetensors"
    assert weights.stat().st_size <= 10_000_000
    config = json.loads((COMMITTED / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (32, 4)
    assert config["norm_topk_prob"] is True
    assert "_name_or_path" not in config
    expected = {
        f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"
        for layer in range(4)
        for e in range(32)
        for part in ("gate", "up", "down")
    } | {f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)}
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    assert {name for name in names if ".mlp." in name} == expected
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) <= 5_000_000


def test_committed_teacher_is_a_language_model() -> None:
    """On a text of its kind it is far better than a guess among 4096 tokens, and ends with one."""
    model = teacher.Qwen3MoeForCausalLM.from_pretrained(COMMITTED, dtype=torch.float32).eval()
    tokenizer = teacher.load_tokenizer(COMMITTED)
    text = "Returns\n-------\nout : ndarray\n    An array of the same shape as the input."
    ids = torch.from_numpy(teacher.encode(tokenizer, [text])[0]).long()[None]
    assert ids[0, -1] == model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(ids[0, :-1]) == text
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.0  # a uniform guess is 8.3


def test_the_committed_teachers_have_the_chat_template_of_a_new_one() -> None:
    for folder in (COMMITTED, COMMITTED.with_name("demo-dense-teacher")):
        tokenizer = teacher.load_tokenizer(folder)
        assert tokenizer.chat_template == teacher.CHAT_TEMPLATE
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "a\n\nb\n\n"
