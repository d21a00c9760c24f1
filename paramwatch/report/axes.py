"""Scales and ticks: where a number is on a page, and which numbers are written beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paramwatch.columns import Array

_APART = 20.0
"""From so many times between the least and the largest number on, a scale is logarithmic."""


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` as shares of a length, 0 to 1."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, values: Array, logarithmic: bool | None = None) -> Scale:
        """The scale of some numbers, none of them negative where it is logarithmic.

        Args:
            values: Any shape; NaN is left out, and zero where it is logarithmic.
            logarithmic: By default where the largest is more than 20 times the least.
        """
        known = values[np.isfinite(values)]
        positive = known[known > 0]
        if logarithmic is None:
            logarithmic = len(positive) > 0 and known.min() >= 0 and positive.max() > _APART * positive.min()
        known = positive if logarithmic else known
        if not len(known):
            return cls(1.0, 10.0, True) if logarithmic else cls(0.0, 1.0, False)
        low, high = float(known.min()), float(known.max())
        if low == high:
            low, high = (low / 2, high * 2) if logarithmic else (low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1))
        return cls(max(low, 5e-324) if logarithmic else low, min(high, 1.7e308), logarithmic)

    def share(self, values: Array) -> Array:
        """Where these numbers are: 0 at `low`, 1 at `high`; on a logarithmic scale zero is at 0."""
        with np.errstate(divide="ignore"):
            at = np.log(np.maximum(values, self.low)) if self.logarithmic else values / 2
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low / 2, self.high / 2)
        return np.clip((at - low) / (high - low), 0, 1)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers on it, at most so many."""
        return _decades(self.low, self.high, most) if self.logarithmic else rounds(self.low, self.high, most)


def rounds(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    reach = high / most - low / most
    size = 10.0 ** math.floor(math.log10(reach)) if reach > 0 else 1.0
    step = next((size * times for times in (1, 2, 5, 10, 20) if (high / size - low / size) / times <= most), size * 20)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)][: most + 1]


def _decades(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 1:
        fine = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        found = [value for value in fine if low * 0.999 <= value <= high * 1.001]
        return found[:most] or [low]
    stride = -(-(last - first + 1) // most)
    return [10.0**e for e in range(first, last + 1, stride)]


def written(value: float) -> str:
    """A number beside an axis."""
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 100_000:
        return f"{value:,.6g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"
