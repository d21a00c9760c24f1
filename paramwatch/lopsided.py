"""A normal law between two ends of which one is nearer to its centre: `trunc_normal_` about another mean than the middle of its bounds.

Beside `laws`, which looks for it where a law that is even on both sides leaves something unsaid. Of all such laws the likeliest one has the
mean and the mean square of the numbers, as in every exponential family, and ends at their extremes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from paramwatch.columns import Array
from paramwatch.drawn import Law, Lopsided, Numbers
from paramwatch.formulas import drawn_within, telling

_BEYOND = 1.0
"""Standard deviations from an end to a centre outside, at most: what falls more steeply is not looked for."""

_LOSES = math.log(100)
"""Nats that the likeliest law with such a centre may lose to one without this limit: a true one does in 1 draw of 100 at most."""

_ROUNDS, _NEAR = 60, 1e-8
_ROOT = math.sqrt(0.5)
_T, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_POWERS = np.stack([_T**power for power in range(5)])
_WEIGHED = (_WEIGHTS * _POWERS).T
_SCALES = np.geomspace(0.05, 20.0, 200)
"""Of laws with a centre as far outside as may be, half the width being 1."""


def lopsided(numbers: Sequence[Numbers], least: Sequence[float]) -> list[Lopsided | None]:
    """Of each numbers the likeliest one, if it gains so many nats over a normal law without ends. Whether they follow it is not asked."""
    if not numbers:
        return []
    n, mean, std, low, high = np.array([(telling(x.n, x.grain), x.mean, x.std, x.low, x.high) for x in numbers]).T
    middle, half = (high + low) / 2, (high - low) / 2
    mean, std = (mean - middle) / half, std / half
    centre, scale, likelihood = _likeliest(mean, mean * mean + std * std, _LOSES / n)
    over_normal = n * (likelihood + np.log(std) + (0.5 * math.log(2 * math.pi) + 0.5))
    over_uniform = n * (likelihood + math.log(2))
    known = zip(middle + centre * half, scale * half, zip(low.tolist(), high.tolist(), strict=True), over_normal, over_uniform, strict=True)
    return [
        Lopsided(Law("truncated", float(at), float(wide), math.inf, ends), float(nats), float(over)) if nats > enough else None
        for (at, wide, ends, nats, over), enough in zip(known, least, strict=True)
    ]


def askew(x: Numbers, cut: Law) -> float:
    """About how many nats a lopsided law gains over one that is even on both sides: by where the mean and the nearer end are.

    As `slope` and `beyond`, costs no pass over the elements.
    """
    off = (x.mean - cut.centre) / cut.std
    near = min(x.high - cut.centre, cut.centre - x.low) / cut.scale
    within, short = math.erf(cut.cut * _ROOT), math.erf(near * _ROOT)
    return telling(x.n, x.grain) * off * off / 2 + x.extent * max(within - short, 0.0) / within / 2


def slope(x: Numbers) -> float:
    """About how many nats a law that falls to one side gains over a uniform one between the extremes."""
    off = (x.mean - (x.high + x.low) / 2) / (x.high - x.low)
    return 6 * telling(x.n, x.grain) * off * off


def beyond(x: Numbers) -> float:
    """How many of as many normal numbers would be farther out: about the nats that two ends gain over none, or less."""
    high, low, far = (x.high - x.mean) / x.std, (x.mean - x.low) / x.std, drawn_within(x.grain)
    # numbers that end where torch's do are not cut
    shares = (math.erfc(high * _ROOT) if high < far else 0.0) + (math.erfc(low * _ROOT) if low < far else 0.0)
    return x.extent * shares / 2


def _likeliest(mean: Array, square: Array, may_lose: Array) -> tuple[Array, Array, Array]:
    """Centres, scales and log likelihoods of an element, between -1 and 1; NaN where that is no normal law."""
    wanted = np.stack([mean, square], 1)
    # of exp(a t + b t^2): Newton's method
    at = np.stack([mean, np.full(len(mean), -0.5)], 1) / (square - mean * mean)[:, None]
    value, off, spread = _at(at, wanted)
    for _ in range(_ROUNDS):
        with np.errstate(all="ignore"):
            first, both, second = spread.T
            step = np.stack([second * off[:, 0] - both * off[:, 1], first * off[:, 1] - both * off[:, 0]], 1)
            step /= (first * second - both * both)[:, None]
        promised = (off * step).sum(1) / 2
        more = promised > _NEAR
        if not more.any():
            break
        # each stops where it would alone
        step[~more] = 0.0
        for _ in range(_ROUNDS):
            ahead = _at(at + step, wanted)
            worse = ahead[0] < value - _NEAR
            if not worse.any():
                break
            step[worse] /= 2
        at, (value, off, spread) = at + step, ahead
    with np.errstate(all="ignore"):
        scale = np.sqrt(-0.5 / at[:, 1])
        centre = at[:, 0] * scale * scale
        within = np.abs(centre) <= 1 + _BEYOND * scale
    if len(far := np.flatnonzero(~within)):
        centre[far], scale[far], value[far] = _outermost(mean[far], square[far], value[far] - may_lose[far])
    return centre, scale, value


def _outermost(mean: Array, square: Array, least: Array) -> tuple[Array, Array, Array]:
    """The likeliest with a centre as far outside as may be, where that is likely enough."""
    # one on the other side is its mirror image
    likelihoods = np.stack([np.abs(mean), square], 1) @ _OUTERMOST.T - _OUTERMOST_SUMS
    which = likelihoods.argmax(1)
    likelihood = likelihoods[np.arange(len(which)), which]
    enough = likelihood >= least
    scale = np.where(enough, _SCALES[which], math.nan)
    return np.copysign(1 + _BEYOND * scale, mean), scale, np.where(enough, likelihood, math.nan)


def _at(at: Array, wanted: Array) -> tuple[Array, Array, Array]:
    """Log likelihood of an element, what is lacking of the means of t and t^2, and their covariances."""
    exponent = at @ _POWERS[1:3]
    top = exponent.max(1, keepdims=True)
    sums = np.exp(exponent - top) @ _WEIGHED
    one, two, three, four = (sums[:, 1:] / sums[:, :1]).T
    value = (at * wanted).sum(1) - top[:, 0] - np.log(sums[:, 0])
    return value, wanted - np.stack([one, two], 1), np.stack([two - one * one, three - one * two, four - two * two], 1)


_OUTERMOST = np.stack([(1 + _BEYOND * _SCALES) / _SCALES**2, -0.5 / _SCALES**2], 1)
"""The powers of each of these laws, on the upper side,"""

_OUTERMOST_SUMS = -_at(_OUTERMOST, np.zeros_like(_OUTERMOST))[0]
"""and the logarithms of what they sum up to."""
