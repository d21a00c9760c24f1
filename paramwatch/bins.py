"""The bins of a histogram: one for each sign and power of two, the same for every tensor, step and run, so that histograms add up.

Beside `columns`; no torch. Positions rise with the numbers in them: the large negative ones, the small negative ones, zero, the small
positive ones, the large positive ones. Every finite number is in exactly one bin; what is not finite is in none, and the parts count it.
"""

from __future__ import annotations

import numpy as np

from paramwatch.columns import ABSENT, Array

LEAST, MOST = -63, 61
"""The exponents that have a bin of their own. Of a float32 below 2^-63 the square has lost digits: to Adam it is as good as zero."""

_EXPONENTS = MOST - LEAST + 1

ZERO = _EXPONENTS + 2
"""Position of the zeros, of either sign."""

BINS = 2 * ZERO + 1
"""How many there are: 255."""


def _edges() -> tuple[Array, Array]:
    powers = 2.0 ** np.arange(LEAST, MOST + 2)
    low, high = np.concatenate(([0.0], powers)), np.concatenate((powers, [np.inf]))
    return np.concatenate((-high[::-1], [0.0], low)), np.concatenate((-low[::-1], [0.0], high))


LOW, HIGH = _edges()
"""float64 [bins], the edges as numbers.

A positive bin holds what is at least its low and below its high edge, a negative bin what is above its low and at most its high edge: each
holds the smaller of two magnitudes, not the larger. The bins beside zero begin at 0 and do not hold it; the outermost have no end.
"""
LOW.flags.writeable = HIGH.flags.writeable = False


def positions(numbers: Array) -> Array:
    """The bin of each number, int64 of the same shape; `BINS` for what is not finite, which is in none."""
    wide = np.asarray(numbers, dtype=np.float64)
    # a mantissa of at least 1/2, so that 1 has the exponent 1 here
    magnitude = np.clip(np.frexp(wide)[1].astype(np.int64) - 1 - LEAST + 2, 1, ZERO)
    signed = np.where(wide == 0, 0, np.where(wide < 0, -magnitude, magnitude))
    return np.where(np.isfinite(wide), ZERO + signed, BINS)


def merged(counts: Array, order: Array, starts: Array) -> Array:
    """Histograms of groups of rows, [rows, bins] -> [groups, bins]: of the elements of all that were measured; `ABSENT` where none was.

    Args:
        counts: Negative where a row was not measured.
        order: The rows of all groups, one group behind the other,
        starts: and where in it each group begins.
    """
    counts = counts[order]
    measured = counts[:, :1] >= 0
    if not measured.all():
        counts = np.where(measured, counts, 0)
    total: Array = np.add.reduceat(counts, starts, axis=0)
    return np.where(np.logical_or.reduceat(measured, starts, axis=0), total, ABSENT)
