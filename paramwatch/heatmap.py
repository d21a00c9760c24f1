"""Heat maps as colours: magnitudes of many rows over many steps, on a logarithmic scale. What is drawn around them is for others.

Used for TensorBoard's pictures and for the report's. Levels are what is drawn: magnitudes from 0 up, `INFINITE` for whatever is not finite
and `MISSING` for what was not measured, so that the greatest of some levels is the one that must be seen of them. No torch, no pandas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from paramwatch.columns import Array
from paramwatch.png import gradient

MISSING, INFINITE = -1.0, math.inf

ZERO, NOT_MEASURED, NOT_FINITE = 0, 1, 2
"""Positions in the palette of what the scale has no colour for."""

PALETTE = ((0, 0, 0, 255), (222, 222, 226, 255), (255, 32, 64, 255), *gradient(253))
"""Colours as `png` takes them. What is not finite is red, of which the scale has nothing at all."""

MOST_DECADES = 8
"""Of a scale: what is smaller yet has the colour of its low end."""


def levels(values: Array, measured: Array | bool = True) -> Array:
    """Magnitudes as levels, float32: `INFINITE` where a value is NaN or infinite, `MISSING` where it was not measured."""
    magnitudes = np.abs(values).astype(np.float32)
    return np.where(measured, np.where(np.isnan(magnitudes), np.float32(INFINITE), magnitudes), np.float32(MISSING))


def pool(found: Array, height: int, width: int) -> Array:
    """Levels [rows, steps] with at most so many lines and columns, of neighbours the greatest: nothing that stands out is lost."""
    for axis, most in enumerate((height, width)):
        n = found.shape[axis]
        if n > most:
            found = np.maximum.reduceat(found, np.arange(most) * n // most, axis=axis)
    return found


@dataclass(frozen=True)
class Scale:
    """Which magnitudes have which colours."""

    low: float
    high: float

    @classmethod
    def of(cls, found: Array) -> Scale:
        """A scale for these levels, whole decades wide; `high` is above all that is finite."""
        shown = found[(found > 0) & np.isfinite(found)].astype(np.float64)
        if not shown.size:
            return cls(0.1, 1.0)
        # a handful of tiny ones must not take the colours from all others
        low, high = (math.log10(value) for value in (np.quantile(shown, 0.01, method="lower"), shown.max()))
        top = math.ceil(high)
        return cls(10.0 ** max(min(math.floor(low), top - 1), top - MOST_DECADES), 10.0**top)

    def pixels(self, found: Array) -> Array:
        """Levels as positions in `PALETTE`: uint8 of the same shape."""
        shown = (found > 0) & np.isfinite(found)
        logs = np.log10(found.astype(np.float64), where=shown, out=np.zeros(found.shape))
        low, high = math.log10(self.low), math.log10(self.high)
        first, last = NOT_FINITE + 1, len(PALETTE) - 1
        out: Array = (first + np.clip((logs - low) / (high - low), 0.0, 1.0) * (last - first)).round().astype(np.uint8)
        for special, pixel in ((found == 0, ZERO), (found < 0, NOT_MEASURED), (found == INFINITE, NOT_FINITE)):
            out[special] = pixel
        return out

    @property
    def decades(self) -> list[int]:
        """The powers of ten from the low end to the high one."""
        return list(range(round(math.log10(self.low)), round(math.log10(self.high)) + 1))


@dataclass(frozen=True)
class Stretch:
    """Neighbouring rows whose names begin alike."""

    name: str
    """What they share, "" where that is nothing."""
    start: int
    end: int
    """One after its last row."""


def stretches(names: Sequence[str], most: int, least: int = 1) -> list[Stretch]:
    """The rows, in order, in at most so many stretches: at the greatest depth of names, cut at their dots, that gives so few.

    Where that gives fewer than `least`, they are more than `most`: those of the next depth.
    """
    found = [Stretch("", 0, len(names))]
    for depth in range(1, max((name.count(".") + 1 for name in names), default=0) + 1):
        deeper, start = [], 0
        for prefix, members in groupby(".".join(name.split(".")[:depth]) for name in names):
            deeper.append(Stretch(prefix, start, start := start + len(list(members))))
        if len(deeper) > most and len(found) >= least:
            break
        found = deeper
    return found
