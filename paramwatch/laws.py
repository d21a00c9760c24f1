"""Which law some numbers follow: constant, uniform, normal, truncated normal, two-sided uniform, or none of these.

Pure statistics, knowing nothing of models. `law_of` tells the shape of a distribution; `agrees` tells whether numbers may have been drawn
from one given law. Tests are set to reject a true law in about one case of ten thousand each (`LEVEL`); the derivations are in
docs/summary.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from paramwatch.columns import Array
from paramwatch.formulas import CUTS, RATIOS, anderson_darling, below, gain_over_normal, gain_over_uniform, is_even, variance_within

Kind: TypeAlias = Literal["constant", "uniform", "normal", "truncated", "two-sided"]

LEVEL = 1e-4
"""How often a test may reject a law that is true."""

SURE = 4.0
"""Standard errors between a mean or a variance and its law: normal numbers are farther off in 6 cases of 100,000."""

_PARTLY_KNOWN = 1.85
"""The same where mean and standard deviation of a normal law are estimated (D'Agostino and Stephens, 1986, table 4.9)."""

_NATS = -math.log(LEVEL)
"""A cut at the largest of n normal numbers gains Exp(1) nats in likelihood, so that more than this comes in `LEVEL` of cases."""

_OPEN = math.log(100)
"""Nats: a law that is less likely than another by less than this is said, too. A true one loses more in 1 draw of 100 at most, and of
normal numbers a cut gains more in 1 draw of 100."""

_CLOSED = math.log(1e6)
"""Nats that a cut must gain over a normal or a uniform law to be said alone: it gains them in 1 draw of a million from these."""

_LEANS = 2.0
"""Nats that a cut must gain to be said beside a uniform law of a known bound. Of 256 elements it does in 1 draw of 50, of 1000 in none."""

_FOR_A_CUT = 2.5
"""Nats that a cut at two standard deviations must gain to be named first: of 256 elements, either law is then second in 1 draw of 100."""

NEAR_CUT = 1.0
"""Standard deviations: what is cut nearer is hardly curved, and is not told from a uniform law."""


@dataclass(frozen=True, slots=True)
class Law:
    """A distribution that weights are drawn from."""

    kind: Kind
    centre: float
    scale: float
    """Half the width of a uniform law, the standard deviation of a normal one before any cut, the outer edge of a two-sided one."""
    cut: float = math.inf
    """In standard deviations, for a truncated one; the inner edge, for a two-sided one."""

    @property
    def std(self) -> float:
        """Its standard deviation."""
        if self.kind == "uniform":
            return self.scale / math.sqrt(3)
        if self.kind == "truncated":
            return self.scale * math.sqrt(variance_within(self.cut))
        if self.kind == "two-sided":
            return math.sqrt((self.scale**2 + self.scale * self.cut + self.cut**2) / 3)
        return self.scale if self.kind == "normal" else 0.0


@dataclass(frozen=True, slots=True)
class Numbers:
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

    @property
    def extent(self) -> int:
        """How many elements the extremes are those of."""
        return max(self.total, self.n)

    @classmethod
    def of(cls, elements: Array, grain: float) -> Numbers:
        """Of elements that are all at hand; at least one."""
        some = np.sort(elements)
        return cls(len(some), float(some.mean()), float(some.std()), float(some[0]), float(some[-1]), grain, some)

    def beside(self, some: Array) -> Numbers:
        """These numbers beside some elements in ascending order."""
        return Numbers(self.n, self.mean, self.std, self.low, self.high, self.grain, some, self.total)

    def square(self, centre: float) -> float:
        """Mean square of the distance from a centre."""
        # products: a power that is too large raises
        return self.std * self.std + (self.mean - centre) * (self.mean - centre)

    def reach(self, centre: float) -> float:
        """Largest distance from a centre."""
        return max(self.high - centre, centre - self.low)


def agrees(x: Numbers, law: Law) -> bool:
    """Whether mean, spread and extremes of the numbers are such as the law gives. Costs no pass over the elements."""
    reach = x.reach(law.centre)
    if law.kind == "constant":
        return reach <= x.grain * abs(law.centre)
    # in coarse dtypes torch draws uniform numbers that are rounded down
    if abs(x.mean - law.centre) > SURE * law.std / math.sqrt(x.n) + x.grain * (law.scale + abs(law.centre)):
        return False
    if law.kind == "uniform":
        # the largest of n is below the share q of its bound with probability q^n; the variance of (x/a)^2 is 4/45
        inside = law.scale * (LEVEL ** (1 / x.extent) - 2 * x.grain) <= reach <= law.scale * (1 + x.grain)
        return inside and abs(x.square(law.centre) / law.scale**2 - 1 / 3) <= SURE * math.sqrt(4 / 45 / x.n) + x.grain
    # Wilson and Hilferty: the cube root of a chi-square over its degrees of freedom is nearly normal, also for few of them
    ratio, width = x.square(law.centre) / law.scale**2, 2 / (9 * x.n)
    return abs(ratio ** (1 / 3) - (1 - width)) <= SURE * math.sqrt(width) + x.grain and _extreme_is_normal(x, reach / law.scale)


def scales(x: Numbers, kind: Kind) -> tuple[float, float]:
    """Between which two scales a uniform or normal law about zero must lie to agree: what is outside need not be asked about."""
    if kind == "uniform":
        return x.reach(0.0) / (1 + x.grain), x.reach(0.0) / max(LEVEL ** (1 / x.extent) - 2 * x.grain, 1e-300)
    width, rms = 2 / (9 * x.n), math.sqrt(x.square(0.0))
    narrow, wide = 1 - width - SURE * math.sqrt(width) - x.grain, 1 - width + SURE * math.sqrt(width) + x.grain
    return rms / wide**1.5, rms / narrow**1.5 if narrow > 0 else math.inf


def log_likelihood(x: Numbers, law: Law) -> float:
    """Of a uniform or normal law that the numbers agree with; differences between laws are what has a meaning."""
    if law.kind == "uniform":
        return -x.n * math.log(2 * law.scale)
    return -x.n * (math.log(law.scale) + 0.5 * math.log(2 * math.pi) + x.square(law.centre) / law.scale**2 / 2)


def law_of(x: Numbers, bound_known: bool = False) -> Sequence[Law]:
    """The laws that the numbers look drawn from, the likeliest first: none, one, or two that cannot be told apart.

    Args:
        x: Not all equal; with `some`, and of those enough to tell (256 or more).
        bound_known: Whether they end where a uniform law with a name does: then a cut must gain something to be said.
    """
    flat = _box(x)
    if flat is not None and (found := _flat_or_cut(x, flat, bound_known)):
        return found
    cut = _truncated(x, _mean(x))
    normal = Law("normal", cut.centre, math.sqrt(x.square(cut.centre)))
    ratio = normal.scale / x.reach(cut.centre)
    two = _cut_at_two(x, cut) if _may_be_cut_at_two(x, cut.centre) else None
    gain = 0.0 if _is_as_far_as_drawn(x, 1 / ratio) else _nats_for(x, cut, ratio)
    may_be_normal = gain <= _CLOSED and _is_normal(x) and x.extent * math.erfc(1 / ratio / math.sqrt(2)) > LEVEL
    if gain <= _NATS:
        if may_be_normal and two is not None:
            return [two, normal] if x.n * gain_over_normal(2.0, ratio) > _FOR_A_CUT else [normal, two]
        if may_be_normal:
            return [normal, cut] if gain > _OPEN and _follows(x, cut) else [normal]
    elif flat is None and _follows(x, cut):
        return [two or cut, normal] if may_be_normal else [two or cut]
    return two_sided(x)


def two_sided(x: Numbers) -> Sequence[Law]:
    """U(-b, -a) or U(a, b), each as often: a uniform distance from zero that stays clear of it, and signs that balance.

    The one shape that a dozen elements show.
    """
    assert x.some is not None
    far = np.sort(np.abs(x.some))
    inner, outer, m = float(far[0]), x.reach(0.0), len(far)
    # a law that comes near zero leaves the share g of its reach empty with probability (1 - g)^n, at most
    if (1 - inner / outer) ** (m - 1) > LEVEL or abs(int((x.some > 0).sum()) - m / 2) > SURE * math.sqrt(m) / 2:
        return []
    within = far[(far > inner) & (far < outer)]
    if len(within) < 8 or not is_even((within - inner) / (outer - inner), x.grain):
        return []
    return [Law("two-sided", 0.0, outer, inner)]


# ---- the shapes -----------------------------------------------------------------------------


def _box(x: Numbers) -> Law | None:
    """The uniform law between the extremes, if the numbers are nearly as wide for their spread as that is: its ratio is sqrt(3)."""
    if not 1.4 < (x.high - x.low) / 2 / x.std < 2.1:
        return None
    # the two extremes of a symmetric law differ by more than t/n of its width with probability exp(-t)
    apart, width = abs(x.high + x.low), x.high - x.low
    if apart <= width * _NATS / x.extent + 2 * x.grain * width:
        return Law("uniform", 0.0, x.reach(0.0))
    return Law("uniform", (x.high + x.low) / 2, width / 2)


def _flat_or_cut(x: Numbers, flat: Law, bound_known: bool) -> Sequence[Law]:
    """A uniform law, a normal one that is cut near its centre, or both where the likelihoods do not tell."""
    cut = _truncated(x, flat.centre)
    ratio, n = math.sqrt(x.square(flat.centre)) / x.reach(flat.centre), _telling(x)
    gain, uniform = n * gain_over_uniform(cut.cut, ratio), _is_uniform(x)
    curved, lead = cut, gain
    if cut.cut < NEAR_CUT and uniform and gain <= _CLOSED:
        # the nearest cut that is spoken of may be less likely than the likeliest
        curved, lead = Law("truncated", cut.centre, flat.scale / NEAR_CUT, NEAR_CUT), n * gain_over_uniform(NEAR_CUT, ratio)
    if uniform and lead <= (_LEANS if bound_known else -_OPEN):
        return [flat]
    if not (uniform and gain <= _CLOSED) and not (gain > _LEANS and _follows(x, curved)):
        return [flat] if uniform else []
    if lead - n * gain_over_uniform(2.0, ratio) < _LEANS:
        curved = _cut_at_two(x, curved)
    if gain > _CLOSED and curved.cut >= NEAR_CUT:
        return [curved]
    return [curved, flat] if gain > _OPEN else [flat, curved]


def _telling(x: Numbers) -> float:
    """How many elements say something about a curve: rounding shifts their mean square by a grain, and more would take that for one."""
    return min(x.n, 0.5 / x.grain**2) if x.grain else x.n


def _is_uniform(x: Numbers) -> bool:
    """Given the extremes, the other elements of a uniform law are uniform between them, with nothing left to estimate."""
    assert x.some is not None
    first, last = int(x.some[0] <= x.low), int(x.some[-1] >= x.high)
    within = x.some[first : len(x.some) - last]
    return len(within) > 8 and is_even((within - x.low) / (x.high - x.low), x.grain)


def _is_normal(x: Numbers) -> bool:
    assert x.some is not None
    m = len(x.some)
    mean, std = float(x.some.mean()), float(x.some.std())
    statistic = anderson_darling(below((x.some - mean) / std), x.grain) * (1 + 0.75 / m + 2.25 / m**2)
    return statistic <= _PARTLY_KNOWN


def _extreme_is_normal(x: Numbers, reach: float) -> bool:
    """Whether the largest, in standard deviations, is neither too far out nor too near."""
    near = math.erf(reach / math.sqrt(2)) ** x.extent <= LEVEL
    return x.extent * math.erfc(reach / math.sqrt(2)) > LEVEL and (not near or _is_as_far_as_drawn(x, reach))


def _nats_for(x: Numbers, cut: Law, ratio: float) -> float:
    """How much likelier a cut law is than the normal one; `ratio` is root mean square over reach."""
    gain = _telling(x) * gain_over_normal(cut.cut, ratio)
    if x.extent == x.n:
        return gain
    # of a sample: that the others stay within the extremes speaks for a cut, too, unless they spread less than the sample does
    less = np.linspace(0.0, 4.0, 17) / math.sqrt(2 * x.n)
    others = -(x.extent - x.n) * np.log1p(-2 * below(-1 / ratio / (1 - less)))
    return gain + float((x.n * less**2 + others).min())


def _is_as_far_as_drawn(x: Numbers, reach: float) -> bool:
    """Whether they end where Box and Muller's do: at the radius that the largest uniform number of their precision gives."""
    return x.grain > 0 and reach >= 0.95 * math.sqrt(-2 * math.log(x.grain / 2))


def _mean(x: Numbers) -> float:
    """Zero, where that cannot be told from the mean."""
    return 0.0 if abs(x.mean) <= SURE * x.std / math.sqrt(x.n) else x.mean


def _truncated(x: Numbers, centre: float) -> Law:
    """The likeliest normal law with a symmetric cut. The cut is at the extreme, the rest follows from the mean square."""
    reach = x.reach(centre)
    cut = float(np.interp(-x.square(centre) / reach**2, -RATIOS, CUTS))
    return Law("truncated", centre, reach / cut, cut)


def _follows(x: Numbers, law: Law) -> bool:
    """Whether the elements other than the extreme follow a truncated law."""
    assert x.some is not None
    # what rounding puts beside the bound is at it
    low, high = (law.centre + side * law.scale * law.cut * (1 - 1e-9) for side in (-1, 1))
    first, last = int(x.some[0] <= low), int(x.some[-1] >= high)
    z = (x.some[first : len(x.some) - last] - law.centre) / law.scale
    edge = float(below(np.array([-law.cut]))[0])
    return len(z) > 8 and is_even((below(z) - edge) / (1 - 2 * edge), x.grain)


def _may_be_cut_at_two(x: Numbers, centre: float) -> bool:
    """Whether the cut may be at two standard deviations, which is where people put it."""
    kurtosis = 2.3656
    ratio = x.reach(centre) / math.sqrt(x.square(centre)) * math.sqrt(variance_within(2.0)) / 2.0
    error = SURE * math.sqrt((kurtosis - 1) / (4 * x.n))
    # the extreme itself stays off its bound: the density there is 0.113 on each side
    return 1 - error - _NATS / (0.226 * 2 * x.n) - x.grain <= ratio <= 1 + error + x.grain


def _cut_at_two(x: Numbers, cut: Law) -> Law:
    return Law("truncated", cut.centre, math.sqrt(x.square(cut.centre) / variance_within(2.0)), 2.0)
