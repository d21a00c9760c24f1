"""Which law some numbers follow: constant, uniform, normal, truncated normal, two-sided uniform, or none of these.

Pure statistics, knowing nothing of models. `law_of` tells the shape of a distribution; `fitting` tells whether numbers may have been drawn
from one given law. Tests are set to reject a true law in about one case of ten thousand each (`LEVEL`); the derivations are in
docs/summary.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from paramwatch.columns import Array
from paramwatch.formulas import below, cut_of, gain_over_normal, gain_over_uniform, is_bell, is_even, variance_within

Kind: TypeAlias = Literal["constant", "uniform", "normal", "truncated", "two-sided"]

LEVEL = 1e-4
"""How often a test may reject a law that is true."""

SURE = 4.0
"""Standard errors between a mean or a variance and its law: normal numbers are farther off in 6 cases of 100,000."""

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

BOX = 1.4, 2.1
"""Half the width of numbers that may be uniform, in standard deviations: of a uniform law it is sqrt(3)."""

NEAR_CUT = 1.0
"""Standard deviations: what is cut nearer is hardly curved, and is not told from a uniform law."""


class Law(NamedTuple):
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
    even: bool | None = None
    """Whether `some` are evenly spread between the extremes, if that is known."""
    normal: bool | None = None
    """Whether `some` are normal, if that is known."""

    @property
    def extent(self) -> int:
        """How many elements the extremes are those of."""
        return max(self.total, self.n)

    @classmethod
    def of(cls, elements: Array, grain: float) -> Numbers:
        """Of elements that are all at hand; at least one."""
        some = np.sort(elements)
        return cls(len(some), float(some.mean()), float(some.std()), float(some[0]), float(some[-1]), grain, some)

    def beside(self, some: Array, even: bool | None = None, normal: bool | None = None) -> Numbers:
        """These numbers beside some elements in ascending order."""
        return Numbers(self.n, self.mean, self.std, self.low, self.high, self.grain, some, self.total, even, normal)

    def square(self, centre: float) -> float:
        """Mean square of the distance from a centre."""
        # products: a power that is too large raises
        return self.std * self.std + (self.mean - centre) * (self.mean - centre)

    def reach(self, centre: float) -> float:
        """Largest distance from a centre."""
        return max(self.high - centre, centre - self.low)


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
    gain = 0.0 if _is_as_far_asdrawn_within(x, 1 / ratio) else _nats_for(x, cut, ratio)
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
    outer, m, above = x.reach(0.0), len(x.some), int(x.some.searchsorted(0.0))
    inner = float(np.abs(x.some[max(above - 1, 0) : above + 1]).min())
    # a law that comes near zero leaves the share g of its reach empty with probability (1 - g)^n, at most
    if (1 - inner / outer) ** (m - 1) > LEVEL or abs(m - above - m / 2) > SURE * math.sqrt(m) / 2:
        return []
    far = np.sort(np.abs(x.some))
    within = far[(far > inner) & (far < outer)]
    if len(within) < 8 or not is_even((within - inner) / (outer - inner), x.grain):
        return []
    return [Law("two-sided", 0.0, outer, inner)]


# ---- the shapes -----------------------------------------------------------------------------


def _box(x: Numbers) -> Law | None:
    """The uniform law between the extremes, if the numbers are nearly as wide for their spread as that is."""
    if not BOX[0] < (x.high - x.low) / 2 / x.std < BOX[1]:
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
    if x.even is not None:
        return x.even
    assert x.some is not None
    first, last = int(x.some[0] <= x.low), int(x.some[-1] >= x.high)
    within = x.some[first : len(x.some) - last]
    return len(within) > 8 and bool(is_even((within - x.low) / (x.high - x.low), x.grain))


def _is_normal(x: Numbers) -> bool:
    if x.normal is None:
        assert x.some is not None
        return bool(is_bell(x.some, x.grain))
    return x.normal


def _nats_for(x: Numbers, cut: Law, ratio: float) -> float:
    """How much likelier a cut law is than the normal one; `ratio` is root mean square over reach."""
    gain = _telling(x) * gain_over_normal(cut.cut, ratio)
    if x.extent == x.n:
        return gain
    # of a sample: that the others stay within the extremes speaks for a cut, too, unless they spread less than the sample does
    less = np.linspace(0.0, 4.0, 17) / math.sqrt(2 * x.n)
    others = -(x.extent - x.n) * np.log1p(-2 * below(-1 / ratio / (1 - less)))
    return gain + float((x.n * less**2 + others).min())


def _is_as_far_asdrawn_within(x: Numbers, reach: float) -> bool:
    """Whether they end where torch's do."""
    return reach >= drawn_within(x.grain)


def drawn_within(grain: float) -> float:
    """Where normal numbers of torch end, in standard deviations; infinite if nothing is known of their precision."""
    # Box and Muller: at the radius that the largest uniform number of that precision gives
    return 0.95 * math.sqrt(-2 * math.log(grain / 2)) if grain > 0 else math.inf


def _mean(x: Numbers) -> float:
    """Zero, where that cannot be told from the mean."""
    return 0.0 if abs(x.mean) <= SURE * x.std / math.sqrt(x.n) else x.mean


def _truncated(x: Numbers, centre: float) -> Law:
    """The likeliest normal law with a symmetric cut. The cut is at the extreme, the rest follows from the mean square."""
    reach = x.reach(centre)
    cut = cut_of(x.square(centre) / reach**2)
    return Law("truncated", centre, reach / cut, cut)


def _follows(x: Numbers, law: Law) -> bool:
    """Whether the elements other than the extreme follow a truncated law."""
    assert x.some is not None
    # what rounding puts beside the bound is at it
    low, high = (law.centre + side * law.scale * law.cut * (1 - 1e-9) for side in (-1, 1))
    first, last = int(x.some[0] <= low), int(x.some[-1] >= high)
    z = (x.some[first : len(x.some) - last] - law.centre) / law.scale
    edge = float(below(np.array([-law.cut]))[0])
    return len(z) > 8 and bool(is_even((below(z) - edge) / (1 - 2 * edge), x.grain))


def _may_be_cut_at_two(x: Numbers, centre: float) -> bool:
    """Whether the cut may be at two standard deviations, which is where people put it."""
    kurtosis = 2.3656
    ratio = x.reach(centre) / math.sqrt(x.square(centre)) * math.sqrt(variance_within(2.0)) / 2.0
    error = SURE * math.sqrt((kurtosis - 1) / (4 * x.n))
    # the extreme itself stays off its bound: the density there is 0.113 on each side
    return 1 - error - _NATS / (0.226 * 2 * x.n) - x.grain <= ratio <= 1 + error + x.grain


def _cut_at_two(x: Numbers, cut: Law) -> Law:
    return Law("truncated", cut.centre, math.sqrt(x.square(cut.centre) / variance_within(2.0)), 2.0)
