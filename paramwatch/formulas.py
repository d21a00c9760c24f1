"""The formulas behind `laws` and `initial`, in arrays and floats.

A normal law's shares, what a cut does to its variance and likelihood, how orthogonal rows are, and whether they are of one scale.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from paramwatch.columns import Array
from paramwatch.ragged import Ragged

Gain: TypeAlias = tuple[float, float]
"""What orthogonal rows of one length are multiplied by, and how often random rows are as much so."""

_AT_HAND = 1 << 15
"""Elements looked at to see whether rows are orthogonal, at most."""

_TOLD_APART = 16
"""Elements of a row without which its scale is not compared: the mean of fewer squares is not nearly normal."""

_GAINS = (math.sqrt(2), math.sqrt(2 / 1.0001), 5 / 3, 3 / 4)
"""Of `torch.nn.init.calculate_gain`, beside those of one digit: ReLU, leaky ReLU, tanh, SELU."""


def below(z: Array) -> Array:
    """Share of a normal law below z, to five digits in both tails."""
    shares, steps = _TABLES[z.dtype]
    # the grid is even, so that a place on it is worked out and not looked for
    place = z * 1000
    place += 9000
    np.clip(place, 0, 18000, out=place)
    whole = np.floor(place)
    at = whole.astype(np.intp)
    place -= whole
    place *= steps.take(at)
    place += shares.take(at)
    return place


def variance_within(cut: float) -> float:
    """Variance of a standard normal law between -cut and cut."""
    if cut < 0.05:  # the difference below loses its digits; this is its series
        return cut**2 / 3 * (1 - 2 * cut**2 / 15)
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * cut * density / math.erf(cut / math.sqrt(2))


def variance_between(low: float, high: float) -> float:
    """Variance of a standard normal law between two ends."""
    share = (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2
    at_low, at_high = (math.exp(-(end**2) / 2) / math.sqrt(2 * math.pi) / share for end in (low, high))
    return 1 + low * at_low - high * at_high - (at_low - at_high) ** 2


def cut_of(ratio: float) -> float:
    """The cut of a normal law whose mean square over squared reach is this."""
    i = min(max(bisect_right(_RATIOS, -ratio), 1), len(_RATIOS) - 1)
    low, high = _RATIOS[i - 1], _RATIOS[i]
    return _CUTS[i - 1] + (_CUTS[i] - _CUTS[i - 1]) * min(max((-ratio - low) / (high - low), 0.0), 1.0)


def gain_over_uniform(cut: float, ratio: float) -> float:
    """Nats an element, of a normal law with a cut over a uniform one; `ratio` is root mean square over reach."""
    return math.log(2 * cut) - 0.5 * math.log(2 * math.pi) - math.log(math.erf(cut / math.sqrt(2))) - (ratio * cut) ** 2 / 2


def gain_over_normal(cut: float, ratio: float) -> float:
    """Nats an element, over a normal law without a cut."""
    return math.log(ratio * cut) - math.log(math.erf(cut / math.sqrt(2))) - (ratio * cut) ** 2 / 2 + 0.5


@lru_cache(maxsize=1024)
def telling(n: int, grain: float) -> float:
    """How many elements say something about a curve: rounding shifts their mean square by a grain, and more would take that for one."""
    return min(n, 0.5 / grain**2) if grain else n


@lru_cache(maxsize=64)
def drawn_within(grain: float) -> float:
    """Where normal numbers of torch end, in standard deviations; infinite if nothing is known of their precision."""
    # Box and Muller: at the radius that the largest uniform number of that precision gives
    return 0.95 * math.sqrt(-2 * math.log(grain / 2)) if grain > 0 else math.inf


def gain_of_rows(take: Callable[[Sequence[int]], Array], count: int, length: int, grain: float) -> Gain | None:
    """What rows that are pairwise orthogonal and equally long are multiplied by, and how often random ones pass; None if they do not.

    Args:
        take: Gives some of the rows.
        count: How many there are.
        length: Of one of them.
        grain: What the elements are rounded to.
    """
    first, last = (Ragged.of([row]) for row in take([0, count - 1]))
    if not may_be_orthogonal(first, last, grain)[0]:
        return None
    return gains_of_rows(take(chosen_rows(count, length))[None], length, grain)[0]


def chosen_rows(count: int, length: int) -> list[int]:
    """Which of so many rows are looked at."""
    found: list[int] = np.unique(np.linspace(0, count - 1, min(count, max(2, _AT_HAND // length), 64)).astype(np.int64)).tolist()
    return found


def gains_of_rows(rows: Array, length: int, grain: float) -> list[Gain | None]:
    """The same of the chosen rows of many matrices, [matrix, row, element]."""
    near, m = _near(length, grain), rows.shape[1]
    products = rows @ rows.swapaxes(1, 2)
    squares = products.diagonal(axis1=1, axis2=2).copy()
    products.reshape(len(products), m * m)[:, :: m + 1] = 0
    scale = squares.mean(1)
    off = np.maximum(products.max((1, 2)), -products.min((1, 2)))
    alike = (scale > 0) & (off <= near * scale) & (np.ptp(squares, axis=1) <= 4 * near * scale)
    # two squares of random rows differ by 2 / sqrt(length) of themselves; a standard normal number is at 0 with the density 0.4
    share = min(0.8 * near * math.sqrt(length), 0.5)
    chance = float(share ** (m * (m - 1) / 2) * (2 * share) ** (m - 1))
    gains = np.sqrt(scale).tolist()
    return [(_known_gain(gain, near) or gain, chance) if passes else None for gain, passes in zip(gains, alike.tolist(), strict=True)]


def gain_of_row(row: Array, grain: float) -> Gain | None:
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


def may_be_orthogonal(first: Ragged, last: Ragged, grain: float) -> Array:
    """Whether two rows of a matrix, each, are orthogonal and equally long: that tells in nearly all cases that they are not."""
    # of what is not finite nothing is asked
    with np.errstate(all="ignore"):
        length, both, other = (np.add.reduceat(a.flat * b.flat, a.starts) for a, b in ((first, first), (first, last), (last, last)))
        near = np.array([_near(width, grain) for width in first.lengths.tolist()]) * length
        found: Array = (np.abs(both) <= near) & (np.abs(other - length) <= 4 * near)
    return found


def differ_in_scale(matrices: Ragged, sides: Array) -> Array:
    """Whether rows, or columns, of matrices are of different scales; those of one law seem so in 1 case of 10,000.

    The mean squares of n numbers of a law differ by its variance of squares over n: so many standard numbers, squared, are chi-square.

    Args:
        matrices: One in each row, its own rows one after another.
        sides: Rows and columns of each [matrix, 2].
    """
    told: Array = (sides.min(1) > 1) & (sides.max(1) >= _TOLD_APART)
    if not told.any():
        return told
    matrices, sides = matrices.only(told), sides[told]
    # of what is not finite nothing is asked
    with np.errstate(all="ignore"):
        off = matrices.flat - matrices.each(matrices.means(matrices.flat))
        off *= off
        off -= matrices.each(matrices.means(off))
        sums = np.add.reduceat(off, _line_starts(sides)), column_sums(off, sides, off.dtype)
        off *= off
        spread, found = matrices.means(off), np.zeros(len(sides), bool)
        for each, count, n in zip(sums, sides.T, sides.T[::-1], strict=True):
            each *= each
            # of as many lines, each of n elements, the means of what is about zero
            varied, k = Ragged(each, count).means(each) / n**2, count - 1
            most = k * (1 - 2 / (9 * k) + 4 * np.sqrt(2 / (9 * k))) ** 3
            found |= (n >= _TOLD_APART) & (varied * n * count > spread * most)
    told[told] = found
    return told


def _line_starts(sides: Array) -> Array:
    """Where each row of each matrix begins."""
    rows, columns = sides.T
    lengths = columns.repeat(rows)
    found: Array = lengths.cumsum() - lengths
    return found


def column_sums(elements: Array, sides: Array, dtype: DTypeLike) -> Array:
    """Of each matrix, one after another."""
    sums, start = [], 0
    for (rows, columns), alike in groupby(sides.tolist()):
        end = start + rows * columns * len(list(alike))
        sums.append(elements[start:end].reshape(-1, rows, columns).sum(1, dtype=dtype).reshape(-1))
        start = end
    return np.concatenate(sums)


def _near(length: int, grain: float) -> float:
    # the cosine of two random rows is about 1 / sqrt(length); rounding shifts it by 0.3 grains times that, by 7 times as much at most
    return max(1e-5, 2 * grain / math.sqrt(length))


_CUTS: list[float] = np.geomspace(0.05, 12.0, 2000).tolist()
_RATIOS = [-variance_within(cut) / cut**2 for cut in _CUTS]
"""Mean square over squared reach, negative, for each cut: from -1/3 (uniform) on it rises."""

_SHARES = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in np.linspace(-9.0, 9.0, 18001)])
"""Of a normal law, below each thousandth from -9 to 9."""

_TABLES = {np.dtype(kind): (_SHARES.astype(kind), np.diff(_SHARES, append=_SHARES[-1]).astype(kind)) for kind in (np.float32, np.float64)}
"""These, and how much lies between one and the next, in either precision."""
