"""One statistic of a run, ready to be drawn: where it is a number, where it was measured and is none, and where it was not measured.

Between `run` and the views that draw: sparklines, heat maps and charts. What a frame shows as NaN is two things, and no picture may take
one for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from paramwatch.columns import STATISTICS, Array
from paramwatch.frames import compute, table_of
from paramwatch.run import Run
from paramwatch.table import By, Table


@dataclass(frozen=True)
class Series:
    """Lines of numbers over the recorded steps."""

    statistic: str
    names: tuple[str, ...]
    steps: Array
    """int64 [n], rising."""
    values: Array
    """float64 [n, names], NaN where there is no finite number."""
    spoilt: Array
    """bool [n, names]: something was measured, and it is NaN or infinite."""


@dataclass(frozen=True)
class Selection:
    """What was read of a run at once: the parts from which some columns follow."""

    table: Table

    @property
    def names(self) -> tuple[str, ...]:
        return self.table.labels

    @property
    def steps(self) -> Array:
        """int64 [n], rising."""
        return self.table.block.step

    @property
    def states(self) -> Array:
        """int8 [n, names]: positions in `GRAD_STATES`, negative where nothing is known."""
        return self.table.block.grad_state

    def series(self, statistic: str, finite: bool = False) -> Series:
        """One of the columns that were asked for."""
        values = self._numbers(statistic, finite)
        spoilt = np.zeros(values.shape, bool)
        doubtful = ~np.isfinite(values)
        if not finite and statistic in STATISTICS and doubtful.any():
            # a norm over the finite elements is a number wherever there was anything to measure, even if none was finite
            norm = _norm_beside(statistic)
            spoilt = doubtful & ~np.isfinite(self._numbers(norm, False)) & ~np.isnan(self._numbers(norm, True))
        return Series(statistic, self.names, self.steps, np.where(doubtful, np.nan, values), spoilt)

    def _numbers(self, column: str, finite: bool) -> Array:
        block = self.table.block
        return compute(block, [STATISTICS[column]], finite)[column] if column in STATISTICS else block.lr


def select(
    run: Run, columns: Sequence[str], *, parameters: str | Sequence[str] = "*", steps: slice | None = None, by: By = "parameter"
) -> Selection:
    """Read some columns of a run, each part of them once; the arguments are those of `Run.frame`.

    Raises:
        ParamWatchError: As `Run.frame`.
    """
    wanted = [*columns, *(_norm_beside(name) for name in columns if name in STATISTICS)]
    return Selection(table_of(run._epochs(), wanted, parameters=parameters, steps=steps, aliases=False, by=by))


def series(
    run: Run,
    statistic: str,
    *,
    parameters: str | Sequence[str] = "*",
    steps: slice | None = None,
    by: By = "parameter",
    finite: bool = False,
) -> Series:
    """Read one statistic; the arguments are those of `Run.frame`.

    Raises:
        ParamWatchError: As `Run.frame`.
    """
    return select(run, [statistic], parameters=parameters, steps=steps, by=by).series(statistic, finite)


def recorded_steps(run: Run) -> Array:
    """The numbers of the recorded steps, int64 [n]; nothing else is read.

    Raises:
        ParamWatchError: Nothing whole was written yet.
    """
    first, *rest = (epoch.step for epoch in run._epochs())
    return np.unique(np.concatenate([first, *rest])) if rest else first


def of_each(values: Array, of: Callable[..., Array]) -> Array:
    """A number for each column of [n, columns] over those that are not NaN, such as `np.median`; NaN where there are none."""
    out = np.full(values.shape[1], np.nan)
    unknown = np.isnan(values)
    whole = ~unknown.any(0) & (len(values) > 0)
    if whole.any():
        out[whole] = of(values if whole.all() else values[:, whole], axis=0)
    for i in np.flatnonzero(~whole & ~unknown.all(0)):
        out[i] = of(values[~unknown[:, i], i])
    return out


def latest(steps: Array, rows: int, most: int = 200) -> slice:
    """The last recorded steps, as many as can be looked at in no time: at most `most`, and fewer where the rows are many."""
    n = max(10, min(most, 1_000_000 // max(1, rows)))
    return slice(int(steps[-n:][0]), None) if len(steps) else slice(0, None)


def _norm_beside(statistic: str) -> str:
    return f"{STATISTICS[statistic].needs[0][0]}_norm"
