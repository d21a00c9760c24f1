"""A normal law between two ends of which one is nearer to its centre: `trunc_normal_` about another mean than the middle of its bounds.

Beside `laws`, which looks for it where one end is nearer than normal numbers leave it. Of all such laws the likeliest one has the mean and
the mean square of the numbers, as in every exponential family, and ends at their extremes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from paramwatch.columns import Array
from paramwatch.drawn import Law, Numbers
from paramwatch.formulas import anderson_darling, below

_ASKEW = 1.25
"""One end is so many times farther away than the other."""

_WITHIN = 0.5
"""Standard deviations from the centre to the nearer end, at least: what falls from its end on is no normal law that was cut."""

_FITS = 2.5
"""The Anderson-Darling statistic of a law of which all four numbers are estimated exceeds this in far less than 1 case of 100."""

_ROUNDS, _NEAR = 60, 1e-10
_AT, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_POWERS = np.stack([_AT, _AT * _AT])


class Lopsided(NamedTuple):
    """Such a law."""

    law: Law
    gain: float
    """Nats over a normal law without ends."""


def lopsided(x: Numbers, least: float) -> Lopsided | None:
    """The likeliest one, if the numbers follow it, and gain so many nats at least."""
    near, far = sorted((x.high - x.mean, x.mean - x.low))
    # so many of normal numbers would be beyond the nearer end
    if not near > 0 or far < _ASKEW * near or x.extent * math.erfc(near / x.std / math.sqrt(2)) / 2 <= least:
        return None
    middle, half = (x.high + x.low) / 2, (x.high - x.low) / 2
    mean, std = (x.mean - middle) / half, x.std / half
    found = _likeliest(mean, mean * mean + std * std)
    if found is None:
        return None
    centre, scale, likelihood = found
    law = Law("truncated", middle + centre * half, scale * half, math.inf, (x.low, x.high))
    gain = x.n * (likelihood + 0.5 * math.log(2 * math.pi * std * std) + 0.5)
    return Lopsided(law, gain) if gain >= least and _follows(x, law) else None


def _likeliest(mean: float, square: float) -> tuple[float, float, float] | None:
    """Centre, scale and log likelihood of an element, between -1 and 1; None if the centre is not well within, or nothing bends down."""
    wanted, variance = np.array([mean, square]), square - mean * mean
    # of exp(a t + b t^2)
    at = np.array([mean, -0.5]) / variance
    value, moments, spread = _moments(at, wanted)
    for _ in range(_ROUNDS):
        try:
            step: Array = np.linalg.solve(spread, wanted - moments)
        except np.linalg.LinAlgError:
            return None
        for _ in range(_ROUNDS):
            beyond = _moments(at + step, wanted)
            if beyond[0] >= value:
                break
            step = step / 2
        done = beyond[0] - value < _NEAR
        at, (value, moments, spread) = at + step, beyond
        if done:
            break
    if at[1] >= 0 or not np.isfinite(value):
        return None
    scale = math.sqrt(-0.5 / at[1])
    centre = float(at[0]) * scale * scale
    return (centre, scale, float(value)) if abs(centre) < 1 - _WITHIN * scale else None


def _moments(at: Array, wanted: Array) -> tuple[float, Array, Array]:
    """Log likelihood of an element, the means of t and t^2, and their covariances."""
    exponent = at @ _POWERS
    top = exponent.max()
    weights = _WEIGHTS * np.exp(exponent - top)
    total = weights.sum()
    means = _POWERS @ weights / total
    return float(at @ wanted - top - math.log(total)), means, (_POWERS * weights) @ _POWERS.T / total - np.outer(means, means)


def _follows(x: Numbers, law: Law) -> bool:
    assert x.some is not None
    within = x.some[(x.some > x.low) & (x.some < x.high)]
    first, last = (float(below(np.array((end - law.centre) / law.scale))) for end in (x.low, x.high))
    shares = (below((within - law.centre) / law.scale) - first) / (last - first)
    return bool(anderson_darling(shares, x.grain) <= _FITS)
