"""How numbers depart from a law where the distance between two distributions does not show it: soft ends, heavy tails, a third bend.

What looks like a law from afar and is none: uniform weights that moved a little, trained ones, sums of two uniform numbers. Beside
`evenness`, for `shapes`. Elements ascend in each row.
"""

from __future__ import annotations

import numpy as np

from paramwatch.columns import Array
from paramwatch.ragged import Ragged

_SOFT = 4.4
"""Standard errors by which one of some spaces at the ends is too wide, in 1 case of 10,000."""

_HEAVY = 3.9
"""Standard errors of a kurtosis that is too large, in 1 case of 10,000."""

_BENT = 25.0
"""What chi-square of four degrees of freedom exceeds in 5 cases of 100,000, and the statistic of 256 elements in 1 of 10,000."""

_DEGREE = 6
_T, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def have_soft_ends(u: Ragged, grain: float) -> Array:
    """Whether there is too much room at either end of values that should be uniform on (0, 1), and are rounded to a grain.

    Of m values the k-th lies, m times, as far from the end as the k-th event of Poisson's process: a gamma law, of which the cube root is
    nearly normal (Wilson and Hilferty). Asked for k = 4, 8, 16, to an eighth of them.
    """
    found = np.zeros(len(u), bool)
    for k in 4 << np.arange(max(int(u.lengths.max()) // 32, 1).bit_length()):
        which = u.lengths >= (8 * k if k > 4 else k)
        m, first, last = u.lengths[which], u.flat[u.starts[which] + k - 1], u.flat[u.ends[which] - k]
        # torch rounds a bound, too
        room = np.maximum(np.maximum(first, 1 - last) - grain, 0) * (m + 1) / k
        found[which] |= (np.cbrt(room) - 1 + 1 / (9 * k)) * 3 * np.sqrt(k / (1 - k / (m + 1))) > _SOFT
    return found


def have_heavy_tails(squares: Ragged) -> Array:
    """Whether the kurtosis is larger than that of normal numbers (Anscombe and Glynn, 1983), by the squares of how far they are off."""
    n = squares.lengths.astype(np.float64)
    kurtosis = squares.means(squares.flat * squares.flat) / squares.means(squares.flat) ** 2
    spread = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    off = (kurtosis - 3 * (n - 1) / (n + 1)) / np.sqrt(spread)
    skew = 6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9)) * np.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    a = 6 + 8 / skew * (2 / skew + np.sqrt(1 + 4 / skew**2))
    found: Array = (1 - 2 / (9 * a) - np.cbrt((1 - 2 / a) / (1 + off * np.sqrt(2 / (a - 4))))) / np.sqrt(2 / (9 * a)) > _HEAVY
    return found


def are_bent(some: Ragged, centre: Array, scale: Array, low: Array, high: Array) -> Array:
    """Whether numbers between two ends have another bend than a normal law there has: Rao's score test of the third to the sixth power.

    A normal law is exp(a z + b z^2). How far the means of six powers are off, less how far the first two are, which are estimated, is
    chi-square of four degrees of freedom.
    """
    at = (low + high)[:, None] / 2 + (high - low)[:, None] / 2 * _T
    weights = np.exp(-(((at - centre[:, None]) / scale[:, None]) ** 2) / 2) * _WEIGHTS
    weights /= weights.sum(1, keepdims=True)
    # about the mean of the law, in its standard deviations: else the powers are hardly told apart
    middle = (weights * at).sum(1, keepdims=True)
    at -= middle
    unit = np.sqrt((weights * at * at).sum(1, keepdims=True))
    # products: to raise negative numbers to a power is dear
    powers = (at / unit)[:, None].repeat(_DEGREE, axis=1).cumprod(1)
    means = (powers @ weights[..., None])[..., 0]
    apart = powers - means[..., None]
    spread = (weights[:, None] * apart) @ apart.swapaxes(1, 2)
    z = (some.flat - some.each(middle[:, 0])) / some.each(unit[:, 0])
    power, off = np.ones_like(z), -means
    for i in range(_DEGREE):
        power *= z
        off[:, i] += some.means(power)
    units = np.sqrt(np.einsum("tii->ti", spread))
    off /= units
    spread /= units[:, :, None] * units[:, None]
    found: Array = some.lengths * (_length(off, spread) - _length(off[:, :2], spread[:, :2, :2])) > _BENT
    return found


def _length(off: Array, spread: Array) -> Array:
    found: Array = np.einsum("ti,ti->t", off, np.linalg.solve(spread, off[..., None])[..., 0])
    return found
