"""The Gram stage's FLOP/s against a large bf16 matrix product, and its error against float64."""

import argparse

import torch
from common import clock_of, compute_on, cpu_time_option, device_option, report, side_by_side
from torch import nn

from m2d.models.experts import StackedExperts
from m2d.models.visit import Visit
from m2d.statistics.gram import GramTotals, inner_products

EXPERTS, WIDTH, HIDDEN, TOP_K = 128, 768, 2048, 8
PRODUCT = 4096  # rows and columns; on a GPU twice that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    cpu_time_option(parser)
    device_option(parser)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    clock, timing = clock_of(args.cpu_time, args.device)
    compute = compute_on(args.device)
    torch.set_default_device(args.device)
    tokens = args.tokens
    torch.manual_seed(0)
    make = {"dtype": torch.bfloat16}  # as on disk; the products are in `compute`
    experts = StackedExperts(
        torch.empty(EXPERTS, 2 * WIDTH, HIDDEN, **make).normal_(0, 0.02),
        torch.empty(EXPERTS, HIDDEN, WIDTH, **make).normal_(0, 0.02),
        "silu",
    )
    router = nn.Linear(HIDDEN, EXPERTS, bias=False).to(torch.bfloat16)
    router.requires_grad_(False)
    hidden = torch.randn(tokens, HIDDEN).to(compute)
    index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
    weights = torch.full((tokens, TOP_K), 1 / TOP_K, dtype=compute)
    totals, batch = GramTotals(), Visit(0, router, experts, hidden, index, weights, weights)
    # The first batch also computes the weights' own Gram matrix, once a layer.
    totals.visit(Visit(0, router, experts, *(x[:8] for x in (hidden, index, weights, weights))))
    size = PRODUCT if args.device.type == "cpu" else 2 * PRODUCT
    a, b = (torch.randn(size, size).to(compute) for _ in range(2))
    times = side_by_side(
        {
            "gram": lambda: totals.visit(batch),
            "product": lambda: a @ b,
        },
        repeats=args.repeats,
        clock=clock,
    )
    expert_flops = 6 * tokens * EXPERTS * WIDTH * HIDDEN
    gram_flops = tokens * EXPERTS * (EXPERTS + 1) * HIDDEN
    achieved = (expert_flops + gram_flops) / times["gram"]
    machine = 2 * size**3 / times["product"]
    report(
        "Gram FLOP/s / the fastest matrix product's FLOP/s",
        achieved / machine,
        ">= 0.6",
        f"{tokens} tokens, {EXPERTS} experts of {WIDTH}, hidden {HIDDEN}, bfloat16 weights; FLOPs "
        "counted: all "
        f"experts on all tokens, one triangle; against {size}^3; medians of {args.repeats} in "
        f"turns; "
        f"{timing}",
        gram_gflops=round(achieved / 1e9),
        product_gflops=round(machine / 1e9),
    )
    rows = torch.randn(EXPERTS, 500 * HIDDEN).to(torch.bfloat16)
    exact = rows.double() @ rows.double().T
    error = float((inner_products(rows) - exact).abs().max() / exact.abs().max())
    plain = float(((rows @ rows.T).double() - exact).abs().max() / exact.abs().max())
    report(
        "Gram error against float64, largest over largest",
        error,
        "stated",
        f"{EXPERTS} random bf16 rows of {rows.shape[1]}; a plain bf16 product for comparison",
        plain_bf16_product=plain,
    )


if __name__ == "__main__":
    main()
