"""Step numbers as places on a page: a run of any length in at most so many columns, and its lines as characters.

What sparklines, heat maps and charts have in common. Of the numbers in one column the largest is shown, so that no spike is lost; a column
in which no step was recorded, as in a thinned run, shows what the last one before it had.
"""

from __future__ import annotations

import numpy as np

from paramwatch.columns import Array

BARS = "▁▂▃▄▅▆▇█"
SPOILT = "×"
"""Stands for NaN and infinity."""


class Span:
    """Recorded steps in columns of one width.

    Args:
        steps: int64 [n], rising, at least one.
        most: Columns, at most.
    """

    def __init__(self, steps: Array, most: int) -> None:
        gaps = np.diff(steps)
        self.first = int(steps[0])
        # the last step lasts as long as the one before it
        self.end = int(steps[-1]) + (int(gaps[-1]) if len(gaps) else 1)
        grain = int(np.gcd.reduce(gaps)) if len(gaps) else 1
        self.columns = max(1, min(most, (self.end - self.first) // grain))
        seen, filled = self.column_of(steps), np.zeros(self.columns, np.intp)
        filled[seen] = seen
        self.source = np.maximum.accumulate(filled)
        """intp [columns]: the column whose steps each column shows."""

    def column_of(self, steps: Array) -> Array:
        """intp: where these steps are."""
        return ((steps - self.first) * self.columns // (self.end - self.first)).astype(np.intp)

    def seen(self, steps: Array) -> Array:
        """intp: the columns that hold any of these steps, which rise."""
        columns = self.column_of(steps)
        return columns[np.diff(columns, prepend=-1) > 0]

    def largest(self, steps: Array, values: Array, into: Array, reduce: np.ufunc = np.fmax) -> None:
        """Put the largest value of each column there, or with another `reduce` the least, or whether there is any.

        Args:
            steps: int64 [n], rising.
            values: [n, ...].
            into: [columns, ...], changed.
            reduce: How two values become one.
        """
        if not len(steps):
            return
        columns = self.column_of(steps)
        starts = np.flatnonzero(np.diff(columns, prepend=-1))
        at = columns[starts]
        into[at] = reduce(into[at], reduce.reduceat(values, starts, axis=0))


def sparkline(steps: Array, values: Array, spoilt: Array, width: int) -> str:
    """A line of numbers as characters, from its least to its largest; on a logarithmic scale where that is more than 100 times.

    Args:
        steps: int64 [n], rising.
        values: float64 [n], NaN where there is no finite number: a space, or where `spoilt` a cross.
        spoilt: bool [n].
        width: Characters, at most.
    """
    if not len(steps):
        return ""
    span = Span(steps, width)
    largest, crossed = np.full(span.columns, np.nan), np.zeros(span.columns, bool)
    span.largest(steps, values, largest)
    span.largest(steps, spoilt, crossed, np.logical_or)
    return "".join(
        SPOILT if cross else " " if np.isnan(height) else BARS[int(height)]
        for height, cross in zip(_heights(largest)[span.source], crossed[span.source], strict=True)
    )


def _heights(values: Array) -> Array:
    """0 to 7, NaN where there is no number."""
    known = values[~np.isnan(values)]
    if not len(known):
        return values
    low, high = known.min(), known.max()
    if low > 0 and high / 100 > low:
        values, low, high = np.log(values), np.log(low), np.log(high)
    # in units of the largest, since the whole range may be more than float64 holds
    unit = max(abs(low), abs(high)) or 1.0
    values, low, high = values / unit, low / unit, high / unit
    return np.floor((values - low) / (high - low) * (len(BARS) - 1) + 0.5) if high > low else values * 0
