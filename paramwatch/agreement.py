"""What follows from a gradient that was split by use: how strongly each use pulls, and whether they pull the same way.

Of K uses with contributions g_i (norms n_i), their sum S and the gradient G that autograd delivered. Everything is derived here, from the
inner products in a `Split`, for frames, rules, curves and reports alike; `docs/tied-gradients.md` explains it. Torch is not needed.
"""

from __future__ import annotations

import numpy as np

from paramwatch.columns import Array
from paramwatch.record import Split

UNATTRIBUTED = "(unattributed)"
"""The name of what no use accounts for."""

MOST_PAIRS = 64
"""Uses of which every pair is multiplied; of more only each with itself and with the gradient."""

HELD = 0.99
"""The share of all norms that the calls within the horizon hold."""

Statistics = dict[str, float]

NAMES = ("agreement", "coherence", "imbalance", "horizon", "residual", "unattributed", "use_count")
"""Of all statistics, in the order in which they are shown."""


def norms(split: Split) -> Array:
    """float64 [K]: the norm of each contribution, in units of the gradient as the optimizer used it; as summed where that is no number."""
    return _norms(split) * (split.unit if np.isfinite(split.unit) else 1.0)


def shares(split: Split) -> Array:
    """float64 [K]: <g_i, G> / ||G||^2. With `unattributed` they sum to 1, to float64's rounding; one below 0 is overruled by the others."""
    k = len(split.uses)
    return _ratio(split.products[:k, k], split.products[k, k])


def cosines(split: Split) -> Array:
    """float64 [K, K]: <g_i, g_j> / (n_i n_j), NaN where one of the two is 0 and where pairs were not multiplied."""
    k, n = len(split.uses), _norms(split)
    return _ratio(split.products[:k, :k], np.outer(n, n))


def statistics(split: Split) -> Statistics:
    """The columns of `Run.agreement` by name; NaN where one is not known."""
    k, n = len(split.uses), _norms(split)
    total, missing, whole = split.products[k, k], split.products[k + 1, k + 1], n.sum()
    with np.errstate(all="ignore"):
        return {
            "agreement": _agreement(split),
            "coherence": float(_ratio(np.sqrt(_summed(split)), whole)),
            "imbalance": float(_ratio(n.max(), n.min())) if k else np.nan,
            "horizon": _horizon(n),
            "residual": float(_ratio(np.sqrt(missing), np.sqrt(total))),
            "unattributed": float(_ratio(split.products[k + 1, k], total)),
            "use_count": float(k),
        }


def is_explained(split: Split) -> bool:
    """Whether the uses add up to the gradient, but for rounding. Where nothing tells, it is assumed."""
    missing = np.sqrt(split.products[-1, -1])
    return not (missing > split.rounding or is_part(split))


def is_part(split: Split) -> bool:
    """Whether something is missing, though nobody knows how much, as nothing but norms was kept."""
    return "not all of it" in split.mode


def missing_norm(split: Split) -> float:
    """The norm of what no use accounts for, in the units of `norms`."""
    return float(np.sqrt(split.products[-1, -1]) * (split.unit if np.isfinite(split.unit) else 1.0))


def _norms(split: Split) -> Array:
    found: Array = np.sqrt(np.diagonal(split.products)[: len(split.uses)])
    return found


def _agreement(split: Split) -> float:
    """The mean of the cosines of all pairs, weighted by n_i n_j."""
    k, n = len(split.uses), _norms(split)
    apart = ~np.eye(k, dtype=bool)
    pairs = split.products[:k, :k][apart]
    # (||S||^2 - sum n_i^2) / ((sum n_i)^2 - sum n_i^2), without what cancels where pairs are known
    above = _summed(split) - np.square(n).sum() if split.mode[:4] != "full" or np.isnan(pairs).any() else pairs.sum()
    return float(_ratio(above, np.outer(n, n)[apart].sum()))


def _summed(split: Split) -> float:
    """||S||^2; where nothing but norms is known that of G, or NaN if a sample of its elements shows that they are not one."""
    k = len(split.uses)
    total, cross, missing = split.products[k, k], split.products[k, k + 1], split.products[k + 1, k + 1]
    if split.mode.startswith("norms") and np.isnan(missing):
        return float("nan" if is_part(split) else total)
    return float(max(total - 2 * cross + missing, 0.0))


def _horizon(n: Array) -> float:
    """The fewest last calls that hold 99 % of the sum of all norms."""
    from_the_last = np.cumsum(n[::-1])
    if not len(n) or not from_the_last[-1] > 0 or not np.isfinite(from_the_last[-1]):
        return float("nan")
    return float(np.searchsorted(from_the_last, HELD * from_the_last[-1]) + 1)


def _ratio(above: Array | float, below: Array | float) -> Array:
    with np.errstate(all="ignore"):
        return np.where(np.equal(below, 0), np.nan, np.divide(above, below))
