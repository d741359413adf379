"""Routing and Gram statistics against a brute-force pass over the stock model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, make_teacher, write_tokens
from transformers import AutoModelForCausalLM

from m2d import cli
from m2d.choose.layer_statistics import LayerStatistics
from m2d.errors import UserError
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.statistics import gram
from m2d.statistics.files import SUMS, read_layers, write_gram, write_routing
from m2d.statistics.gram import even_chunks, inner_products
from m2d.statistics.routing import routing_sums
from m2d.statistics.shards import share_rows
from m2d.statistics.sums import LongSum
from m2d.statistics.together import collect_statistics

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def layers(tiny_teacher: Path, tokens: torch.Tensor) -> list[LayerStatistics]:
    stream = StreamedTeacher(open_teacher(tiny_teacher), torch.float32, CPU)
    return collect_statistics(stream, tokens, batch=2)


@torch.no_grad()
def brute_force(folder: Path, tokens: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Every statistic, token by token and expert by expert, in float64 where sums are taken."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, i=i: inputs.__setitem__(i, args[0].flatten(0, 1))
        )
    model(tokens)
    results = []
    for i, layer in enumerate(model.model.layers):
        experts, router = layer.mlp.experts, layer.mlp.gate.weight
        count, k = 8, 2
        sums = {name: np.zeros(count) for name in ("n_selected", *SUMS)}
        gram, dot, square = np.zeros((count, count)), np.zeros(count), 0.0
        norms = np.zeros(count)
        for x in inputs[i]:
            p = torch.softmax(router @ x, 0).double().numpy()
            selected = np.argsort(-p)[:k]
            w = {e: p[e] / p[selected].sum() for e in selected}
            f = []
            for e in range(count):
                gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                f.append((experts.down_proj[e] @ inner).double().numpy())
            y = sum(w[e] * f[e] for e in selected)
            sums["prob_sum"] += p
            for e in selected:
                norm = np.linalg.norm(f[e])
                sums["n_selected"][e] += 1
                sums["prob_sum_selected"][e] += p[e]
                sums["weight_sum"][e] += w[e]
                sums["out_norm_sum_selected"][e] += norm
                sums["weighted_out_norm_sum"][e] += w[e] * norm
                sums["out_sq_norm_sum_selected"][e] += norm**2
            gram += np.array(f) @ np.array(f).T
            dot += np.array(f) @ y
            square += y @ y
            norms += np.linalg.norm(f, axis=1)
        flat = torch.cat(
            [experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], 1
        ).double()
        n = len(inputs[i])
        results.append(
            {
                **sums,
                "gram": gram / n,
                "output_dot": dot / n,
                "output_sq_norm": np.array(square / n),
                "output_norm": norms / n,
                "weight_gram": (flat @ flat.T).numpy(),
                "router_gram": (router.double() @ router.double().T).numpy(),
            }
        )
    return results


def test_every_statistic_equals_brute_force(
    tiny_teacher: Path, tokens: torch.Tensor, layers: list[LayerStatistics]
) -> None:
    expected = brute_force(tiny_teacher, tokens)
    assert len(expected) == len(layers) == 2
    for found, reference in zip(layers, expected, strict=True):
        assert found.routing.n_tokens == tokens.numel()
        for name, value in reference.items():
            part = found.routing if hasattr(found.routing, name) else found.gram
            np.testing.assert_allclose(
                getattr(part, name), value, rtol=2e-5, atol=1e-6, err_msg=f"{found.layer} {name}"
            )


def test_identities(layers: list[LayerStatistics], tokens: torch.Tensor) -> None:
    for layer in layers:
        routing, n = layer.routing, tokens.numel()
        assert routing.n_selected.sum() == 2 * n
        np.testing.assert_allclose(routing.prob_sum.sum(), n, rtol=1e-6)
        np.testing.assert_allclose(routing.weight_sum.sum(), n, rtol=1e-6)  # renormalised top-k
        gram = layer.gram.gram
        np.testing.assert_array_equal(gram, gram.T)
        assert np.linalg.eigvalsh(gram).min() > -1e-6 * np.trace(gram)


def test_batching_does_not_matter(
    tiny_teacher: Path, tokens: torch.Tensor, layers: list[LayerStatistics]
) -> None:
    stream = StreamedTeacher(open_teacher(tiny_teacher), torch.float32, CPU)
    for one, other in zip(layers, collect_statistics(stream, tokens, 5), strict=True):
        np.testing.assert_allclose(one.routing.prob_sum, other.routing.prob_sum, rtol=1e-6)
        # Terms of either sign cancel, so errors are measured by the lengths of the outputs.
        norms = np.sqrt(np.diag(one.gram.gram))
        np.testing.assert_array_less(
            np.abs(one.gram.gram - other.gram.gram), 1e-6 * np.outer(norms, norms)
        )


def test_sums_by_hand() -> None:
    """Two tokens, three experts, top-2."""
    sums = routing_sums(
        torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]),
        torch.tensor([[0, 1], [2, 1]]),
        torch.tensor([[0.6, 0.4], [0.8, 0.2]]),
        torch.tensor([[2.0, 3.0], [4.0, 5.0]]),
    )
    expected = {
        "n_selected": [1, 2, 1],
        "prob_sum": [0.6, 0.5, 0.9],
        "prob_sum_selected": [0.5, 0.5, 0.7],
        "weight_sum": [0.6, 0.6, 0.8],
        "out_norm_sum_selected": [2, 8, 4],
        "weighted_out_norm_sum": [1.2, 2.2, 3.2],
        "out_sq_norm_sum_selected": [4, 34, 16],
    }
    assert int(sums["n_tokens"]) == 2
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("parts", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inner_products_are_of_float32_accuracy(dtype: torch.dtype, parts: int) -> None:
    """Also for bfloat16 rows, whose products a plain matrix product would round to 3 digits; and
    for many chunks at a time, as a GPU takes them."""
    rows = torch.randn(70, 200_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, exact = inner_products(rows, parts), rows.double() @ rows.double().T
    error = (found - exact).abs().max() / exact.abs().max()
    assert error < 2e-6
    assert (found == found.T).all()
    assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


def test_chunks_are_even_and_whole_tiles() -> None:
    def sizes(tokens: int, limit: int) -> list[int]:
        chunks = even_chunks(tokens, limit)
        assert [chunk.stop for chunk in chunks[:-1]] == [chunk.start for chunk in chunks[1:]]
        assert (chunks[0].start, chunks[-1].stop) == (0, tokens)
        return [chunk.stop - chunk.start for chunk in chunks]

    assert sizes(2048, 757) == [704, 704, 640]
    assert sizes(2048, 4000) == [2048]
    assert sizes(100, 40) == [34, 34, 32]  # three tiles would exceed the limit
    assert sizes(5, 1) == [1] * 5


def test_small_chunks_give_the_same(
    tiny_teacher: Path,
    tokens: torch.Tensor,
    layers: list[LayerStatistics],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """13 tokens at once instead of all 24 of a batch."""
    monkeypatch.setattr(gram, "CHUNK_BYTES", 13 * 9 * 32 * 4)
    stream = StreamedTeacher(open_teacher(tiny_teacher), torch.float32, CPU)
    for one, other in zip(layers, collect_statistics(stream, tokens, 2), strict=True):
        rounding = 1e-6 * np.abs(one.gram.gram).max()  # of float32 products
        np.testing.assert_allclose(one.gram.gram, other.gram.gram, rtol=0, atol=rounding)
        np.testing.assert_allclose(
            one.gram.output_dot, other.gram.output_dot, rtol=0, atol=rounding
        )


def test_files_round_trip(tmp_path: Path, layers: list[LayerStatistics]) -> None:
    about = {"model_type": "qwen3_moe", "num_experts": 8, "top_k": 2, "calibration_sha256": "x"}
    write_routing(tmp_path / "s.parquet", {one.layer: one.routing for one in layers}, about)
    write_gram(tmp_path / "g.safetensors", {one.layer: one.gram for one in layers}, about)
    read = read_layers(tmp_path / "s.parquet", tmp_path / "g.safetensors")
    for found, reference in zip(read, layers, strict=True):
        assert (found.layer, found.top_k) == (reference.layer, 2)
        np.testing.assert_array_equal(found.routing.prob_sum, reference.routing.prob_sum)
        np.testing.assert_array_equal(found.gram.gram, reference.gram.gram.astype(np.float32))
    write_gram(
        tmp_path / "g.safetensors",
        {one.layer: one.gram for one in layers},
        {**about, "calibration_sha256": "y"},
    )
    with pytest.raises(UserError, match="calibration_sha256 is 'y'"):
        read_layers(tmp_path / "s.parquet", tmp_path / "g.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a file of any kind", b"PAR1PAR1"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(UserError, match="not a routing statistics file"):
        read_layers(tmp_path / "s", tmp_path / "s")


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def shares(tiny_teacher: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory):
    """For stats and gram: the file of one job, and those of three shares; batches of 1."""
    folder = tmp_path_factory.mktemp("shares")
    write_tokens(folder / "tokens", tokens, {})
    for kind in ("stats", "gram"):
        options = ["--tokens", folder / "tokens", "--batch", 1]
        assert run(kind, tiny_teacher, folder / kind, *options) == 0
        for i in (1, 2, 3):
            out = folder / f"{kind}-{i}"
            assert run(kind, tiny_teacher, out, *options, "--share", f"{i}/3") == 0
    return folder


@pytest.mark.parametrize("kind", ["stats", "gram"])
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shares_add_up_to_the_bytes_of_one_job(
    shares: Path, tmp_path: Path, kind: str, order: tuple[int, ...]
) -> None:
    parts = [shares / f"{kind}-{i}" for i in order]
    assert run("combine", tmp_path / "all", *parts) == 0
    assert (tmp_path / "all").read_bytes() == (shares / kind).read_bytes()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["stats-1", "stats-3"], "sequences 1 to 2 are missing"),
        (["stats-1", "stats-2"], "sequences 3 to 4 are missing"),
        (["stats-2", "stats-3"], "sequences 0 to 0 are missing"),
        (["stats-1", "stats-2", "stats-2", "stats-3"], "sequences 1 to 2 stand in two shares"),
        (["stats-1", "gram-2", "stats-3"], "kind is 'gram', but 'routing'"),
        (["stats-1", "stats", "stats-3"], "not a share"),
    ],
)
def test_shares_that_do_not_go_together(
    shares: Path, tmp_path: Path, capsys: pytest.CaptureFixture, parts: list[str], message: str
) -> None:
    assert run("combine", tmp_path / "all", *(shares / part for part in parts)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


def test_shares_of_another_teacher(
    shares: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = make_teacher(tmp_path / "other", seed=1)
    options = ["--tokens", shares / "tokens", "--batch", 1, "--share", "3/3"]
    assert run("stats", other, tmp_path / "third", *options) == 0
    parts = [shares / "stats-1", shares / "stats-2", tmp_path / "third"]
    assert run("combine", tmp_path / "all", *parts) == 2
    assert "teacher_fingerprint is" in capsys.readouterr().err


def test_shares_are_whole_batches() -> None:
    rows = [share_rows((i, 3), sequences=11, batch=2) for i in (1, 2, 3)]
    assert rows == [slice(0, 4), slice(4, 8), slice(8, 11)]
    with pytest.raises(UserError, match="at most 3 shares"):
        share_rows((1, 4), sequences=11, batch=4)


def test_a_sum_keeps_what_rounding_takes() -> None:
    """1e16 + 1 is not a float64; naively the ones below would all be lost."""
    terms = [np.array([1e16]), *[np.array([1.0])] * 10, np.array([-1e16])]
    forward, backward = LongSum(np.zeros(1)), LongSum(np.zeros(1))
    for term in terms:
        forward.add(term)
    for term in reversed(terms):
        backward.add(term)
    forward.merge(backward)
    assert backward.value == [10.0]
    assert forward.value == [20.0]
