"""One statistic as a table: a line for each row, layer or block, with how it went and where it stands (`paramwatch show`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paramwatch.absence import counted
from paramwatch.columns import Array
from paramwatch.grid import Grid, number
from paramwatch.guard import ParamWatchError
from paramwatch.record import GRAD_STATES
from paramwatch.run import Run
from paramwatch.series import Selection, Series, of_each, recorded_steps, select
from paramwatch.span import sparkline
from paramwatch.standing import last_states
from paramwatch.table import By


def listing(
    run: Run,
    statistic: str,
    *,
    parameters: str | Sequence[str] = "*",
    steps: slice | None = None,
    by: By = "parameter",
    finite: bool = False,
    order: str = "model",
    drawn: int | None = None,
    width: int = 24,
) -> list[dict[str, Any]]:
    """A dict for each line, over the recorded steps.

    `last`, `median`, `min` and `max` are of the steps in which it is a finite number; `change` is the median of their last quarter divided
    by that of their first; `nonfinite_steps` counts those in which it was measured and is NaN or infinite. Numbers that are not there are
    NaN. Of `grad_state` there are `last` and the number of steps in each state.

    Args:
        run: Read anew.
        statistic: A column of `Run.frame()`.
        parameters: As for `Run.frame`, as `steps`, `by` and `finite` are.
        steps: By number, end excluded.
        by: What a line is.
        finite: Leave non-finite elements out.
        order: One of `usage.ORDERS`.
        drawn: So many lines, the first, get a `trend`; by default all.
        width: Characters of a `trend`.

    Raises:
        ParamWatchError: As `Run.frame`; no step that is recorded was asked for.
    """
    found, chosen = None, select(run, [statistic], parameters=parameters, steps=steps, by=by)
    if not len(chosen.steps) and len(recorded := recorded_steps(run)):
        raise ParamWatchError(f"none of those steps is recorded: the run has steps {recorded[0]} to {recorded[-1]}")
    if statistic == "grad_state":
        lines = _states(chosen)
    else:
        found = chosen.series(statistic, finite)
        lines = _numbers(found)
    if order == "name":
        lines.sort(key=lambda line: str(line["name"]))
    elif order != "model":
        lines.sort(key=lambda line: _sortable(line.get(order)))
    if found:
        at = {name: i for i, name in enumerate(found.names)}
        for line in lines[:drawn]:
            i = at[line["name"]]
            line["trend"] = sparkline(found.steps, found.values[:, i], found.spoilt[:, i], width)
    return lines


def grid_of(statistic: str, by: By, lines: Sequence[dict[str, Any]], shown: int) -> Grid:
    """The first lines as a table."""
    first = by if isinstance(by, str) else "block"
    rest = len(lines) - shown
    more = f"… and {counted(rest, 'more line')}; --limit 0 shows all" if rest > 0 else ""
    if statistic == "grad_state":
        cells = [(line["name"], line["last"] or "", ", ".join(f"{k} {n:,}" for k, n in line["steps"].items())) for line in lines[:shown]]
        return Grid((first, "last", "steps"), cells, frozenset({"last", "steps"}), more)
    numbers = ("last", "median", "min", "max", "change")
    some_spoilt = any(line["nonfinite_steps"] for line in lines[:shown])
    header = (first, "trend", *numbers, *(["not finite"] if some_spoilt else []))
    out = []
    for line in lines[:shown]:
        change = "" if np.isnan(line["change"]) else f"{line['change']:.3g}x"
        spoilt = [f"{line['nonfinite_steps']:,}"] if some_spoilt else []
        out.append((line["name"], line["trend"], *(number(line[name]) for name in numbers[:-1]), change, *spoilt))
    return Grid(header, out, frozenset({"trend"}), more)


def _numbers(found: Series) -> list[dict[str, Any]]:
    columns = {"last": _last(found.values)} | {name: of_each(found.values, of) for name, of in _OF.items()}
    quarter = max(1, len(found.steps) // 4)
    early, late = (of_each(part, np.median) for part in (found.values[:quarter], found.values[-quarter:]))
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["change"] = np.where((early > 0) & (late >= 0), late / early, np.nan)
    columns["nonfinite_steps"] = found.spoilt.sum(0)
    numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"name": name, **dict(zip(columns, each, strict=True))} for name, each in zip(found.names, numbers, strict=True)]


_OF: dict[str, Callable[..., Array]] = {"median": np.median, "min": np.min, "max": np.max}


def _last(values: Array) -> Array:
    """The last number of each column, NaN where it has none."""
    if not len(values):
        return np.full(values.shape[1], np.nan)
    at = len(values) - 1 - (~np.isnan(values))[::-1].argmax(0)
    last: Array = values[at, np.arange(values.shape[1])]
    return last


def _states(found: Selection) -> list[dict[str, Any]]:
    counts = {state: (found.states == code).sum(0).tolist() for code, state in enumerate(GRAD_STATES)}
    return [
        {"name": name, "last": last, "steps": {state: column[i] for state, column in counts.items() if column[i]}}
        for i, (name, last) in enumerate(zip(found.names, last_states(found.states), strict=True))
    ]


def _sortable(value: Any) -> tuple[bool, Any]:
    """Largest first, what is missing last; words in their order."""
    if value is None or value != value:
        return True, 0
    return False, value if isinstance(value, str) else -value
