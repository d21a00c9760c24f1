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
from paramwatch.standards import DEFAULT, OF_SHAPE, Standard, named_stds, standard

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
    mean, size = SURE * law.std / math.sqrt(n) + grain * (law.scale + abs(law.centre)), law.scale * law.scale
    near, far, low, high = _ends(law.kind, n, extent, grain)
    base = math.log(2 * law.scale) if law.kind == "uniform" else math.log(law.scale) + 0.5 * math.log(2 * math.pi)
    slope = 0.0 if law.kind == "uniform" else -n / size / 2
    return Range(law, mean, (law.scale * near, law.scale * far), (size * low, size * high), -n * base, slope)


@lru_cache(maxsize=4096)
def _ends(kind: Kind, n: int, extent: int, grain: float) -> tuple[float, float, float, float]:
    """Between which bounds the reach of a uniform or normal law of scale 1 is, and between which the mean square."""
    if kind == "uniform":
        # the largest of n is below the share q of its bound with probability q^n; the variance of (x/a)^2 is 4/45
        off = SURE * math.sqrt(4 / 45 / n) + grain
        # in coarse dtypes torch draws uniform numbers that are rounded down
        return LEVEL ** (1 / extent) - 2 * grain, 1 + grain, 1 / 3 - off, 1 / 3 + off
    # Wilson and Hilferty: the cube root of a chi-square over its degrees of freedom is nearly normal, also for few of them
    width = 2 / (9 * n)
    off = SURE * math.sqrt(width) + grain
    near, far = _farthest(extent)
    return min(near, drawn_within(grain)), far, max(1 - width - off, 0.0) ** 3, (1 - width + off) ** 3


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
    own = default if default is not None and default.kind in kinds else None
    if own is not None and len(shape) == 1 and range_of(own, *size).holds(reach, square, off):
        # no other law has a name for a vector
        return (_own(own),)
    # all of them are centred at zero
    known = _known(shape, own, _within(shape, kinds, reach, square, size), *size)
    fitting = [one for one in known if one.range.holds(reach, square, off)]
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
    """The standards of one law, those one thinks of first in front, and what it gives."""

    standards: tuple[Standard, ...]
    range: Range


@lru_cache(maxsize=1024)
def _own(default: Law) -> Standard:
    return Standard(DEFAULT, default, -2)


@lru_cache(maxsize=1024)
def _known(
    shape: tuple[int, ...], own: Law | None, which: tuple[tuple[Kind, int], ...], n: int, extent: int, grain: float
) -> Sequence[_Known]:
    """The module's own default, and of the laws that have a name for a shape some."""
    by_law: dict[tuple[Kind, str], list[Standard]] = {}
    for one in [*([] if own is None else [_own(own)]), *(standard(shape, kind, i) for kind, i in which)]:
        by_law.setdefault((one.law.kind, f"{one.law.scale:.9g}"), []).append(one)
    return [_Known(tuple(same), range_of(same[0].law, n, extent, grain)) for same in by_law.values()]


def _within(
    shape: tuple[int, ...], kinds: frozenset[Kind], reach: float, square: float, size: tuple[int, int, float]
) -> tuple[tuple[Kind, int], ...]:
    """Which of the laws that have a name for a shape give numbers of such a reach, or mean square."""
    stds, of_uniform = named_stds(shape), reach / math.sqrt(3)
    found: list[tuple[Kind, int]] = []
    if "uniform" in kinds:
        near, far, _, _ = _ends("uniform", *size)
        found += [("uniform", i) for i, std in enumerate(stds[:OF_SHAPE]) if near * std <= of_uniform <= far * std]
    if "normal" in kinds:
        _, _, low, high = _ends("normal", *size)
        found += [("normal", i) for i, std in enumerate(stds) if low * std * std <= square <= high * std * std]
    return tuple(found)


@lru_cache(maxsize=1024)
def _round_one(bound: float, n: int, extent: int, grain: float) -> _Known:
    """The uniform law with a bound of one digit."""
    law = Law("uniform", 0.0, bound)
    return _Known((Standard("", law, 1),), range_of(law, n, extent, grain))
