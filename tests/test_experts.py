"""Stacked experts: the routed output, in the precision of a CPU's matrix units."""

import torch

from m2d.models.experts import TILE, StackedExperts, whole_tiles


def test_products_of_whole_tiles_change_nothing() -> None:
    """Experts with 1, 31, 32 and 33 tokens: each row as it is alone, and no expert for none."""
    torch.manual_seed(0)
    counts = [1, TILE - 1, TILE, TILE + 1, 0]
    experts = StackedExperts(
        torch.randn(5, 12, 16).bfloat16() / 4, torch.randn(5, 16, 6).bfloat16() / 2, "silu"
    )
    hidden = torch.randn(sum(counts), 16).bfloat16()
    index = torch.arange(5).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(len(index))
    index = index[order][:, None]
    weights = torch.rand(len(index), 1).bfloat16()
    seen: list[torch.Tensor] = []
    experts.observer = lambda *batch: seen.append(batch[3])
    found = experts(hidden, index, weights)
    for row, (expert,) in enumerate(index.tolist()):
        alone = experts.output(expert, hidden[row : row + 1].float().bfloat16())[0]
        torch.testing.assert_close(found[row], alone * weights[row], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(seen[0][row, 0], alone.float().norm(), rtol=1e-2, atol=1e-2)


def test_only_half_precision_on_a_cpu_is_rounded_up() -> None:
    tokens = torch.tensor([7, 3, 5])
    assert whole_tiles(tokens, torch.zeros(9, 2)).tolist() == [7, 3, 5]
    padded = whole_tiles(tokens, torch.zeros(9, 2, dtype=torch.bfloat16)).tolist()
    assert padded == [7, 3, 5] + [7] * (TILE - 3)
    assert len(whole_tiles(tokens[:0], torch.zeros(9, 2, dtype=torch.bfloat16))) == 0
