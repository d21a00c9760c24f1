"""Which curves an event file draws, and their values in a record.

Totals always; beside them the parameters themselves while they are few, and blocks of them (the names that share a prefix) in a larger
model. What was not measured has no value and is not drawn; a value that is not a number because the data are not is drawn as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from paramwatch.columns import ABSENT, STATISTICS, Array, ratio
from paramwatch.merging import merge
from paramwatch.record import Inventory, Record
from paramwatch.totals import TOTALS, counted, totals

MOST_LINES = 64
"""Rows with curves of their own, and blocks where there are more rows: TensorBoard's tabs are of little use with many more tags."""

LINES = {"param_norm": ("param",), "grad_norm": ("grad",), "update_ratio": ("update", "param")}
"""The statistics that are drawn of a row or block: a norm, or the ratio of two."""

_ALL = "(all)"
_PARTS = ("count", "nan", "posinf", "neginf", "rms")

Scalar: TypeAlias = tuple[str, float]
"""A tag and its value at one step."""


@dataclass(frozen=True)
class Curves:
    """The curves of one inventory. Tags are `statistic/name`, `name` being `(all)` for the totals."""

    lines: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """For each statistic the kinds it is of, and a tag for each name."""
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
        named = tuple((name.encode(errors="backslashreplace").decode(), position) for name, position in named if name != _ALL)
        stored = [(statistic, kinds) for statistic, kinds in LINES.items() if set(kinds).issubset(inventory.kinds)]
        lines = tuple((kinds, tuple(f"{statistic}/{name}" for name, _ in named)) for statistic, kinds in stored)
        return cls(lines, np.array([position for _, position in named], dtype=np.intp), blocks, depth)

    def event_bytes(self) -> int:
        """An upper bound of what an event that holds every curve takes in the file."""
        framing, per_value = 64, 12
        tags = [*(f"{statistic}/{_ALL}" for statistic in TOTALS), *(tag for _, tags in self.lines for tag in tags)]
        return framing + sum(per_value + len(tag.encode()) for tag in tags)

    def scalars(self, record: Record) -> Iterator[Scalar]:
        """The curves' values in a record; a curve of which nothing was measured is left out."""
        axis = {kind: i for i, kind in enumerate(record.inventory.kinds)}
        yield from _totals(record, axis)
        if not len(self.positions):
            return
        values = {part: record.values[part] for part in _PARTS}
        if self.blocks:
            values["count"] = np.where(counted(record.values["count"], record.inventory.kinds, record.stepped), values["count"], ABSENT)
            values = merge(values, self.blocks)
        numbers = np.array([values[part] for part in _PARTS], dtype=np.float64)
        numbers[:, numbers[0] < 0] = np.nan
        parts = dict(zip(_PARTS, numbers, strict=True))
        # A norm follows from its parts in the same way for every kind; so one call does for all of them.
        norms = STATISTICS["param_norm"].compute(lambda kind, part: parts[part], False)
        spoilt = parts["nan"] + parts["posinf"] + parts["neginf"]
        for kinds, tags in self.lines:
            first, *second = (axis[kind] for kind in kinds)
            value = ratio(norms[first], norms[second[0]]) if second else norms[first]
            # Where one of the kinds was not measured the sum is NaN, and the comparison false.
            drawn = ~np.isnan(value) | (spoilt[[first, *second]].sum(axis=0) > 0)
            for tag, number, shown in zip(tags, value[self.positions].tolist(), drawn[self.positions].tolist(), strict=True):
                if shown:
                    yield tag, number


def _totals(record: Record, axis: Mapping[str, int]) -> Iterator[Scalar]:
    for name, value in totals(record).items():
        if value == value or _spoilt(record, axis, name):
            yield f"{name}/{_ALL}", value


def _spoilt(record: Record, axis: Mapping[str, int], name: str) -> bool:
    """Whether a total is not a number because of the data, rather than unknown or a ratio to zero."""
    if name not in STATISTICS:
        return False
    needed = {kind for kind, _ in STATISTICS[name].needs}
    if not needed.issubset(axis):
        return False
    kinds = [axis[kind] for kind in needed]
    measured = (record.values["count"] >= 0) & counted(record.values["count"], record.inventory.kinds, record.stepped)
    special = measured & (record.values["nan"] + record.values["posinf"] + record.values["neginf"] > 0)
    return bool(measured[kinds].any(axis=1).all() and special[kinds].any())


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
