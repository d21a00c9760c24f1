"""How parts merge: of blocks into a tensor, of shards into a row, of rows into a layer. Beside `columns`; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from paramwatch.columns import ABSENT, SPECIALS, Array, Pair, ratio


def merge(values: Mapping[str, Array], members: Sequence[Sequence[int]]) -> dict[str, Array]:
    """Merge rows into groups: the parts of each group are those of its members' elements taken together.

    Sums and second moments are rebuilt in float64 around the common mean (Chan, Golub and LeVeque 1983, for the second moment). A member
    without a measurement (`count` is -1) adds nothing; a group of only such members is itself not measured.

    Args:
        values: Part -> [..., rows].
        members: The row positions of each group. A row may be in several groups; no group is empty.

    Returns:
        Part -> [..., groups], whole numbers as int64 and the rest as float64.
    """
    order = np.fromiter(chain.from_iterable(members), np.intp)
    sizes = [len(rows) for rows in members]
    starts = np.concatenate(([0], np.cumsum(sizes[:-1]))).astype(np.intp)
    group = np.repeat(np.arange(len(members)), sizes)

    def total(column: Array) -> Array:
        return np.add.reduceat(column, starts, axis=-1)

    measured = values["count"][..., order] >= 0
    whole = {part: np.where(measured, values[part][..., order], 0) for part in (*SPECIALS, "zero") if part in values}
    n = (whole["count"] - whole["nan"] - whole["posinf"] - whole["neginf"]).astype(np.float64)
    out = {part: total(column) for part, column in whole.items()}
    out["count"] = np.where(total(measured.astype(np.int64)) > 0, out["count"], ABSENT)
    some = n > 0
    total_n = total(n)

    def column(part: str) -> Array:
        return np.where(some, values[part][..., order].astype(np.float64), 0.0)

    def average(summed: Array) -> Array:
        return ratio(summed, total_n)

    with np.errstate(over="ignore", invalid="ignore"):
        if "mean" in values:
            out["mean"] = average(total(n * column("mean")))
            apart = np.where(some, column("mean") - out["mean"][..., group], 0.0)
            out["std"] = np.sqrt(average(total(n * (column("std") ** 2 + apart**2))))
        if "rms" in values:
            out["rms"] = np.sqrt(average(total(n * column("rms") ** 2)))
    for part, least, reduce in (("min", np.inf, np.minimum), ("max", -np.inf, np.maximum)):
        if part in values:
            unknown = some & np.isnan(values[part][..., order])
            held = np.where(some & ~unknown, values[part][..., order].astype(np.float64), least)
            merged = reduce.reduceat(held, starts, axis=-1)
            out[part] = np.where((total_n > 0) & (total(unknown.astype(np.int64)) == 0), merged, np.nan)
    if "dot" in values:
        # a member without a gradient adds nothing to the product
        known = some & ~np.isnan(values["dot"][..., order])
        products = total(np.where(known, column("dot"), 0.0))
        out["dot"] = np.where(total(known.astype(np.int64)) > 0, products, np.nan)
    return out


def merged_with(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """These parts, with those that they cannot be merged without: means and standard deviations merge together."""
    both = ("mean", "std")
    return tuple(dict.fromkeys((kind, other) for kind, part in pairs for other in (both if part in both else (part,))))
