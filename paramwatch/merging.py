"""How parts merge: of blocks into a tensor, of shards into a row, of rows into a layer. Beside `columns`; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from paramwatch.columns import ABSENT, SPECIALS, Array, Pair, ratio

_FEW = 16
"""Members of a group up to which the first members of all groups are reduced with the second ones, these with the third ones, and so on."""


class Groups:
    """Which rows belong together, laid out so that many groups are reduced by a few operations on whole arrays.

    Members come first in the arrays: numpy takes ten times as long for many short sums along the last axis.

    Args:
        members: The row positions of each group. A row may be in several groups; no group is empty.
    """

    def __init__(self, members: Sequence[Sequence[int]]) -> None:
        sizes = np.fromiter(map(len, members), np.intp, len(members))
        by_size = np.argsort(-sizes, kind="stable")
        few = [int(i) for i in by_size if sizes[i] <= _FEW]
        many = [int(i) for i in by_size if sizes[i] > _FEW]
        # how many of the small groups have a first member, a second one, ...
        self._layers = [sum(1 for i in few if sizes[i] > k) for k in range(int(sizes[few[0]]) if few else 0)]
        self._sizes = [int(sizes[i]) for i in many]
        order = [members[i][k] for k, n in enumerate(self._layers) for i in few[:n]]
        group = [i for n in self._layers for i in few[:n]]
        for i in many:
            order += members[i]
            group += [i] * len(members[i])
        self._order, self._group = np.array(order, np.intp), np.array(group, np.intp)
        self._place = np.argsort(np.array(few + many, np.intp))

    def members(self, column: Array) -> Array:
        """Of [..., rows] the rows of all groups: [members, ...]."""
        return np.ascontiguousarray(np.moveaxis(column, -1, 0)[self._order])

    def spread(self, column: Array) -> Array:
        """Of [groups, ...] what each member's group has: [members, ...]."""
        return column[self._group]

    def reduce(self, of: np.ufunc, column: Array) -> Array:
        """Of [members, ...] one number for each group: [groups, ...], the same however much lies beside it."""
        out = np.empty((len(self._place), *column.shape[1:]), of(column[:1], column[:1]).dtype)
        end = self._layers[0] if self._layers else 0
        small, at = out[:end], end
        small[:] = column[:end]
        for n in self._layers[1:]:
            of(small[:n], column[at : at + n], out=small[:n])
            at += n
        for i, size in enumerate(self._sizes, end):
            piece, at = column[at : at + size].astype(out.dtype), at + size
            while len(piece) > 1:
                # halves, so that the order does not depend on the shape, and rounding grows with the logarithm
                half = len(piece) // 2
                of(piece[:half], piece[-half:], out=piece[:half])
                piece = piece[: len(piece) - half]
            out[i] = piece[0]
        found: Array = out[self._place]
        return found


def merge(values: Mapping[str, Array], members: Groups | Sequence[Sequence[int]], counted: Array | bool = True) -> dict[str, Array]:
    """Merge rows into groups: the parts of each group are those of its members' elements taken together.

    Sums and second moments are rebuilt in float64 around the common mean (Chan, Golub and LeVeque 1983, for the second moment). A member
    without a measurement (`count` is -1) adds nothing; a group of only such members is itself not measured.

    Args:
        values: Part -> [..., rows]; leading axes may be 1 where all lines are alike.
        members: The row positions of each group.
        counted: bool [members, ...], laid out as by `Groups.members`: the others are taken for not measured.

    Returns:
        Part -> [..., groups], whole numbers as int64 and the rest as float64.
    """
    groups = members if isinstance(members, Groups) else Groups(members)

    def total(column: Array) -> Array:
        return groups.reduce(np.add, column)

    count = groups.members(values["count"])
    measured = (count >= 0) & counted
    all_measured = bool(measured.all())
    whole = {"count": count} | {part: groups.members(values[part]) for part in (*SPECIALS[1:], "zero") if part in values}
    if not all_measured:
        whole = {part: np.where(measured, column, 0) for part, column in whole.items()}
    n = (whole["count"] - whole["nan"] - whole["posinf"] - whole["neginf"]).astype(np.float64)
    out = {part: total(column) for part, column in whole.items()}
    if not all_measured:
        out["count"] = np.where(groups.reduce(np.logical_or, measured), out["count"], ABSENT)
    some = n > 0
    all_some = bool(some.all())
    total_n = total(n)

    def column(part: str) -> Array:
        held = groups.members(values[part]).astype(np.float64)
        return held if all_some else np.where(some, held, 0.0)

    def average(summed: Array) -> Array:
        return ratio(summed, total_n)

    with np.errstate(over="ignore", invalid="ignore"):
        if "mean" in values:
            mean = column("mean")
            out["mean"] = average(total(n * mean))
            apart = mean - groups.spread(out["mean"])
            if not all_some:
                apart = np.where(some, apart, 0.0)
            out["std"] = np.sqrt(average(total(n * (column("std") ** 2 + apart**2))))
        if "rms" in values:
            out["rms"] = np.sqrt(average(total(n * column("rms") ** 2)))
    for part, least, reduce in (("min", np.inf, np.minimum), ("max", -np.inf, np.maximum)):
        if part in values:
            # what is not known of a member is not known of its group
            held = groups.members(values[part]).astype(np.float64)
            merged = groups.reduce(reduce, held if all_some else np.where(some, held, least))
            out[part] = np.where(total_n > 0, merged, np.nan)
    if "dot" in values:
        # a member without a gradient adds nothing to the product
        dot = groups.members(values["dot"])
        known = some & ~np.isnan(dot)
        products = total(np.where(known, dot, 0.0))
        out["dot"] = np.where(groups.reduce(np.logical_or, known), products, np.nan)
    return {part: np.moveaxis(array, 0, -1) for part, array in out.items()}


def merged_with(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """These parts, with those that they cannot be merged without: means and standard deviations merge together."""
    both = ("mean", "std")
    return tuple(dict.fromkeys((kind, other) for kind, part in pairs for other in (both if part in both else (part,))))
