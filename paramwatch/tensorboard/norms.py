"""The norms of rows and of blocks of rows over many steps, and the lines that are drawn of them.

Between the batches and `curves`. What was not measured has no norm; a norm that is not a number because the data are not is told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from paramwatch.batch import Batch
from paramwatch.columns import NON_FINITE, STATISTICS, Array, ratio
from paramwatch.totals import counted

LINES = {"param_norm": ("param",), "grad_norm": ("grad",), "update_ratio": ("update", "param")}
"""The statistics that are drawn of a row or block: a norm, or the ratio of two."""

Lines: TypeAlias = Mapping[str, tuple[Array, Array]]
"""Statistic -> its values, float64 [n, rows or blocks], and which are known: a value that is NaN is known where the data are the cause."""


@dataclass(frozen=True)
class Norms:
    """Of rows or blocks, for some steps and the kinds of which lines are drawn: arrays are [n, kinds, rows or blocks]."""

    kinds: Sequence[str]
    norm: Array
    measured: Array
    """Whether there was anything to measure."""
    spoilt: Array
    """Whether something of what was measured is not finite."""

    @classmethod
    def of(cls, batch: Batch) -> Norms:
        """Of the rows of a batch."""
        drawn = {kind for kinds in LINES.values() for kind in kinds}
        kinds = [kind for kind in batch.inventory.kinds if kind in drawn]
        # they come first in every layout
        values = {part: column[:, : len(kinds)] for part, column in batch.values.items()}
        count = values["count"]
        if batch.finite and (count == count[:1]).all():
            # then all that follows from counts alone is the same in every step
            count = count[:1]
        measured = count >= 0
        parts = {"count": np.where(measured, count, np.nan), "rms": values["rms"].astype(np.float64)}
        # most batches are finite, and then a zero does for a whole part
        parts |= {part: np.zeros(()) if batch.finite else values[part].astype(np.float64) for part in NON_FINITE}
        # a norm follows from its parts in the same way for every kind; so one call does for all of them
        norm = STATISTICS["param_norm"].compute(lambda kind, part: parts[part], False)
        spoilt = np.broadcast_to(parts["nan"] + parts["posinf"] + parts["neginf"] > 0, norm.shape)
        return cls(kinds, norm, np.broadcast_to(measured, norm.shape), spoilt)

    def of_blocks(self, order: Array, starts: Array, among: Array) -> Norms:
        """The same of blocks of rows: squares add up.

        Args:
            order: The rows of all blocks, one block behind the other,
            starts: and where in it each block begins.
            among: The rows that count, bool [n or 1, rows].
        """
        measured = (self.measured & among[:, None])[..., order]
        squares = np.square(self.norm[..., order])
        if measured.all():
            some = np.broadcast_to(True, (*squares.shape[:-1], len(starts)))
        else:
            some = np.logical_or.reduceat(measured, starts, axis=-1)
            squares = np.where(measured, squares, 0.0)
        squares = np.add.reduceat(squares, starts, axis=-1)
        spoilt = np.broadcast_to(False, some.shape)
        if self.spoilt.any():
            spoilt = np.logical_or.reduceat(measured & self.spoilt[..., order], starts, axis=-1)
        return Norms(self.kinds, np.where(some, np.sqrt(squares), np.nan), some, spoilt)

    def at(self, which: Sequence[int]) -> Norms:
        """The same at some of the steps."""
        if len(which) == len(self.norm):
            return self
        return Norms(self.kinds, self.norm[which], self.measured[which], self.spoilt[which])

    @cached_property
    def lines(self) -> Lines:
        """The statistics that are drawn, of those whose kinds are recorded."""
        found = {}
        for statistic, kinds in LINES.items():
            if set(kinds).issubset(self.kinds):
                first, *second = (self.kinds.index(kind) for kind in kinds)
                value = ratio(self.norm[:, first], self.norm[:, second[0]]) if second else self.norm[:, first]
                known = ~np.isnan(value)
                if not known.all():
                    both = [first, *second]
                    known |= self.measured[:, both].all(axis=1) & self.spoilt[:, both].any(axis=1)
                found[statistic] = value, known
        return found


def among_of(batch: Batch) -> Array:
    """The rows that totals and blocks are over: bool [n or 1, rows]."""
    return np.atleast_2d(counted(batch.values["count"], batch.inventory.kinds, batch.stepped))
