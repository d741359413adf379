"""Routing and Gram statistics of every layer, from one pass of the calibration tokens."""

from torch import Tensor

from m2d.choose.layer_statistics import LayerStatistics
from m2d.models.folded import Folds
from m2d.models.resume import Keeper, Together
from m2d.models.stream import StreamedTeacher
from m2d.statistics.gram import GramTotals
from m2d.statistics.routing import RoutingTotals


def collect_statistics(
    stream: StreamedTeacher,
    tokens: Tensor,
    batch: int,
    folds: Folds | None = None,
    keep_pass: Keeper | None = None,
) -> list[LayerStatistics]:
    """Both kinds of statistics of every MoE layer, from one pass of tokens [S, T]."""
    teacher = stream.teacher
    routing, gram = RoutingTotals(teacher), GramTotals(folds)
    both = Together(routing=routing, gram=gram)
    kept = keep_pass and keep_pass("statistics", both)
    stream.run(tokens, batch, both.visit, "calibrating, layers", kept)
    routings, grams = routing.result(), gram.result()
    return [
        LayerStatistics(layer, teacher.top_k, routings[layer], grams[layer])
        for layer in teacher.moe_layers
    ]
