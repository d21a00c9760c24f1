"""The formulas behind `laws` and `initial`, in arrays and floats.

How even numbers are, how often they repeat, a normal law's shares, what a cut does to its variance and likelihood, and how orthogonal rows
are.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from paramwatch.columns import Array

Gain: TypeAlias = tuple[float, float]
"""What orthogonal rows of one length are multiplied by, and how often random rows are as much so."""

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

_TOLD_APART = 16
"""Elements of a row without which its scale is not compared: the mean of fewer squares is not nearly normal."""

_GAINS = (math.sqrt(2), math.sqrt(2 / 1.0001), 5 / 3, 3 / 4)
"""Of `torch.nn.init.calculate_gain`, beside those of one digit: ReLU, leaky ReLU, tanh, SELU."""


def is_even(u: Array, grain: float) -> Array:
    """Whether values that ascend along the last axis are uniform on (0, 1), with nothing estimated."""
    m = u.shape[-1]
    up_to = np.array([row.searchsorted(_EIGHTHS) for row in u.reshape(-1, m)]).reshape(*u.shape[:-1], 7)
    squares = (np.diff(up_to, axis=-1, prepend=0, append=m) ** 2).sum(-1)
    even: Array = (8 * squares / m - m <= _UNEVEN) & (anderson_darling(u, grain) <= _FULLY_KNOWN)
    return even


def are_far_off(u: Array, m: int) -> Array:
    """Whether of m such values the first and each `STRIDE`-th after it are where they are in 3 of 100 million cases (Kolmogorov)."""
    off = u - ((np.arange(u.shape[-1]) * STRIDE + 0.5) / m).astype(u.dtype)
    far: Array = np.abs(off, out=off).max(-1) > 3 / math.sqrt(m)
    return far


def anderson_darling(u: Array, grain: float) -> Array:
    """A squared, of values that ascend along the last axis and should be uniform on (0, 1)."""
    m, least = u.shape[-1], max(grain / 4, 2 * float(np.finfo(u.dtype).eps))
    u = np.clip(u, least, 1 - least)
    # one logarithm of the product for a pair of logarithms
    products = 1 - u[..., ::-1]
    products *= u
    found: Array = -m - np.log(products, out=products) @ _odd(m, u.dtype) / m
    return found


@lru_cache(maxsize=64)
def _odd(m: int, dtype: np.dtype[Any]) -> Array:
    return np.arange(1.0, 2 * m, 2).astype(dtype)


def spread(ascending: Array, grain: float) -> Array:
    """Equal values of a coarse dtype laid evenly over the interval that rounds to them: tests of a smooth law expect no repetitions.

    Args:
        ascending: Along the last axis.
        grain: Of the dtype; others than coarse ones come back as they are.
    """
    if grain < COARSE:
        return ascending
    flat = ascending.reshape(-1)
    opens = np.arange(len(flat)) % ascending.shape[-1] == 0
    starts = np.flatnonzero(opens | np.concatenate(([True], flat[1:] != flat[:-1])))
    values, counts, opens = flat[starts], np.diff(starts, append=len(flat)), opens[starts]
    middles = (values[1:] + values[:-1]) / 2
    low = np.where(opens, values, np.concatenate((values[:1], middles)))
    high = np.where(np.append(opens[1:], True), values, np.concatenate((middles, values[-1:])))
    place = np.arange(len(flat)) - np.repeat(starts, counts)
    laid: Array = np.repeat(low, counts) + (place + 0.5) / np.repeat(counts, counts) * np.repeat(high - low, counts)
    return laid.reshape(ascending.shape).astype(ascending.dtype, copy=False)


def few_values(ascending: Array, grain: float) -> Array:
    """How many distinct values there are along the last axis if they are too few for a smooth law in that precision, else 0."""
    m = ascending.shape[-1]
    if m < _OF_MANY:
        return np.zeros(ascending.shape[:-1], int)
    distinct = 1 + np.count_nonzero(ascending[..., 1:] != ascending[..., :-1], axis=-1)
    low, high = ascending[..., 0], ascending[..., -1]
    # numbers of that dtype between the two, at least
    possible = (high - low) / (grain * np.maximum(high, -low)) if grain else math.inf
    most = np.minimum(_FEW if grain > COARSE else np.count_nonzero(ascending, axis=-1) // 4, possible / 4)
    found: Array = np.where(distinct <= most, distinct, 0)
    return found


def have_tied_ends(ascending: Array, grain: float) -> Array:
    """Whether more elements along the last axis are equal to the least or to the greatest than rounding to a grain explains."""
    m, most = ascending.shape[-1], _usual_ties(ascending.shape[-1], grain)
    if m <= most + 1:
        return np.zeros(ascending.shape[:-1], bool)
    found: Array = (ascending[..., most] == ascending[..., 0]) | (ascending[..., -1 - most] == ascending[..., -1])
    return found


def tied_ends(ascending: Array, grain: float) -> tuple[int, int]:
    """How many elements are equal to the least one and to the greatest, 0 where that is no more than rounding to a grain explains."""
    if not have_tied_ends(ascending, grain):
        return 0, 0
    most = _usual_ties(len(ascending), grain)
    at_low = int(np.searchsorted(ascending, ascending[0], "right"))
    at_high = len(ascending) - int(np.searchsorted(ascending, ascending[-1], "left"))
    return at_low if at_low > most else 0, at_high if at_high > most else 0


def _usual_ties(m: int, grain: float) -> int:
    # a uniform law drawn in bfloat16 has up to a grain of its elements at a bound: a count that Poisson's law exceeds in 1 case of 100,000
    usual = m * grain if grain > COARSE else 0.0
    return int(usual + 5 * math.sqrt(usual)) + 3


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
    if not may_be_orthogonal(take([0, count - 1]), grain):
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


def may_be_orthogonal(two: Array, grain: float) -> Array:
    """Whether two rows [..., 2, length] are orthogonal and equally long: that tells in nearly all cases that they are not."""
    first, second = two[..., 0, :].astype(np.float64, copy=False), two[..., 1, :].astype(np.float64, copy=False)
    # of what is not finite nothing is asked
    with np.errstate(all="ignore"):
        near, length = _near(two.shape[-1], grain), _inner(first, first)
        found: Array = (np.abs(_inner(first, second)) <= near * length) & (np.abs(_inner(second, second) - length) <= 4 * near * length)
    return found


def differ_in_scale(matrices: Array) -> Array:
    """Whether rows, or columns, of matrices [..., row, element] are of different scales; those of one law seem so in 1 case of 10,000.

    The mean squares of n numbers of a law differ by its variance of squares over n: so many standard numbers, squared, are chi-square.
    """
    found = np.zeros(matrices.shape[:-2], bool)
    # of what is not finite nothing is asked
    with np.errstate(all="ignore"):
        squares = matrices - matrices.mean((-2, -1), keepdims=True)
        squares *= squares
        for axis in (-1, -2):
            n, lines = squares.shape[axis], squares.mean(axis)
            if n >= _TOLD_APART and lines.shape[-1] > 1:
                k = lines.shape[-1] - 1
                found |= lines.var(-1) * n * (k + 1) > squares.var((-2, -1)) * k * (1 - 2 / (9 * k) + 4 * math.sqrt(2 / (9 * k))) ** 3
    return found


def _inner(a: Array, b: Array) -> Array:
    found: Array = np.einsum("...i,...i->...", a, b)
    return found


def _near(length: int, grain: float) -> float:
    # the cosine of two random rows is about 1 / sqrt(length); rounding shifts it by 0.3 grains times that, by 7 times as much at most
    return max(1e-5, 2 * grain / math.sqrt(length))


_CUTS: list[float] = np.geomspace(0.05, 12.0, 2000).tolist()
_RATIOS = [-variance_within(cut) / cut**2 for cut in _CUTS]
"""Mean square over squared reach, negative, for each cut: from -1/3 (uniform) on it rises."""

STRIDE = 16
"""One value of so many tells in most cases that all of them are far from a law."""

_EIGHTHS = np.arange(1, 8) / 8

_SHARES = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in np.linspace(-9.0, 9.0, 18001)])
"""Of a normal law, below each thousandth from -9 to 9."""

_TABLES = {np.dtype(kind): (_SHARES.astype(kind), np.diff(_SHARES, append=_SHARES[-1]).astype(kind)) for kind in (np.float32, np.float64)}
"""These, and how much lies between one and the next, in either precision."""
