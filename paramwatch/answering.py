"""What the laws ask of elements, answered for many tensors at once; each answer is the one that the elements alone would get.

Behind `together`, from the same formulas as `initial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from paramwatch.columns import Array
from paramwatch.drawn import Answers, Law, Lopsided, Numbers, Tests
from paramwatch.initial import ENOUGH
from paramwatch.laws import BOX, Asked, asked, falls, is_clear
from paramwatch.ragged import Ragged
from paramwatch.repeats import few_values, have_tied_ends, spread
from paramwatch.shapes import are_between, are_cut, are_normal, are_two_sided, are_uniform
from paramwatch.wording import not_smooth

_NEAR, _TINY = 1000.0, 1e-10
"""Standard deviations from zero up to which single precision tells what double does, and where it can be squared."""

LEAST = 8
"""Elements that are not zero without which nothing is asked of them."""

_NOT_ASKED = Asked(may_be_normal=False)


def is_near(x: Numbers) -> bool:
    """Whether single precision tells of their elements what double does."""
    return _TINY < x.reach(0.0) < min(1 / _TINY, _NEAR * x.std)


def answered(elements: Ragged, numbers: Sequence[Numbers]) -> Sequence[Answers | None]:
    """Of some tensors of one grain; None of those that have too few elements that are not zero.

    Args:
        elements: Of each, in any order: in single precision if they are near.
        numbers: Of those of them whose law is asked for.
    """
    # sorting is quicker in the precision they have
    ascending = elements.sorted()
    some = ascending.flat != 0
    if some.all():
        return _answers(ascending, ascending, numbers)
    enough = ascending.counts(some) >= LEAST
    found: list[Answers | None] = [None] * len(numbers)
    if enough.any():
        at, ascending = np.flatnonzero(enough).tolist(), ascending.only(enough)
        nonzero = ascending.where(ascending.flat != 0)
        for i, answers in zip(at, _answers(ascending, nonzero, [numbers[i] for i in at]), strict=True):
            found[i] = answers
    return found


def _answers(ascending: Ragged, nonzero: Ragged, numbers: Sequence[Numbers]) -> list[Answers]:
    grain = numbers[0].grain
    low, high, std, n = np.array([(x.low, x.high, x.std, x.n) for x in numbers]).T
    few, tied = few_values(ascending, grain), have_tied_ends(nonzero, grain)
    large, far = n >= ENOUGH, np.maximum(high, -low)
    smooth = (few == 0) & ~tied & large & (nonzero.lengths >= ENOUGH // 2)
    laid = spread(nonzero, grain) if smooth.any() else nonzero
    with np.errstate(divide="ignore", over="ignore"):
        wide = (high - low) / 2 / std
    boxed = smooth & (BOX[0] < wide) & (wide < BOX[1])
    even = _found(boxed, laid, lambda some, at: are_uniform(some, low[at], high[at], grain))
    with np.errstate(over="ignore", under="ignore"):
        squared = (std**2 > 0) & (far**2 < math.inf)
    rest = smooth & squared & np.array([not one or falls(x) for x, one in zip(numbers, even, strict=True)])
    each = [_NOT_ASKED] * len(numbers)
    which = np.flatnonzero(rest).tolist()
    for i, one in zip(which, asked([numbers[i] for i in which]), strict=True):
        each[i] = one
    sketches, laws, uneven, may_be_normal = zip(*each, strict=True)
    skewed = np.array([bool(one) for one in uneven])
    between = _found(skewed, laid, lambda some, at: _are_between(some, [uneven[i] for i in at], n[at], grain))
    open_ = rest & np.array([not (one and fits and is_clear(one)) for one, fits in zip(uneven, between, strict=True)])
    cuts = open_ & np.array([law is not None for law in laws])
    follows = _found(cuts, laid, lambda some, at: _are_cut(some, [laws[i] for i in at], grain))
    open_ &= ~(boxed & np.array([bool(fits) for fits in follows]))
    normal = _found(open_ & np.array(may_be_normal), laid, lambda some, _: are_normal(some, grain))
    neither = rest & np.array([not (one or other or third) for one, other, third in zip(normal, follows, between, strict=True)])
    two_sided = _found(neither, laid, lambda some, at: are_two_sided(some, far[at], grain))
    for i, found in enumerate(_found(~large, nonzero, lambda some, at: are_two_sided(some, far[at], grain))):
        two_sided[i] = two_sided[i] if found is None else found
    cut = [(law, fits) if law is not None and fits is not None else None for law, fits in zip(laws, follows, strict=True)]
    lopsided = [None if one is None else (fits and one) or False for one, fits in zip(uneven, between, strict=True)]
    tests = [Tests(*known) for known in zip(even, normal, cut, two_sided, sketches, lopsided, strict=True)]
    rows = (some.rows() for some in (ascending, nonzero, laid))
    return [
        Answers(one, rest if not enough else smoothed, not_smooth(one, rest, grain, count) if enough and (count or ends) else "", test)
        for one, rest, smoothed, enough, count, ends, test in zip(*rows, large.tolist(), few.tolist(), tied.tolist(), tests, strict=True)
    ]


def _are_between(some: Ragged, found: Sequence[Lopsided | Literal[False] | None], of: Array, grain: float) -> Array:
    laws = [one.law for one in found if one]
    return are_between(some, np.array([(law.centre, law.scale, *(law.ends or ())) for law in laws]).T, of, grain)


def _are_cut(some: Ragged, laws: Sequence[Law | None], grain: float) -> Array:
    centre, scale, cut = np.array([(law.centre, law.scale, law.cut) for law in laws if law is not None]).T
    return are_cut(some, centre, scale, cut, grain)


def _found(where: Array, elements: Ragged, test: Callable[[Ragged, Array], Array]) -> list[bool | None]:
    """What a test finds of the rows at some positions, None of the others."""
    found: list[bool | None] = [None] * len(where)
    if len(at := np.flatnonzero(where)):
        for i, passes in zip(at.tolist(), test(elements.only(where), at).tolist(), strict=True):
            found[i] = passes
    return found
