"""The totals of a step, over all rows that were stepped: what the steps frame, TensorBoard and Lightning's loggers show of a whole model.

Beside `columns`: reads parts, knows nothing of pandas, and is cheap enough for every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paramwatch.columns import SPECIALS, Array, ratio
from paramwatch.record import Record

_NORMS = {"param_norm": "param", "grad_norm": "grad", "update_norm": "update", "grad_raw_norm": "grad_raw"}
NEEDED = frozenset((kind, part) for kind in _NORMS.values() for part in (*SPECIALS, "rms"))
"""The parts from which they follow."""
TOTALS = (*_NORMS, "clip_coef", "update_ratio", "nonfinite", "lr")


def totals(record: Record) -> dict[str, float]:
    """The totals of one record, by the names in `TOTALS`; NaN where nothing was measured.

    They are over the rows that an optimizer stepped or, where none was (a step skipped by AMP), over those with a gradient. A tied row
    counts once. `lr` is NaN where the rows differ; `nonfinite` counts elements of parameters and gradients.
    """
    found = totals_of(record.values, record.inventory.kinds, record.stepped, record.lr)
    return {name: float(value) for name, value in found.items()}


def totals_of(values: Mapping[str, Array], kinds: Sequence[str], stepped: Array, lr: Array) -> dict[str, Array]:
    """The same for any number of steps at once.

    Args:
        values: Part -> [..., kinds, rows]; one step may stand for all of them.
        kinds: The kinds of that axis.
        stepped: bool [..., rows].
        lr: float64 [..., rows].

    Returns:
        Name -> float64 [...], or what can be broadcast to it.
    """
    axis = {kind: i for i, kind in enumerate(kinds)}
    count, nan = values["count"], values["nan"]
    infinite = values["posinf"] + values["neginf"]
    used = (count >= 0) & counted(count, kinds, stepped)[..., None, :]
    n, nans, infinities = count, *np.zeros((2, *count.shape[:-1]), np.int64)
    if nan.any() or infinite.any():
        n = count - nan - infinite
        nans, infinities = (np.add.reduce(column, -1, where=used) for column in (nan, infinite))
    there = used & (n > 0)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(values["rms"], dtype=np.float64) * n
    # zeros are added rather than left out: many times as quick, and the order of the sum stays the same whoever is missing
    squares = np.add.reduce(squares if there.all() else np.where(there, squares, 0.0), -1)
    norms = np.where(nans > 0, np.nan, np.where(infinities > 0, np.inf, np.sqrt(squares)))
    norms = np.where(used.any(-1), norms, np.nan)
    nothing = np.full(norms.shape[:-1], np.nan)
    out = {name: norms[..., axis[kind]] if kind in axis else nothing for name, kind in _NORMS.items()}
    out["clip_coef"] = ratio(out["grad_norm"], out["grad_raw_norm"])
    out["update_ratio"] = ratio(out["update_norm"], out["param_norm"])
    seen = [axis[kind] for kind in ("param", "grad") if kind in axis]
    spoilt = (nans + infinities)[..., seen].sum(-1)
    out["nonfinite"] = np.where(used[..., seen, :].any((-2, -1)), spoilt, np.nan)
    out["lr"] = common(lr, stepped)
    return out


def counted(count: Array, kinds: Sequence[str], stepped: Array) -> Array:
    """The rows that totals are over, bool [..., rows]: those that stepped, or in a step in which none did those with a gradient."""
    some = stepped.any(-1, keepdims=True)
    if some.all() or "grad" not in kinds:
        return stepped
    return np.where(some, stepped, count[..., list(kinds).index("grad"), :] >= 0)


def common(column: Array, among: Array) -> Array:
    """The value that the chosen rows share: [..., rows] and bool [..., rows] -> float64 [...], NaN where they differ or there are none."""
    everywhere = bool(among.all())
    low = np.minimum.reduce(column if everywhere else np.where(among, column, np.inf), -1, initial=np.inf)
    high = np.maximum.reduce(column if everywhere else np.where(among, column, -np.inf), -1, initial=-np.inf)
    return np.where(low == high, low, np.nan)
