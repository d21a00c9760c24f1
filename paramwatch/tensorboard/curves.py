"""Which curves an event file draws, and their values in some records.

Totals always; beside them the parameters themselves while they are few, and blocks of them (the names that share a prefix) in a larger
model. What was not measured has no value and is not drawn; a value that is not a number because the data are not is drawn as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from paramwatch.batch import Batch
from paramwatch.columns import ABSENT, SPECIALS, STATISTICS, Array, ratio
from paramwatch.merging import merge
from paramwatch.record import Inventory
from paramwatch.totals import TOTALS, counted, totals_of

MOST_LINES = 64
"""Rows with curves of their own, and blocks where there are more rows: TensorBoard's tabs are of little use with many more tags."""

LINES = {"param_norm": ("param",), "grad_norm": ("grad",), "update_ratio": ("update", "param")}
"""The statistics that are drawn of a row or block: a norm, or the ratio of two."""

Lines: TypeAlias = Mapping[str, tuple[Array, Array]]
"""Statistic -> its values, float64 [n, rows or blocks], and which are known: a value that is NaN is known where the data are the cause."""

_ALL = "(all)"
DISTRIBUTION, HEAT_MAP = "(log10 of each)", "(heat map)"
RESERVED = (_ALL, DISTRIBUTION, HEAT_MAP)
"""What is drawn of all rows together has names in brackets, which come first in every list."""

_PARTS = ("count", "nan", "posinf", "neginf", "rms")


@dataclass(frozen=True)
class Curves:
    """The curves of one inventory. Tags are `statistic/name`, `name` being `(all)` for the totals."""

    lines: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """For each statistic the kinds it is of, and a tag for each name."""
    names: tuple[str, ...]
    """Of the rows or blocks that have curves of their own."""
    positions: Array
    """The row, or the block, of each name."""
    blocks: tuple[tuple[int, ...], ...]
    """The rows of each block; empty where rows are drawn."""
    depth: int | None
    """How many components of a name make a block (0: even one gives too many, totals only), None where rows are drawn."""

    @classmethod
    def of(cls, inventory: Inventory) -> Curves:
        """A curve for each name of a row; where there are too many rows, one for each block at the greatest depth that gives few."""
        depth: int | None = None
        named, blocks = inventory.names, tuple[tuple[int, ...], ...]()
        if len(inventory.rows) > MOST_LINES:
            depth, members = _blocks(inventory)
            named, blocks = tuple((name, i) for i, name in enumerate(members)), tuple(map(tuple, members.values()))
        # A parameter may be called "(all)"; the curve of that name is the total.
        named = tuple((name.encode(errors="backslashreplace").decode(), position) for name, position in named if name not in RESERVED)
        stored = [(statistic, kinds) for statistic, kinds in LINES.items() if set(kinds).issubset(inventory.kinds)]
        lines = tuple((kinds, tuple(f"{statistic}/{name}" for name, _ in named)) for statistic, kinds in stored)
        names, positions = tuple(name for name, _ in named), np.array([position for _, position in named], dtype=np.intp)
        return cls(lines, names, positions, blocks, depth)

    def event_bytes(self) -> int:
        """An upper bound of what an event that holds every curve takes in the file."""
        framing, per_value = 64, 12
        return framing + sum(per_value + len(tag.encode()) for tag in self.tags())

    def tags(self) -> list[str]:
        """The tag of every curve, those of the totals first."""
        return [*(f"{statistic}/{_ALL}" for statistic in TOTALS), *(tag for _, tags in self.lines for tag in tags)]

    def values(self, batch: Batch, rows: Lines) -> tuple[Array, Array]:
        """The curves' values, float64 [n, tags], and whether they are drawn: a curve of which nothing was measured is left out.

        Args:
            batch: The steps.
            rows: What `lines_of` says of its rows.
        """
        axis = {kind: i for i, kind in enumerate(batch.inventory.kinds)}
        among = counted(batch.values["count"], batch.inventory.kinds, batch.stepped)[..., None, :]
        found, drawn = _totals(batch, axis, among)
        if len(self.positions):
            lines = rows
            if self.blocks:
                values = {part: batch.values[part] for part in _PARTS}
                lines = lines_of(merge(values | {"count": np.where(among, values["count"], ABSENT)}, self.blocks), axis)
            found += [value[:, self.positions] for value, _ in lines.values()]
            drawn += [known[:, self.positions] for _, known in lines.values()]
        return np.concatenate(found, axis=1), np.concatenate(drawn, axis=1)


def lines_of(values: Mapping[str, Array], axis: Mapping[str, int]) -> Lines:
    """The statistics that are drawn of rows or blocks, of those whose kinds are recorded.

    Args:
        values: Part -> [n, kinds, rows].
        axis: Where each kind is.
    """
    numbers = np.array([values[part] for part in _PARTS], dtype=np.float64)
    numbers[:, numbers[0] < 0] = np.nan
    parts = dict(zip(_PARTS, numbers, strict=True))
    # A norm follows from its parts in the same way for every kind; so one call does for all of them.
    norms = STATISTICS["param_norm"].compute(lambda kind, part: parts[part], False)
    spoilt = parts["nan"] + parts["posinf"] + parts["neginf"]
    found = {}
    for statistic, kinds in LINES.items():
        if set(kinds).issubset(axis):
            first, *second = (axis[kind] for kind in kinds)
            value = ratio(norms[:, first], norms[:, second[0]]) if second else norms[:, first]
            # Where one of the kinds was not measured the sum is NaN, and the comparison false.
            found[statistic] = value, ~np.isnan(value) | (spoilt[:, [first, *second]].sum(axis=1) > 0)
    return found


def _totals(batch: Batch, axis: Mapping[str, int], among: Array) -> tuple[list[Array], list[Array]]:
    """[n, 1] for each total."""
    found = totals_of(batch.values, batch.inventory.kinds, batch.stepped, batch.lr)
    known = {name: ~np.isnan(value) for name, value in found.items()}
    drawn = {name: seen if seen.all() else seen | _spoilt(batch, axis, name, among) for name, seen in known.items()}
    return [found[name][:, None] for name in TOTALS], [drawn[name][:, None] for name in TOTALS]


def _spoilt(batch: Batch, axis: Mapping[str, int], name: str, among: Array) -> Array:
    """Where a total is not a number because of the data, rather than unknown or a ratio to zero: bool [n]."""
    needed = {kind for kind, _ in STATISTICS[name].needs} if name in STATISTICS else set()
    if not needed or not needed.issubset(axis):
        return np.zeros(len(batch), dtype=bool)
    kinds = [axis[kind] for kind in needed]
    count, nan, posinf, neginf = (batch.values[part][:, kinds] for part in SPECIALS)
    measured = (count >= 0) & among
    special = measured & (nan + posinf + neginf > 0)
    return np.logical_and(measured.any(-1).all(-1), special.any((-2, -1)))


def _blocks(inventory: Inventory) -> tuple[int, dict[str, dict[int, None]]]:
    """The greatest depth at which the prefixes of all names are few, and the rows under each prefix, each row once."""
    components = [(name.split("."), row) for name, row in inventory.names]
    depth, found = 0, dict[str, dict[int, None]]()
    while True:
        blocks: dict[str, dict[int, None]] = {}
        for parts, row in components:
            blocks.setdefault(".".join(parts[: depth + 1]), {})[row] = None
        # Comes true at the latest with whole names: they are at least as many as the rows.
        if len(blocks) > MOST_LINES:
            return depth, found
        depth, found = depth + 1, blocks
