"""Which law some numbers follow: constant, uniform, normal, truncated normal, two-sided uniform, or none of these.

Pure statistics, knowing nothing of models. `law_of` tells the shape of a distribution; `fitting` tells whether numbers may have been drawn
from one given law. Tests are set to reject a true law in about one case of ten thousand each (`LEVEL`); the derivations are in
docs/summary.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from paramwatch.drawn import Law, Lopsided, Numbers, Sketch
from paramwatch.formulas import below, cut_of, drawn_within, gain_over_normal, gain_over_uniform, telling, variance_within
from paramwatch.lopsided import askew, beyond, lopsided, slope
from paramwatch.ragged import Ragged
from paramwatch.shapes import LEVEL, SURE, are_between, are_cut, are_normal, are_two_sided, are_uniform

_NATS = -math.log(LEVEL)
"""A cut at the largest of n normal numbers gains Exp(1) nats in likelihood, so that more than this comes in `LEVEL` of cases."""

_OPEN = math.log(100)
"""Nats: a law that is less likely than another by less than this is said, too. A true one loses more in 1 draw of 100 at most, and of
normal numbers a cut gains more in 1 draw of 100."""

_CLOSED = math.log(1e6)
"""Nats that a cut must gain over a normal or a uniform law to be said alone: it gains them in 1 draw of a million from these."""

_LEANS = 2.0
"""Nats that a cut must gain to be said beside a uniform law of a known bound. Of 256 elements it does in 1 draw of 50, of 1000 in none."""

_ASKEW = math.log(1000)
"""Nats that a cut must gain to be said to be farther out on one side. Of numbers of which it is not it does in 1 draw of 500."""

_OPEN_TO_FEW = 2.5
"""The same of 256 to 375 elements: of normal numbers a cut gains more in 1 draw of 12."""

_OF_A_HUNDRED = 0.01
"""Where so many are missing, a cut is said beside a normal law: of 256 elements that end at -2 standard deviations in 99 draws of 100."""

_FAR = 6.6
"""Elements that would be farther out than the extremes of normal numbers come in 1 draw of 100."""

_A_SLOPE = 640
"""Elements for a nat that a slope gains over a uniform law whose bound has no name, before it is said, too: more, and it is likelier that
they are normal ones, cut at the centre and one standard deviation."""

_FOR_A_CUT = 2.5
"""Nats that a cut at two standard deviations must gain to be named first: of 256 elements, either law is then second in 1 draw of 100."""

BOX = 1.4, 2.1
"""Half the width of numbers that may be uniform, in standard deviations: of a uniform law it is sqrt(3)."""

NEAR_CUT = 1.0
"""Standard deviations: what is cut nearer is hardly curved, and is not told from a uniform law."""


def law_of(x: Numbers, bound_known: bool = False) -> Sequence[Law]:
    """The laws that the numbers look drawn from, the likeliest first: none, one, or two that cannot be told apart.

    Args:
        x: Not all equal; with `some`, and of those enough to tell (256 or more).
        bound_known: Whether they end where a uniform law with a name does: then a cut must gain something to be said.
    """
    flat = _box(x)
    if flat is not None and (found := _flat_or_cut(x, flat, bound_known)):
        return found
    sketch = x.tests.sketch or _sketches([x])[0]
    cut, ratio, gain = sketch
    uneven = _uneven(x, _least(x, sketch)) if x.tests.uneven is None else x.tests.uneven or None
    if uneven is not None and flat is not None and uneven.over_uniform <= _CLOSED:
        uneven = None
    if uneven is not None and uneven.over_normal > _CLOSED:
        return [uneven.law]
    normal = Law("normal", cut.centre, math.sqrt(x.square(cut.centre)))
    two = _cut_at_two(x, cut) if _may_be_cut_at_two(x, cut.centre) else None
    may_be_normal = gain <= _CLOSED and _is_normal(x) and x.extent * math.erfc(1 / ratio / math.sqrt(2)) > LEVEL
    if uneven is not None and not may_be_normal and uneven.over_normal > _NATS:
        return [uneven.law]
    if uneven is not None:
        return [uneven.law, normal] if uneven.over_normal > _NATS or not may_be_normal else [normal, uneven.law]
    if gain <= _NATS:
        if may_be_normal and two is not None:
            return [two, normal] if x.n * gain_over_normal(2.0, ratio) > _FOR_A_CUT else [normal, two]
        if may_be_normal:
            return [normal, cut] if _may_be_cut(x, sketch) and _follows(x, cut) else [normal]
    elif flat is None and _follows(x, cut):
        return [two or cut, normal] if may_be_normal else [two or cut]
    return two_sided(x)


def two_sided(x: Numbers) -> Sequence[Law]:
    """U(-b, -a) or U(a, b), each as often: a uniform distance from zero that stays clear of it, and signs that balance.

    The one shape that a dozen elements show.
    """
    assert x.some is not None
    outer = x.reach(0.0)
    found = bool(are_two_sided(Ragged.of([x.some]), np.array([outer]), x.grain)[0]) if x.tests.two_sided is None else x.tests.two_sided
    return [Law("two-sided", 0.0, outer, float(np.abs(x.some).min()))] if found else []


class Asked(NamedTuple):
    """What `law_of` asks of some numbers, as far as that is known before."""

    sketch: Sketch | None = None
    cut: Law | None = None
    """The truncated law that they may follow,"""
    uneven: Lopsided | Literal[False] | None = None
    """and one that is cut farther out on one side: False where there is none, None where it was not looked for."""
    may_be_normal: bool = True


def asked(numbers: Sequence[Numbers]) -> list[Asked]:
    """Of numbers that are not evenly spread, or that fall to one side."""
    flat = [_box(x) for x in numbers]
    sketches = iter(_sketches([x for x, box in zip(numbers, flat, strict=True) if box is None]))
    each = [None if box is not None else next(sketches) for box in flat]
    least = [_least(x, sketch) if sketch else -math.inf if falls(x) else None for x, sketch in zip(numbers, each, strict=True)]
    uneven = iter(lopsided(*_both([(x, nats) for x, nats in zip(numbers, least, strict=True) if nats is not None])))
    found: list[Asked] = []
    for x, box, sketch, nats in zip(numbers, flat, each, least, strict=True):
        one: Lopsided | Literal[False] | None = None if nats is None else next(uneven) or False
        if sketch is None:
            found.append(Asked(cut=_truncated(x, box.centre if box else 0.0), uneven=one))
        else:
            cut = sketch.cut if _may_be_cut(x, sketch) else None
            found.append(Asked(sketch, cut, False if one is None else one, sketch.gain <= _CLOSED))
    return found


def falls(x: Numbers) -> bool:
    """Whether numbers that may be uniform fall to one side so much that a law which does is looked for."""
    return slope(x) > max(_LEANS, min(x.n / _A_SLOPE, _OPEN))


def is_clear(uneven: Lopsided) -> bool:
    """Whether a law that is cut farther out on one side, if the numbers follow it, is said whatever else they follow."""
    return uneven.over_normal > _CLOSED and uneven.over_uniform > _CLOSED


def _falls_enough(n: int, bound_known: bool) -> float:
    return max(_OPEN if bound_known else min(n / _A_SLOPE, _NATS), _LEANS)


def _both(pairs: Sequence[tuple[Numbers, float]]) -> tuple[list[Numbers], list[float]]:
    return [x for x, _ in pairs], [nats for _, nats in pairs]


def _open(n: int) -> float:
    """Nats that a cut must gain to be said beside a normal law: fewer where so few elements tell little."""
    return min(max(_OPEN_TO_FEW, n / 150), _OPEN)


def _may_be_cut(x: Numbers, sketch: Sketch) -> bool:
    """Whether a cut gains enough to be said beside a normal law."""
    return sketch.gain > _open(x.n) or _misses_ends(x)


def _least(x: Numbers, sketch: Sketch) -> float | None:
    """Nats over a normal law that a cut must gain that is farther out on one side: so many that one that is not is ruled out by them.

    None where that is out of reach.
    """
    if not _misses_ends(x) or askew(x, sketch.cut) <= 0.9 * _ASKEW:
        return None
    return telling(x.n, x.grain) * gain_over_normal(sketch.cut.cut, sketch.ratio) + _ASKEW


def _misses_ends(x: Numbers) -> bool:
    return beyond(x) > min(_OF_A_HUNDRED * x.n, _FAR)


def _uneven(x: Numbers, least: float | None) -> Lopsided | None:
    """A cut that is farther out on one side, if it gains so many nats over a normal law and the numbers follow it."""
    if x.tests.uneven is not None:
        return x.tests.uneven or None
    if least is None:
        return None
    found = lopsided([x], [least])[0]
    return found if found is not None and _are_between(x, found.law) else None


def _are_between(x: Numbers, law: Law) -> bool:
    assert x.some is not None
    return bool(are_between(Ragged.of([x.some]), np.array([[law.centre, law.scale, *(law.ends or ())]]).T, np.array([x.n]), x.grain)[0])


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
    ratio, n = math.sqrt(x.square(flat.centre)) / x.reach(flat.centre), telling(x.n, x.grain)
    uniform, falls, enough = _is_uniform(x), slope(x), _OPEN if bound_known else min(x.n / _A_SLOPE, _NATS)
    if uniform and falls <= min(enough, _LEANS) and n * gain_over_uniform(NEAR_CUT, ratio) <= -_OPEN:
        # the likeliest cut is then nearer
        return [flat]
    cut = _truncated(x, flat.centre)
    gain = n * gain_over_uniform(cut.cut, ratio)
    uneven = _uneven(x, -math.inf) if falls > _falls_enough(x.n, bound_known) else None
    if uneven is not None:
        if uneven.over_uniform > _CLOSED:
            return [uneven.law]
        return [uneven.law, flat] if uneven.over_uniform > (_NATS if bound_known else _OPEN) else [flat, uneven.law]
    curved, lead = cut, gain
    if cut.cut < NEAR_CUT and uniform and gain <= _CLOSED:
        # the nearest cut that is spoken of may be less likely than the likeliest
        curved, lead = Law("truncated", cut.centre, flat.scale / NEAR_CUT, NEAR_CUT), n * gain_over_uniform(NEAR_CUT, ratio)
    if uniform and lead <= (_LEANS if bound_known else -_OPEN) and falls <= enough:
        return [flat]
    if not (uniform and gain <= _CLOSED) and not (gain > _LEANS and _follows(x, curved)):
        return [flat] if uniform else []
    if lead - n * gain_over_uniform(2.0, ratio) < _LEANS:
        curved = _cut_at_two(x, curved)
    if gain > _CLOSED and curved.cut >= NEAR_CUT:
        return [curved]
    return [curved, flat] if gain > _OPEN else [flat, curved]


def _is_uniform(x: Numbers) -> bool:
    if x.tests.even is not None:
        return x.tests.even
    assert x.some is not None
    return bool(are_uniform(Ragged.of([x.some]), np.array([x.low]), np.array([x.high]), x.grain)[0])


def _is_normal(x: Numbers) -> bool:
    if x.tests.normal is not None:
        return x.tests.normal
    assert x.some is not None
    return bool(are_normal(Ragged.of([x.some]), x.grain)[0])


def _mean(x: Numbers) -> float:
    """Zero, where that cannot be told from the mean."""
    return 0.0 if abs(x.mean) <= SURE * x.std / math.sqrt(x.n) else x.mean


def _sketches(numbers: Sequence[Numbers]) -> list[Sketch]:
    found: list[Sketch] = []
    for x in numbers:
        cut = _truncated(x, _mean(x))
        ratio = math.sqrt(x.square(cut.centre)) / x.reach(cut.centre)
        # numbers that end where torch's do are not cut
        gain = 0.0 if 1 / ratio >= drawn_within(x.grain) else telling(x.n, x.grain) * gain_over_normal(cut.cut, ratio)
        found.append(Sketch(cut, ratio, gain))
    # of a sample: that the others stay within the extremes speaks for a cut, too, unless they spread less than the sample does
    at = [i for i, (x, sketch) in enumerate(zip(numbers, found, strict=True)) if x.extent > x.n and sketch.gain != 0]
    if not at:
        return found
    n, extent, ratios = np.array([(numbers[i].n, numbers[i].extent, found[i].ratio) for i in at]).reshape(-1, 3, 1).transpose(1, 0, 2)
    less = np.linspace(0.0, 4.0, 17) / np.sqrt(2 * n)
    others = -(extent - n) * np.log1p(-2 * below(-1 / ratios / (1 - less)))
    for i, nats in zip(at, (n * less**2 + others).min(1).tolist(), strict=True):
        found[i] = found[i]._replace(gain=found[i].gain + nats)
    return found


def _truncated(x: Numbers, centre: float) -> Law:
    """The likeliest normal law with a symmetric cut. The cut is at the extreme, the rest follows from the mean square."""
    reach = x.reach(centre)
    # a product: a power that is too large raises
    cut = cut_of(x.square(centre) / (reach * reach))
    return Law("truncated", centre, reach / cut, cut)


def _follows(x: Numbers, law: Law) -> bool:
    """Whether the elements other than the extreme follow a truncated law."""
    if x.tests.cut is not None and x.tests.cut[0] == law:
        return x.tests.cut[1]
    assert x.some is not None
    return bool(are_cut(Ragged.of([x.some]), np.array([law.centre]), np.array([law.scale]), np.array([law.cut]), x.grain)[0])


def _may_be_cut_at_two(x: Numbers, centre: float) -> bool:
    """Whether the cut may be at two standard deviations, which is where people put it."""
    kurtosis = 2.3656
    ratio = x.reach(centre) / math.sqrt(x.square(centre)) * math.sqrt(variance_within(2.0)) / 2.0
    error = SURE * math.sqrt((kurtosis - 1) / (4 * x.n))
    # the extreme itself stays off its bound: the density there is 0.113 on each side
    return 1 - error - _NATS / (0.226 * 2 * x.n) - x.grain <= ratio <= 1 + error + x.grain


def _cut_at_two(x: Numbers, cut: Law) -> Law:
    return Law("truncated", cut.centre, math.sqrt(x.square(cut.centre) / variance_within(2.0)), 2.0)
