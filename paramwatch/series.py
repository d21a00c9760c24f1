"""One statistic of a run, ready to be drawn: where it is a number, where it was measured and is none, and where it was not measured.

Between `run` and the views that draw: sparklines, heat maps and charts. What a frame shows as NaN is two things, and no picture may take
one for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from paramwatch.columns import STATISTICS, Array
from paramwatch.run import Run
from paramwatch.table import By


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

    def numbers(column: str, leaving_out: bool) -> pd.DataFrame:
        return run.frame(column, parameters=parameters, steps=steps, by=by, finite=leaving_out)

    frame = numbers(statistic, finite)
    values = floats(frame)
    spoilt = np.zeros(values.shape, bool)
    doubtful = ~np.isfinite(values)
    if not finite and statistic in STATISTICS and doubtful.any():
        # a norm over the finite elements is a number wherever there was anything to measure, even if none was finite
        norm = f"{STATISTICS[statistic].needs[0][0]}_norm"
        # a run that goes on may have grown in between
        whole, measured = (floats(numbers(norm, leaving_out)[: len(frame)]) for leaving_out in (False, True))
        spoilt = doubtful & ~np.isfinite(whole) & ~np.isnan(measured)
    return Series(
        statistic,
        tuple(map(str, frame.columns)),
        frame.index.to_numpy(np.int64),
        np.where(doubtful, np.nan, values),
        spoilt,
    )


def recorded_steps(run: Run) -> Array:
    """The numbers of the recorded steps, int64 [n], at the least cost.

    Raises:
        ParamWatchError: Nothing whole was written yet.
    """
    first = run.parameters.index[:1].tolist()
    frame = run.frame("lr", parameters=first) if first else run.frame("lr")
    return frame.index.to_numpy(np.int64)


def latest(steps: Array, rows: int, most: int = 200) -> slice:
    """The last recorded steps, as many as can be looked at in no time: at most `most`, and fewer where the rows are many."""
    n = max(10, min(most, 2_000_000 // max(1, rows)))
    return slice(int(steps[-n:][0]), None) if len(steps) else slice(0, None)


def floats(frame: pd.DataFrame) -> Array:
    """A wide frame of numbers as float64 [n, columns], nulls as NaN."""
    return frame.to_numpy(np.float64, na_value=np.nan) if len(frame.columns) else np.empty(frame.shape)
