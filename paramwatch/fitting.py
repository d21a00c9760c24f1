"""Which given laws numbers agree with: the bounds of what a law gives, and of the laws with a name those that fit.

Behind `summary`, beside `laws`, which tells the shape without a given law. A law's bounds depend on the number of elements and not on the
elements, so tensors of one shape share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

from paramwatch.drawn import Kind, Law, Numbers
from paramwatch.formulas import drawn_within
from paramwatch.shapes import LEVEL, SURE
from paramwatch.standards import DEFAULT, Standard, standards

_LESS_LIKELY = 7.5
"""Nats that a true law loses to another one in less than 1 draw of 1000: what loses more is not mentioned."""


@dataclass(frozen=True, slots=True)
class Range:
    """Between which bounds the numbers lie that a law gives: about its centre, in 9,999 cases of 10,000 each."""

    law: Law
    mean: float
    reach: tuple[float, float]
    square: tuple[float, float]
    base: float
    """The log likelihood is this ..."""
    slope: float
    """... plus this times the mean square."""

    def holds(self, reach: float, square: float, off: float) -> bool:
        """Whether they do, by their reach and their mean square about its centre, and how far off their mean is."""
        return self.reach[0] <= reach <= self.reach[1] and self.square[0] <= square <= self.square[1] and off <= self.mean


@lru_cache(maxsize=4096)
def range_of(law: Law, n: int, extent: int, grain: float) -> Range:
    """Of a constant, uniform or normal law, for so many elements with the extremes of so many, rounded to a grain."""
    if law.kind == "constant":
        return Range(law, math.inf, (0.0, grain * abs(law.centre)), (0.0, math.inf), 0.0, 0.0)
    # in coarse dtypes torch draws uniform numbers that are rounded down
    mean, size = SURE * law.std / math.sqrt(n) + grain * (law.scale + abs(law.centre)), law.scale * law.scale
    if law.kind == "uniform":
        # the largest of n is below the share q of its bound with probability q^n; the variance of (x/a)^2 is 4/45
        reach = law.scale * (LEVEL ** (1 / extent) - 2 * grain), law.scale * (1 + grain)
        off = SURE * math.sqrt(4 / 45 / n) + grain
        return Range(law, mean, reach, (size * (1 / 3 - off), size * (1 / 3 + off)), -n * math.log(2 * law.scale), 0.0)
    # Wilson and Hilferty: the cube root of a chi-square over its degrees of freedom is nearly normal, also for few of them
    width = 2 / (9 * n)
    off = SURE * math.sqrt(width) + grain
    square = size * max(1 - width - off, 0.0) ** 3, size * (1 - width + off) ** 3
    near, far = _farthest(extent)
    reach = law.scale * min(near, drawn_within(grain)), law.scale * far
    return Range(law, mean, reach, square, -n * (math.log(law.scale) + 0.5 * math.log(2 * math.pi)), -n / size / 2)


@lru_cache(maxsize=4096)
def _farthest(extent: int) -> tuple[float, float]:
    """Between which distances the farthest of so many standard normal numbers is: within z with probability (1 - tail)^extent."""
    near, far = (-NormalDist().inv_cdf(tail / 2) for tail in (-math.expm1(math.log(LEVEL) / extent), LEVEL / extent))
    return near, far


def agrees(x: Numbers, law: Law) -> bool:
    """Whether mean, spread and extremes of the numbers are such as the law gives."""
    centre = law.centre
    return range_of(law, x.n, x.extent, x.grain).holds(x.reach(centre), x.square(centre), abs(x.mean - centre))


def named(x: Numbers, kinds: frozenset[Kind], shape: tuple[int, ...], default: Law | None) -> tuple[Standard, ...]:
    """The standards for a shape that the numbers agree with, the likeliest first; the module's own default before all."""
    size, reach, square, off = (x.n, x.extent, x.grain), x.reach(0.0), x.square(0.0), abs(x.mean)
    own, known = _of_shape(shape, default, kinds, *size)
    if own is not None and len(shape) == 1 and own.range.holds(reach, square, off):
        # no other law has a name for a vector
        return own.standards[:1]
    # all of them are centred at zero
    fitting = [one for one in known if one.least <= reach <= one.most and one.range.holds(reach, square, off)]
    if "uniform" in kinds and reach > 0:
        one = _round_one(float(f"{reach * (1 + 2 / x.n):.0e}"), *size)
        if one.range.holds(reach, square, off):
            fitting.append(one)
    if len(fitting) < 2:
        return fitting[0].standards if fitting else ()
    likelihood = [one.range.base + one.range.slope * square for one in fitting]
    most = max(likelihood)
    best = fitting[likelihood.index(most)].range.law
    lost = [0.0 if _rounds_alike(one.range.law, best, x.grain) else most - nats for one, nats in zip(fitting, likelihood, strict=True)]
    left = [(nats, standard) for one, nats in zip(fitting, lost, strict=True) if nats <= _LESS_LIKELY for standard in one.standards]
    # in the order, one rank is worth two nats
    left.sort(key=lambda each: (2 * each[1].rank + each[0], abs(each[1].law.scale - reach)))
    return tuple(standard for _, standard in left)


def _rounds_alike(law: Law, best: Law, grain: float) -> bool:
    """Whether the scales of two laws lie so close that what is rounded, or drawn in that precision, does not tell them apart."""
    return law.kind == best.kind and abs(law.scale - best.scale) <= 2 * grain * best.scale


class _Known(NamedTuple):
    """The standards of one law, those one thinks of first in front, what it gives, and how far out the farthest element may be."""

    standards: tuple[Standard, ...]
    range: Range
    least: float
    most: float

    @classmethod
    def of(cls, standards: Sequence[Standard], n: int, extent: int, grain: float) -> _Known:
        found = range_of(standards[0].law, n, extent, grain)
        return cls(tuple(standards), found, *found.reach)


@lru_cache(maxsize=1024)
def _of_shape(
    shape: tuple[int, ...], default: Law | None, kinds: frozenset[Kind], n: int, extent: int, grain: float
) -> tuple[_Known | None, Sequence[_Known]]:
    """The module's own default, and all laws of some kinds that have a name for a shape."""
    own = [Standard(DEFAULT, default, -2)] if default is not None and default.kind in kinds else []
    by_law: dict[tuple[Kind, str], list[Standard]] = {}
    for standard in [*own, *standards(shape)]:
        if standard.law.kind in kinds:
            by_law.setdefault((standard.law.kind, f"{standard.law.scale:.9g}"), []).append(standard)
    known = [_Known.of(same, n, extent, grain) for same in by_law.values()]
    return (known[0] if own else None), known


@lru_cache(maxsize=1024)
def _round_one(bound: float, n: int, extent: int, grain: float) -> _Known:
    """The uniform law with a bound of one digit."""
    return _Known.of([Standard("", Law("uniform", 0.0, bound), 1)], n, extent, grain)
