"""Whether numbers have the shape of a law that ends somewhere: uniform, normal with a cut, two-sided uniform.

Between `formulas` and `laws`, for one tensor or for many of one shape side by side: each takes elements [tensor, element] that ascend along
the last axis and columns [tensor], and answers for each tensor. What is at an end is set apart, since it tells nothing of what is between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from paramwatch.columns import Array
from paramwatch.formulas import STRIDE, anderson_darling, are_far_off, below, is_even

LEVEL = 1e-4
"""How often a test may reject a law that is true."""

SURE = 4.0
"""Standard errors between a mean or a variance and its law: normal numbers are farther off in 6 cases of 100,000."""

_PARTLY_KNOWN = 1.85
"""The Anderson-Darling statistic of a normal law exceeds this in 1 case of 10,000 where mean and standard deviation are estimated
(D'Agostino and Stephens, 1986, table 4.9)."""

_ESTIMATED = 2.5
"""The Anderson-Darling statistic of a law of which all four numbers are estimated exceeds this in far less than 1 case of 100."""

_Test: TypeAlias = Callable[[Array, float], Array]

_LEAST = 8
"""Elements between the ends without which nothing is told."""


def are_uniform(some: Array, low: Array, high: Array, grain: float) -> Array:
    """Given the extremes, the other elements of a uniform law are uniform between them, with nothing left to estimate."""
    return _are_even(some, some[:, 0] <= low, some[:, -1] >= high, _Shares(low, high - low), grain)


def are_normal(some: Array, grain: float) -> Array:
    """Whether the elements are normal, with mean and standard deviation estimated."""
    m, none = some.shape[1], np.zeros(len(some), int)

    def follows(shares: Array, grain: float) -> Array:
        close: Array = anderson_darling(shares, grain) * (1 + 0.75 / m + 2.25 / m**2) <= _PARTLY_KNOWN
        return close

    return _are_even(some, none, none, _Shares(some.mean(1), some.std(1), (none - 0.0, none + 1.0)), grain, follows)


def are_cut(some: Array, centre: Array, scale: Array, cut: Array, grain: float) -> Array:
    """Whether the elements other than the extreme follow a normal law that is cut so many standard deviations from its centre."""
    # what rounding puts beside the bound is at it
    reach = scale * cut * (1 - 1e-9)
    shares = _Shares(centre, scale, (below(-cut), below(cut)))
    return _are_even(some, some[:, 0] <= centre - reach, some[:, -1] >= centre + reach, shares, grain)


def are_between(some: Array, laws: Array, grain: float) -> Array:
    """The same of normal laws between two ends, all four numbers of which are estimated: [centre, scale, low, high; tensor]."""
    centre, scale, low, high = laws

    def follows(shares: Array, grain: float) -> Array:
        close: Array = anderson_darling(shares, grain) <= _ESTIMATED
        return close

    shares = _Shares(centre, scale, (below((low - centre) / scale), below((high - centre) / scale)))
    return _are_even(some, some[:, 0] <= low, some[:, -1] >= high, shares, grain, follows)


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

    first, last = (far <= inner[:, None]).sum(1), (far >= outer[:, None]).sum(1)
    clear[which] = _are_even(far, first, last, _Shares(inner, outer - inner), grain)
    return clear


class _Shares(NamedTuple):
    """Gives how much of a law lies below each element: of a uniform one, or of a normal one between two ends. Columns [tensor]."""

    start: Array
    """Lower end, or centre."""
    width: Array
    """Or standard deviation."""
    ends: tuple[Array, Array] | None = None
    """How much of a normal law without ends lies below either."""

    def of(self, within: Array, at: Array) -> Array:
        found: Array = within - self.start[at, None].astype(within.dtype)
        found /= self.width[at, None].astype(within.dtype)
        if self.ends is None:
            return found
        low, high = (column[at, None] for column in self.ends)
        found = below(found)
        found -= low.astype(found.dtype)
        found /= (high - low).astype(found.dtype)
        return found


def _are_even(some: Array, first: Array, last: Array, shares: _Shares, grain: float, test: _Test = is_even) -> Array:
    """Whether elements are even without so many of the `first` and of the `last` of each tensor, once turned into shares of a law."""
    m, even = some.shape[1], np.zeros(len(some), bool)
    # those that leave out as many have rows of one length
    for begins, ends in sorted(set(zip(first.tolist(), last.tolist(), strict=True))):
        n = m - int(begins) - int(ends)
        at = np.flatnonzero((first == begins) & (last == ends))
        if n < _LEAST:
            continue
        within = (some if len(at) == len(some) else some[at])[:, int(begins) : m - int(ends)]
        if n >= STRIDE * STRIDE:
            near = ~are_far_off(shares.of(within[:, ::STRIDE], at), n)
            at, within = (at, within) if near.all() else (at[near], within[near])
        if len(at):
            even[at] = test(shares.of(within, at), grain)
    return even
