"""Whether numbers have the shape of a law that ends somewhere: uniform, normal with a cut, two-sided uniform.

Between `formulas` and `laws`, for one tensor or for many of one shape side by side: each takes elements [tensor, element] that ascend along
the last axis and columns [tensor], and answers for each tensor. What is at an end is set apart, since it tells nothing of what is between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from paramwatch.columns import Array
from paramwatch.formulas import anderson_darling, below, is_even

LEVEL = 1e-4
"""How often a test may reject a law that is true."""

SURE = 4.0
"""Standard errors between a mean or a variance and its law: normal numbers are farther off in 6 cases of 100,000."""

_ESTIMATED = 2.5
"""The Anderson-Darling statistic of a law of which all four numbers are estimated exceeds this in far less than 1 case of 100."""

_Test: TypeAlias = Callable[[Array, float], Array]

_LEAST = 8
"""Elements between the ends without which nothing is told."""


def are_uniform(some: Array, low: Array, high: Array, grain: float) -> Array:
    """Given the extremes, the other elements of a uniform law are uniform between them, with nothing left to estimate."""

    def share(within: Array, at: Array) -> Array:
        shares: Array = (within - low[at, None]) / (high - low)[at, None]
        return shares

    return _are_even(some, some[:, 0] <= low, some[:, -1] >= high, share, grain)


def are_cut(some: Array, centre: Array, scale: Array, cut: Array, grain: float) -> Array:
    """Whether the elements other than the extreme follow a normal law that is cut so many standard deviations from its centre."""
    # what rounding puts beside the bound is at it
    reach = scale * cut * (1 - 1e-9)
    edge = below(-cut)

    def share(within: Array, at: Array) -> Array:
        z = (within - centre[at, None]) / scale[at, None]
        shares: Array = (below(z) - edge[at, None]) / (1 - 2 * edge[at, None])
        return shares

    return _are_even(some, some[:, 0] <= centre - reach, some[:, -1] >= centre + reach, share, grain)


def are_between(some: Array, laws: Array, grain: float) -> Array:
    """The same of normal laws between two ends, all four numbers of which are estimated: [centre, scale, low, high; tensor]."""
    centre, scale, low, high = laws
    first, last = below((low - centre) / scale), below((high - centre) / scale)

    def share(within: Array, at: Array) -> Array:
        z = (within - centre[at, None]) / scale[at, None]
        shares: Array = (below(z) - first[at, None]) / (last - first)[at, None]
        return shares

    def follows(shares: Array, grain: float) -> Array:
        close: Array = anderson_darling(shares, grain) <= _ESTIMATED
        return close

    return _are_even(some, some[:, 0] <= low, some[:, -1] >= high, share, grain, follows)


def are_two_sided(some: Array, outer: Array, grain: float) -> Array:
    """Whether the distances from zero are uniform from the least one to `outer`, well clear of zero, and the signs balance."""
    m = some.shape[1]
    inner = np.abs(some).min(1)
    # a law that comes near zero leaves the share g of its reach empty with probability (1 - g)^n, at most
    clear: Array = (1 - inner / outer) ** (m - 1) <= LEVEL
    clear &= np.abs(m / 2 - np.count_nonzero(some < 0, axis=1)) <= SURE * np.sqrt(m) / 2
    if not len(which := np.flatnonzero(clear)):
        return clear
    far, inner, outer = np.sort(np.abs(some[which])), inner[which], outer[which]

    def share(within: Array, at: Array) -> Array:
        shares: Array = (within - inner[at, None]) / (outer - inner)[at, None]
        return shares

    first, last = (far <= inner[:, None]).sum(1), (far >= outer[:, None]).sum(1)
    clear[which] = _are_even(far, first, last, share, grain)
    return clear


def _are_even(some: Array, first: Array, last: Array, share: Callable[[Array, Array], Array], grain: float, test: _Test = is_even) -> Array:
    """Whether elements are even without so many of the `first` and of the `last` of each tensor, once turned into shares of a law."""
    m, even = some.shape[1], np.zeros(len(some), bool)
    # those that leave out as many have rows of one length
    for begins, ends in sorted(set(zip(first.tolist(), last.tolist(), strict=True))):
        if m - begins - ends >= _LEAST:
            at = np.flatnonzero((first == begins) & (last == ends))
            even[at] = test(share(some[at, int(begins) : m - int(ends)], at), grain)
    return even
