"""The formulas behind `laws` and `initial`, in arrays and floats.

How even numbers are, how often they repeat, a normal law's shares, what a cut does to its variance and likelihood, and how orthogonal rows
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from paramwatch.columns import Array

_FULLY_KNOWN = 8.2
"""The Anderson-Darling statistic of a law without estimated parameters exceeds this in 1 case of 10,000."""

_UNEVEN = 29.9
"""Pearson's chi-square of eight equal parts exceeds this in 1 case of 10,000: it sees a hole in the middle."""

COARSE = 1e-4
"""Dtypes of a coarser grain (float16, bfloat16) repeat their values, and torch may draw in their precision, too."""

_FEW, _OF_MANY = 64, 1024
"""Values that a smooth law does not keep to over so many elements, even in bfloat16."""


_AT_HAND = 1 << 15
"""Elements looked at to see whether rows are orthogonal, at most."""

_GAINS = (math.sqrt(2), math.sqrt(2 / 1.0001), 5 / 3, 3 / 4)
"""Of `torch.nn.init.calculate_gain`, beside those of one digit: ReLU, leaky ReLU, tanh, SELU."""


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
    least = max(grain / 4, 1e-15)
    u = np.minimum(np.maximum(u, least), 1 - least)
    m = len(u)
    return float(-m - (_odd(m) @ (np.log(u) + np.log1p(-u[::-1]))) / m)


@lru_cache(maxsize=64)
def _odd(m: int) -> Array:
    return np.arange(1.0, 2 * m, 2)


def spread(ascending: Array, grain: float) -> Array:
    """Equal values of a coarse dtype laid evenly over the interval that rounds to them: tests of a smooth law expect no repetitions."""
    if grain < COARSE:
        return ascending
    values, counts = np.unique(ascending, return_counts=True)
    middles = (values[1:] + values[:-1]) / 2
    low, high = np.concatenate(([values[0]], middles)), np.concatenate((middles, [values[-1]]))
    place = np.arange(len(ascending)) - np.repeat(np.cumsum(counts) - counts, counts)
    laid: Array = np.repeat(low, counts) + (place + 0.5) / np.repeat(counts, counts) * np.repeat(high - low, counts)
    return laid


def few_values(ascending: Array, grain: float) -> int:
    """How many distinct values there are if they are too few for a smooth law in that precision, else 0."""
    m = len(ascending)
    # where four elements have a value on average, some of these are equal
    if m < _OF_MANY or len(set(ascending[m // 3 : m // 3 + 16].tolist())) == 16:
        return 0
    distinct = 1 + int(np.count_nonzero(ascending[1:] != ascending[:-1]))
    low, high = float(ascending[0]), float(ascending[-1])
    # numbers of that dtype between the two, at least
    possible = (high - low) / (grain * max(high, -low)) if grain else math.inf
    most = min(_FEW if grain > COARSE else int(np.count_nonzero(ascending)) // 4, possible / 4)
    return distinct if distinct <= most else 0


def tied_ends(ascending: Array, grain: float) -> tuple[int, int]:
    """How many elements are equal to the least one and to the greatest, 0 where that is no more than rounding to a grain explains."""
    m = len(ascending)
    # a uniform law drawn in bfloat16 has up to a grain of its elements at a bound: a count that Poisson's law exceeds in 1 case of 100,000
    usual = m * grain if grain > COARSE else 0.0
    most = int(usual + 5 * math.sqrt(usual)) + 3
    if m <= most + 1:
        return 0, 0
    low, high = ascending[0], ascending[-1]
    at_low = int(np.searchsorted(ascending, low, "right")) if ascending[most] == low else 0
    at_high = m - int(np.searchsorted(ascending, high, "left")) if ascending[-1 - most] == high else 0
    return at_low, at_high


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


def gain_of_rows(take: Callable[[Sequence[int]], Array], count: int, length: int, grain: float) -> tuple[float, float] | None:
    """What rows that are pairwise orthogonal and equally long are multiplied by, and how often random ones pass; None if they do not.

    Args:
        take: Gives some of the rows.
        count: How many there are.
        length: Of one of them.
        grain: What the elements are rounded to.
    """
    # the cosine of two random rows is about 1 / sqrt(length); rounding shifts it by 0.3 grains times that, by 7 times as much at most
    near = max(1e-5, 2 * grain / math.sqrt(length))
    if not _are_orthonormal(take([0, count - 1]), near):
        return None
    some = np.unique(np.linspace(0, count - 1, min(count, max(2, _AT_HAND // length), 64)).astype(np.int64))
    rows = take(some.tolist())
    if not _are_orthonormal(rows, near):
        return None
    # two squares of random rows differ by 2 / sqrt(length) of themselves; a standard normal number is at 0 with the density 0.4
    share, m = min(0.8 * near * math.sqrt(length), 0.5), len(some)
    gain = math.sqrt(float(np.einsum("ij,ij->", rows, rows)) / m)
    return _known_gain(gain, near) or gain, float(share ** (m * (m - 1) / 2) * (2 * share) ** (m - 1))


def gain_of_row(row: Array, grain: float) -> tuple[float, float] | None:
    """The same of one row, which is orthogonal whatever it is: that it was made so is seen where its length is a gain, to rounding."""
    n, length = len(row), math.sqrt(float(row @ row))
    if n < 2 or length == 0:
        return None
    # rounding shifts a length by 0.37 grains / sqrt(n) of itself, by 5 times as much at most
    near = max(1e-6, 1.8 * grain / math.sqrt(n))
    gain = _known_gain(length, near)
    # the length of n normal numbers is normal with the standard deviation 1 / sqrt(2 n), for the gain at its centre
    return None if gain is None else (gain, 2 * near * math.sqrt(n / math.pi))


def _known_gain(value: float, near: float) -> float | None:
    return next((gain for gain in (float(f"{value:.0e}"), *_GAINS) if abs(value / gain - 1) <= near), None)


def _are_orthonormal(rows: Array, near: float) -> bool:
    # the first two tell at once in nearly all cases
    first, second = rows[0], rows[1]
    length = float(first @ first)
    if abs(float(first @ second)) > near * length or abs(float(second @ second) - length) > 4 * near * length:
        return False
    products = rows @ rows.T
    squares = np.diagonal(products)
    scale = float(squares.mean())
    if scale == 0:
        return False
    return bool(np.abs(products - np.diag(squares)).max() <= near * scale and np.ptp(squares) <= 4 * near * scale)


CUTS = np.geomspace(0.05, 12.0, 2000)
RATIOS = np.array([variance_within(cut) / cut**2 for cut in CUTS])
"""Mean square over squared reach, for each cut: falls from 1/3 (uniform) on."""

_EIGHTHS = np.arange(1, 8) / 8

_GRID = np.linspace(-9.0, 9.0, 18001)
_SHARES = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in _GRID])
