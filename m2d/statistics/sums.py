"""Sums that come out the same in whatever order, and in however many parts, they are taken."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class LongSum:
    """A sum of float64 arrays as `high` + `low`, what rounding took from `high`.

    About 106 bits are kept (Knuth's TwoSum), so that `value`, which is rounded once, depends on the
    order of the terms in no practical case.
    """

    def __init__(self, high: Array, low: Array | None = None):
        self.high, self.low = high, np.zeros_like(high) if low is None else low

    def add(self, term: Array) -> None:
        """Add an array of the same shape."""
        total = self.high + term
        taken = total - self.high
        self.low = self.low + ((self.high - (total - taken)) + (term - taken))
        self.high = total

    def merge(self, other: "LongSum") -> None:
        """Add another sum."""
        self.add(other.high)
        self.low = self.low + other.low

    @property
    def value(self) -> Array:
        """The sum, float64."""
        return self.high + self.low
