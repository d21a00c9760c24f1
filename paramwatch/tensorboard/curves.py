"""Which curves an event file draws, and their values in some records.

Totals always; beside them the parameters themselves while they are few, and `blocks` of them in a larger model. What was not measured
has no value and is not drawn; a value that is not a number because the data are not is drawn as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from paramwatch.batch import Batch
from paramwatch.columns import SPECIALS, STATISTICS, Array
from paramwatch.record import Inventory
from paramwatch.tensorboard.blocks import blocks_of
from paramwatch.tensorboard.norms import LINES, Norms, among_of
from paramwatch.totals import TOTALS, totals_of

MOST_LINES = 64
"""Rows with curves of their own, and blocks where there are more rows: TensorBoard's tabs are of little use with many more tags."""

_ALL = "(all)"
DISTRIBUTION, HEAT_MAP = "(log10 of each)", "(heat map)"
RESERVED = (_ALL, DISTRIBUTION, HEAT_MAP)
"""What is drawn of all rows together has names in brackets, which come before every letter in every list."""


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

    @classmethod
    def of(cls, inventory: Inventory) -> Curves:
        """A curve for each name of a row; where there are too many rows, one for each block of them."""
        named, blocks = inventory.names, tuple[tuple[int, ...], ...]()
        if len(inventory.rows) > MOST_LINES:
            members = blocks_of(inventory, MOST_LINES)
            named, blocks = tuple((name, i) for i, name in enumerate(members)), tuple(members.values())
        # A parameter may be called "(all)"; the curve of that name is the total.
        named = tuple((name.encode(errors="backslashreplace").decode(), position) for name, position in named if name not in RESERVED)
        stored = [(statistic, kinds) for statistic, kinds in LINES.items() if set(kinds).issubset(inventory.kinds)]
        lines = tuple((kinds, tuple(f"{statistic}/{name}" for name, _ in named)) for statistic, kinds in stored)
        names, positions = tuple(name for name, _ in named), np.array([position for _, position in named], dtype=np.intp)
        return cls(lines, names, positions, blocks)

    def event_bytes(self) -> int:
        """An upper bound of what an event that holds every curve takes in the file."""
        framing, per_value = 64, 12
        return framing + sum(per_value + len(tag.encode()) for tag in self.tags())

    def tags(self) -> list[str]:
        """The tag of every curve, those of the totals first."""
        return [*(f"{statistic}/{_ALL}" for statistic in TOTALS), *(tag for _, tags in self.lines for tag in tags)]

    def values(self, batch: Batch, norms: Norms) -> tuple[Array, Array]:
        """The curves' values, float64 [n, tags], and whether they are drawn: a curve of which nothing was measured is left out.

        Args:
            batch: The steps.
            norms: Of its rows.
        """
        among = among_of(batch)
        found, drawn = _totals(batch, among)
        if len(self.positions):
            lines = (norms.of_blocks(*self.in_blocks, among) if self.blocks else norms).lines
            found += [value[:, self.positions] for value, _ in lines.values()]
            drawn += [known[:, self.positions] for _, known in lines.values()]
        return np.concatenate(found, axis=1), np.concatenate(drawn, axis=1)

    @cached_property
    def in_blocks(self) -> tuple[Array, Array]:
        """The rows of all blocks, and where each begins."""
        return np.fromiter(chain.from_iterable(self.blocks), np.intp), np.cumsum([0, *map(len, self.blocks[:-1])])


def _totals(batch: Batch, among: Array) -> tuple[list[Array], list[Array]]:
    """[n, 1] for each total."""
    found = totals_of(batch.values, batch.inventory.kinds, batch.stepped, batch.lr)
    drawn = {name: ~np.isnan(value) for name, value in found.items()}
    if not batch.finite:
        drawn = {name: known if known.all() else known | _spoilt(batch, name, among) for name, known in drawn.items()}
    return [found[name][:, None] for name in TOTALS], [drawn[name][:, None] for name in TOTALS]


def _spoilt(batch: Batch, name: str, among: Array) -> Array:
    """Where a total is not a number because of the data, rather than unknown or a ratio to zero: bool [n]."""
    kinds_of = batch.inventory.kinds
    needed = {kind for kind, _ in STATISTICS[name].needs} if name in STATISTICS else set()
    if not needed or not needed.issubset(kinds_of):
        return np.zeros(len(batch), dtype=bool)
    kinds = [kinds_of.index(kind) for kind in needed]
    count, nan, posinf, neginf = (batch.values[part][:, kinds] for part in SPECIALS)
    measured = (count >= 0) & among[:, None]
    special = measured & (nan + posinf + neginf > 0)
    return np.logical_and(measured.any(-1).all(-1), special.any((-2, -1)))
