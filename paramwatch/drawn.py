"""What a law is, what is looked at of a tensor, and what is known of that before the laws are asked.

The words of `laws`, `fitting` and `initial`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from paramwatch.columns import Array
from paramwatch.formulas import Gain, variance_between, variance_within

Kind: TypeAlias = Literal["constant", "uniform", "normal", "truncated", "two-sided"]


class Law(NamedTuple):
    """A distribution that weights are drawn from."""

    kind: Kind
    centre: float
    scale: float
    """Half the width of a uniform law, the standard deviation of a normal one before any cut, the outer edge of a two-sided one."""
    cut: float = math.inf
    """In standard deviations, for a truncated one; the inner edge, for a two-sided one."""
    ends: tuple[float, float] | None = None
    """Where a truncated one ends that is not cut as far on one side as on the other."""

    @property
    def std(self) -> float:
        """Its standard deviation."""
        if self.kind == "uniform":
            return self.scale / math.sqrt(3)
        if self.kind == "truncated" and self.ends is not None:
            return self.scale * math.sqrt(variance_between(*((end - self.centre) / self.scale for end in self.ends)))
        if self.kind == "truncated":
            return self.scale * math.sqrt(variance_within(self.cut))
        if self.kind == "two-sided":
            return math.sqrt((self.scale**2 + self.scale * self.cut + self.cut**2) / 3)
        return self.scale if self.kind == "normal" else 0.0


class Sketch(NamedTuple):
    """A normal law with a cut, as the extremes and the spread of some numbers give it."""

    cut: Law
    ratio: float
    """Root mean square over reach, about its centre."""
    gain: float
    """Nats over a normal law without a cut."""


class Lopsided(NamedTuple):
    """A normal law that is cut farther out on one side, as the extremes, the mean and the spread of some numbers give it."""

    law: Law
    over_normal: float
    """Nats that it gains over a normal law without ends,"""
    over_uniform: float
    """and over a uniform law between the same ends."""


class Tests(NamedTuple):
    """What is known before of elements in ascending order; None where it is found out when it is asked for."""

    even: bool | None = None
    """Whether they are evenly spread between the extremes."""
    normal: bool | None = None
    cut: tuple[Law, bool] | None = None
    """Whether they follow a truncated law, for one such law."""
    two_sided: bool | None = None
    sketch: Sketch | None = None
    uneven: Lopsided | Literal[False] | None = None
    """A law that is cut farther out on one side, False where they follow none."""


NO_TESTS = Tests()


class Answers(NamedTuple):
    """What was found out before about elements; None where that is still to be done."""

    ascending: Array | None = None
    """The elements."""
    some: Array | None = None
    """Those that are not zero, laid evenly where they are rounded."""
    why: str = ""
    """What they do that no smooth law does."""
    tests: Tests = NO_TESTS
    """Of `some`."""
    even_zeros: bool | None = None
    """Whether each column has as many zeros."""


NOTHING = Answers()


class Rows(NamedTuple):
    """What was found out before about the rows of a matrix; None where that is still to be done."""

    orthogonal: Gain | Literal[False] | None = None
    """What they, or the columns if those are fewer, are multiplied by if they are orthogonal, False if they are not."""
    may_repeat: bool | None = None
    """Whether of the first, the middle and the last two are the same."""
    uneven: bool | None = None
    """Whether they, or the columns, are of different scales."""


class Numbers(NamedTuple):
    """What is looked at of a tensor: numbers over all elements, and some elements in ascending order."""

    n: int
    mean: float
    std: float
    low: float
    high: float
    grain: float
    """Distance from 1 to the next number of their dtype: nothing finer can be told."""
    some: Array | None = None
    total: int = 0
    """How many elements the extremes are those of, if more than n; mean and spread are those of n."""
    tests: Tests = NO_TESTS
    """Of `some`."""

    @property
    def extent(self) -> int:
        """How many elements the extremes are those of."""
        return max(self.total, self.n)

    @classmethod
    def of(cls, elements: Array, grain: float) -> Numbers:
        """Of elements that are all at hand; at least one."""
        some = np.sort(elements)
        return cls(len(some), float(some.mean()), float(some.std()), float(some[0]), float(some[-1]), grain, some)

    def beside(self, some: Array, tests: Tests = NO_TESTS) -> Numbers:
        """These numbers beside some elements in ascending order, and what is known of those."""
        return Numbers(self.n, self.mean, self.std, self.low, self.high, self.grain, some, self.total, tests)

    def square(self, centre: float) -> float:
        """Mean square of the distance from a centre."""
        # products: a power that is too large raises
        return self.std * self.std + (self.mean - centre) * (self.mean - centre)

    def reach(self, centre: float) -> float:
        """Largest distance from a centre."""
        return max(self.high - centre, centre - self.low)
