"""How evenly numbers are spread: whether they are uniform on (0, 1), which is what each law is turned into.

Beside `formulas`, for `shapes`. Elements ascend in each row.
"""

from __future__ import annotations

import numpy as np

from paramwatch.columns import Array
from paramwatch.ragged import Ragged

STRIDE = 16
"""One value of so many tells in most cases that all of them are far from a law."""

_TOO_EVEN, FULLY_KNOWN = 0.05, 8.2
"""The Anderson-Darling statistic of a law that is known exceeds the second in 1 case of 10,000; of `linspace` it is below the first."""

_UNEVEN = 29.9
"""Pearson's chi-square of eight equal parts exceeds this in 1 case of 10,000: it sees a hole in the middle."""

_EIGHTHS = np.arange(1, 8) / 8


def is_even(u: Ragged, grain: float) -> Array:
    """Whether values are uniform on (0, 1), with nothing estimated."""
    m = u.lengths
    up_to = np.array([row.searchsorted(_EIGHTHS) for row in u.rows()])
    squares = (np.diff(up_to, prepend=0, append=m[:, None]) ** 2).sum(1)
    distance = anderson_darling(u, grain)
    even: Array = (8 * squares / m - m <= _UNEVEN) & (distance > _TOO_EVEN) & (distance <= FULLY_KNOWN)
    return even


def are_far_off(u: Ragged, m: Array) -> Array:
    """Whether of m such values the first and each `STRIDE`-th after it are where they are in 3 of 100 million cases (Kolmogorov)."""
    off = u.flat - (u.places() * STRIDE + 0.5) / u.each(m)
    far: Array = np.maximum.reduceat(np.abs(off), u.starts) > 3 / np.sqrt(m)
    return far


def anderson_darling(u: Ragged, grain: float) -> Array:
    """A squared, of values that should be uniform on (0, 1)."""
    least = max(grain / 4, 2 * float(np.finfo(u.flat.dtype).eps))
    below = np.clip(u.flat, least, 1 - least)
    above, weights = np.log(1 - below), u.places() * 2 + 1
    above *= u.each(2 * u.lengths) - weights
    below = np.log(below, out=below)
    below *= weights
    below += above
    return -u.lengths - u.means(below)
