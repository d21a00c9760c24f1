"""Whether numbers have the shape of a law that ends somewhere: uniform, normal with a cut, two-sided uniform.

Between `formulas` and `laws`, for one tensor or for many side by side: each takes elements that ascend in rows, one for each tensor, and
columns [row], and answers for each row. What is at an end is set apart, since it tells nothing of what is between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from paramwatch.columns import Array
from paramwatch.departures import are_bent, have_heavy_tails, have_soft_ends
from paramwatch.evenness import FULLY_KNOWN, STRIDE, anderson_darling, are_far_off, is_even
from paramwatch.formulas import below
from paramwatch.ragged import Ragged

LEVEL = 1e-4
"""How often a test may reject a law that is true."""

SURE = 4.0
"""Standard errors between a mean or a variance and its law: normal numbers are farther off in 6 cases of 100,000."""

_PARTLY_KNOWN = 1.85
"""The Anderson-Darling statistic of a normal law exceeds this in 1 case of 10,000 where mean and standard deviation are estimated
(D'Agostino and Stephens, 1986, table 4.9)."""

_ESTIMATED = 2.5
"""The Anderson-Darling statistic of a law of which all four numbers are estimated exceeds this in far less than 1 case of 100."""

_Test: TypeAlias = Callable[[Ragged, Array, float], Array]
"""Of shares, of which rows they are, to which grain they are rounded."""

_LEAST = 8
"""Elements between the ends without which nothing is told."""


def are_uniform(some: Ragged, low: Array, high: Array, grain: float) -> Array:
    """Given the extremes, the other elements of a uniform law are uniform between them, with nothing left to estimate."""
    first, last = some.extremes()
    return _are_even(some, first <= low, last >= high, _Shares(low, high - low), grain)


def are_normal(some: Ragged, grain: float) -> Array:
    """Whether the elements are normal, with mean and standard deviation estimated."""
    none, mean = np.zeros(len(some)), some.means(some.flat)
    off = some.flat - some.each(mean)
    off *= off

    def follows(shares: Ragged, at: Array, grain: float) -> Array:
        m = shares.lengths
        close: Array = anderson_darling(shares, grain) * (1 + 0.75 / m + 2.25 / m**2) <= _PARTLY_KNOWN
        return close

    normal = _are_even(some, none > 0, none > 0, _Shares(mean, np.sqrt(some.means(off)), (none, none + 1)), grain, follows)
    if normal.any():
        normal[normal] = ~have_heavy_tails(some.like(off).only(normal))
    return normal


def are_cut(some: Ragged, centre: Array, scale: Array, cut: Array, grain: float) -> Array:
    """Whether the elements other than the extreme follow a normal law that is cut so many standard deviations from its centre."""
    # what rounding puts beside the bound is at it
    reach = scale * cut * (1 - 1e-9)
    first, last = some.extremes()
    shares = _Shares(centre, scale, (below(-cut), below(cut)))
    even = _are_even(some, first <= centre - reach, last >= centre + reach, shares, grain)
    return _without_bends(even, some, np.stack([centre, scale, centre - reach, centre + reach]))


def are_between(some: Ragged, laws: Array, of: Array, grain: float) -> Array:
    """The same of normal laws between two ends, all four numbers of which are estimated: [centre, scale, low, high; row].

    They are estimated `of` so many elements: of more than these, they are the better known, and the distance from them is the greater.
    """
    centre, scale, low, high = laws
    first, last = some.extremes()
    most = FULLY_KNOWN - (FULLY_KNOWN - _ESTIMATED) * np.minimum(some.lengths / of, 1.0)

    def follows(shares: Ragged, at: Array, grain: float) -> Array:
        close: Array = anderson_darling(shares, grain) <= most[at]
        return close

    shares = _Shares(centre, scale, (below((low - centre) / scale), below((high - centre) / scale)))
    return _without_bends(_are_even(some, first <= low, last >= high, shares, grain, follows), some, laws)


def _without_bends(even: Array, some: Ragged, laws: Array) -> Array:
    if even.any():
        which, end = some.only(even), np.ones(np.count_nonzero(even), int)
        # extremes are where the law ends
        even[even] = ~are_bent(which.within(end, end), *laws[:, even])
    return even


def are_two_sided(some: Ragged, outer: Array, grain: float) -> Array:
    """Whether the distances from zero are uniform from the least one to `outer`, well clear of zero, and the signs balance."""
    m, far = some.lengths, some.like(np.abs(some.flat))
    inner = np.minimum.reduceat(far.flat, far.starts)
    # a law that comes near zero leaves the share g of its reach empty with probability (1 - g)^n, at most
    clear: Array = (1 - inner / outer) ** (m - 1) <= LEVEL
    clear &= np.abs(m / 2 - some.counts(some.flat < 0)) <= SURE * np.sqrt(m) / 2
    if not clear.any():
        return clear
    far, inner, outer = far.only(clear), inner[clear], outer[clear]
    far = far.sorted()
    first, last = far.counts(far.flat <= far.each(inner)), far.counts(far.flat >= far.each(outer))
    clear[clear] = _are_even(far, first, last, _Shares(inner, outer - inner), grain)
    return clear


def _is_even_to_its_ends(u: Ragged, at: Array, grain: float) -> Array:
    even: Array = is_even(u, grain) & ~have_soft_ends(u, grain)
    return even


class _Shares(NamedTuple):
    """Gives how much of a law lies below each element: of a uniform one, or of a normal one between two ends. Columns [row]."""

    start: Array
    """Lower end, or centre."""
    width: Array
    """Or standard deviation."""
    ends: tuple[Array, Array] | None = None
    """How much of a normal law without ends lies below either."""

    def of(self, within: Ragged, at: Array) -> Ragged:
        """Of the rows at some positions."""
        found = within.flat - within.each(self.start[at])
        found /= within.each(self.width[at])
        if self.ends is not None:
            low, high = (column[at] for column in self.ends)
            found = below(found)
            found -= within.each(low)
            found /= within.each(high - low)
        return within.like(found)


def _are_even(some: Ragged, first: Array, last: Array, shares: _Shares, grain: float, test: _Test = _is_even_to_its_ends) -> Array:
    """Whether elements are even without so many of the `first` and of the `last` of each row, once turned into shares of a law."""
    even, enough = np.zeros(len(some), bool), some.lengths - first - last >= _LEAST
    at = np.flatnonzero(enough)
    if len(at):
        within = some.only(enough).within(first[at], last[at])
        near = (within.lengths < STRIDE * STRIDE) | ~are_far_off(shares.of(within.every(STRIDE), at), within.lengths)
        within, at = within.only(near), at[near]
    if len(at):
        even[at] = test(shares.of(within, at), at, grain)
    return even
