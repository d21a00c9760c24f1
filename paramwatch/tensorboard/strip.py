"""The whole of a run in a picture's worth of numbers: of each statistic the greatest level of some rows over some steps.

Between the batches and a heat map. It takes every step, whatever is drawn as curves, and no more memory for a long run than for a short
one: where it is full, neighbouring columns become one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paramwatch.columns import Array
from paramwatch.heatmap import MISSING, pool

MOST_ROWS, MOST_COLUMNS = 172, 512


class Strip:
    """Levels at the steps seen so far. A step that comes again replaces what it was."""

    def __init__(self) -> None:
        self.steps = 0
        """How many it was given, each counted once."""
        self.first: list[int] = []
        """The first step in each column."""
        self.last = -1
        self._stride = 1
        self._found: dict[str, Array] = {}
        self._before: dict[str, Array] = {}

    def add(self, step: Sequence[int], found: Mapping[str, Array]) -> None:
        """Take some steps in order.

        Args:
            step: Their numbers; the first may be the one that was the last until now.
            found: Statistic -> levels [n, rows].
        """
        lines = {name: pool(of.T, MOST_ROWS, len(step)) for name, of in found.items()}
        if step[0] == self.last:
            self._take_back()
        # the last one by itself: it may come again
        for begin, end in ((0, len(step) - 1), (len(step) - 1, len(step))):
            while begin < end:
                column, filled = divmod(self.steps, self._stride)
                if column == MOST_COLUMNS:
                    self._halve()
                    continue
                # whole columns where there are any, else the rest of one or a part of it
                columns = 0 if filled else min((end - begin) // self._stride, MOST_COLUMNS - column)
                n = columns * self._stride or min(end - begin, self._stride - filled)
                shape = -1, max(columns, 1), n // max(columns, 1)
                self._put(column, {name: of[:, begin : begin + n].reshape(shape).max(axis=2) for name, of in lines.items()})
                if not filled:
                    self.first += step[begin : begin + n : self._stride]
                self.steps, begin = self.steps + n, begin + n
        self.last = step[-1]

    @property
    def statistics(self) -> tuple[str, ...]:
        """Those it was given."""
        return tuple(self._found)

    def levels(self, statistic: str) -> Array:
        """Levels [lines, columns], of at most so many rows and columns as a picture has."""
        return self._found[statistic][:, : len(self.first)]

    def _put(self, column: int, found: Mapping[str, Array]) -> None:
        """Into columns from this one on."""
        for name, of in found.items():
            if name not in self._found:
                self._found[name] = np.full((len(of), MOST_COLUMNS), np.float32(MISSING))
            held = self._found[name][:, column : column + of.shape[1]]
            self._before[name] = held[:, 0].copy()
            np.maximum(held, of, out=held)

    def _take_back(self) -> None:
        """Forget the last step."""
        self.steps -= 1
        column, filled = divmod(self.steps, self._stride)
        for name, before in self._before.items():
            self._found[name][:, column] = before
        if filled == 0:
            self.first.pop()

    def _halve(self) -> None:
        self._stride *= 2
        self.first = self.first[::2]
        for name, held in self._found.items():
            halved = np.maximum(held[:, ::2], held[:, 1::2])
            self._found[name] = np.concatenate([halved, np.full_like(halved, MISSING)], axis=1)
