"""Recipes of `m2d convert`: names for what is to be done to a teacher, option by option."""

from dataclasses import dataclass, replace
from typing import Any

from m2d.errors import UserError


@dataclass(frozen=True)
class Conversion:
    """How a student is made, but for its size and its calibration tokens."""

    granularity: str = "experts"
    choice: str = "contribution"
    scaling: str | None = None
    """None: uniform, or least squares where experts are folded."""
    fold: str | None = None
    alpha: float = 1.0
    refit: str | None = None
    weighting: str = "equal"
    align: int = 0
    """Steps of each layer's training; 0 for none."""


RECIPES = {
    "paper": Conversion(),
    "best": Conversion(
        granularity="neurons", choice="greedy", fold="neuron", refit="sequential", align=160
    ),
}


def settled(recipe: str | None, given: dict[str, Any]) -> Conversion:
    """The recipe ("paper" by default), with what is `given` (not None) in place of its own.

    Raises UserError for an unknown recipe.
    """
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    chosen = RECIPES[recipe or "paper"]
    return replace(chosen, **{name: value for name, value in given.items() if value is not None})
