"""The formulas behind `laws`: how even numbers are, a normal law's shares, and what a cut does to its variance and likelihood."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from paramwatch.columns import Array

_FULLY_KNOWN = 8.2
"""The Anderson-Darling statistic of a law without estimated parameters exceeds this in 1 case of 10,000."""

_UNEVEN = 29.9
"""Pearson's chi-square of eight equal parts exceeds this in 1 case of 10,000: it sees a hole in the middle."""


def is_even(u: Array, grain: float) -> bool:
    """Whether ascending values are uniform on (0, 1), with nothing estimated."""
    m, up_to = len(u), np.searchsorted(u, _EIGHTHS)
    inner = up_to[1:] - up_to[:-1]
    squares = int(up_to[0]) ** 2 + int(inner @ inner) + (m - int(up_to[-1])) ** 2
    if 8 * squares / m - m > _UNEVEN:
        return False
    return anderson_darling(u, grain) <= _FULLY_KNOWN


def anderson_darling(u: Array, grain: float) -> float:
    """A squared, of ascending values that should be uniform on (0, 1)."""
    u = np.minimum(np.maximum(u, grain / 4), 1 - grain / 4)
    m = len(u)
    return float(-m - (_odd(m) @ (np.log(u) + np.log1p(-u[::-1]))) / m)


@lru_cache(maxsize=64)
def _odd(m: int) -> Array:
    return np.arange(1.0, 2 * m, 2)


def below(z: Array) -> Array:
    """Share of a normal law below z, to five digits in both tails."""
    found: Array = np.interp(z, _GRID, _SHARES)
    return found


def variance_within(cut: float) -> float:
    """Variance of a standard normal law between -cut and cut."""
    if cut < 0.05:  # the difference below loses its digits; this is its series
        return cut**2 / 3 * (1 - 2 * cut**2 / 15)
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * cut * density / math.erf(cut / math.sqrt(2))


def gain_over_uniform(cut: float, ratio: float) -> float:
    """Nats an element, of a normal law with a cut over a uniform one; `ratio` is root mean square over reach."""
    return math.log(2 * cut) - 0.5 * math.log(2 * math.pi) - math.log(math.erf(cut / math.sqrt(2))) - (ratio * cut) ** 2 / 2


def gain_over_normal(cut: float, ratio: float) -> float:
    """Nats an element, over a normal law without a cut."""
    return math.log(ratio * cut) - math.log(math.erf(cut / math.sqrt(2))) - (ratio * cut) ** 2 / 2 + 0.5


CUTS = np.geomspace(0.05, 12.0, 2000)
RATIOS = np.array([variance_within(cut) / cut**2 for cut in CUTS])
"""Mean square over squared reach, for each cut: falls from 1/3 (uniform) on."""

_EIGHTHS = np.arange(1, 8) / 8

_GRID = np.linspace(-9.0, 9.0, 18001)
_SHARES = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in _GRID])
