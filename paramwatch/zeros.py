"""Zeros that stand apart from a law: whether a tensor has such, and the numbers of its other elements.

Between `drawn` and `initial`, for one tensor alone and for many together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from paramwatch.drawn import Numbers
from paramwatch.repeats import COARSE

_STRAY = 0.01
"""Share of zeros below which they say nothing."""


def are_apart(x: Numbers, zeros: float) -> bool:
    """Whether so many elements are zero that they are not of the law of the others."""
    if zeros / x.n <= _STRAY or zeros < 2:
        return False
    # coarse numbers are zero by themselves: half a grain of them, where torch draws in that precision
    usual = x.n * x.grain / 2
    return x.grain <= COARSE or zeros > usual + 4 * math.sqrt(usual) + 1


def nonzero(x: Numbers, zeros: float) -> Numbers:
    """The numbers of the elements that are not zero, from those of all."""
    n = max(int(x.n - zeros), 1)
    mean = x.mean * x.n / n
    std = math.sqrt(max(x.square(0.0) * x.n / n - mean**2, 0.0))
    return Numbers(n, mean, std, x.low, x.high, x.grain, x.some, round(x.extent * n / x.n), x.tests)


def asked_of(x: Numbers, zeros: float, default_zeros: int) -> Numbers:
    """The numbers whose law is asked for."""
    return nonzero(x, zeros) if zeros and (zeros == default_zeros or are_apart(x, zeros)) else x


def std_beside(value: float, share: float) -> float:
    """The standard deviation where that share of the elements is zero, the others one value."""
    return abs(value) * math.sqrt(share * (1 - share))


def may_be_even(shape: Sequence[int], share: float) -> bool:
    """Whether that share of zeros can be as many in every column of a matrix."""
    if len(shape) != 2 or shape[1] < 2:
        return False
    in_each = share * shape[0]
    return abs(in_each - round(in_each)) < 1e-6 * shape[0]
