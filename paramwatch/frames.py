"""Blocks to pandas: every frame that a run can give.

The last stage of the pipe before a reader's own eyes. Numbers are derived from parts by `columns` alone; here they are only chosen, joined
over epochs and laid out, many steps at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from paramwatch.bins import HIGH, LOW
from paramwatch.block import Block, nulls
from paramwatch.columns import EXTRA_COLUMNS, KINDS, Array, Statistic, getter, statistics_of
from paramwatch.epoch import PER_ROW
from paramwatch.globs import text
from paramwatch.guard import ParamWatchError
from paramwatch.histograms import filled
from paramwatch.merging import merged_with
from paramwatch.record import GRAD_STATES, Finding, Inventory, Row
from paramwatch.table import (
    By,
    Source,
    Table,
    all_rows,
    at,
    chosen_steps,
    group,
    join,
    labels_of,
    layout_of,
    nearest,
    runs,
    span_of,
)
from paramwatch.totals import NEEDED, totals_of

_STATES = pd.CategoricalDtype(list(GRAD_STATES))
_KNOWN = ("skipped", "amp_scale", "evaluations", "backwards", "update_mode", "full_rate", "overhead_us")
_TOTALS = ("param_norm", "grad_norm", "grad_raw_norm", "clip_coef", "update_norm")


def frame(
    epochs: Sequence[Source],
    statistic: str | None = None,
    *,
    parameters: str | Sequence[str] = "*",
    steps: slice | None = None,
    aliases: bool = False,
    by: By = "parameter",
    finite: bool = False,
) -> pd.DataFrame:
    """All statistics as a tidy frame, or one of them as a wide one.

    Statistics are float64, NaN where nothing was measured; counts are nullable Int64, `grad_state` is categorical. Rows come in the order
    of the model as it was last; those that are gone by then come last. A row that did not exist yet has no line in the tidy frame.

    Args:
        epochs: At least one, in order. Of each no more is read than the answer needs.
        statistic: A column of the tidy frame. None for all.
        parameters: Glob patterns over names and aliases; a pattern that is a name means that name only, but for `*`, which is all.
        steps: By step number, end excluded.
        aliases: Show a tied row under each of its names, whichever of them was asked for.
        by: Merge the rows of one module, or those that share so many name components, counting each tensor once. A group's numbers are
            over its rows that stepped or, where none did, over all that were measured; its `lr` is NaN where they differ, its
            `grad_state` the first of used, zero, none, frozen, unowned that one of its rows has.
        finite: Leave non-finite elements out.

    Returns:
        Index (`step`, `parameter`) and a column for each statistic, `lr` and `grad_state`; or index `step` and a column for each row.
        With `by`, `parameter` is called `layer` or `block`.

    Raises:
        ParamWatchError: An unknown statistic, patterns that fit no row, or an argument that makes no sense.
    """
    if statistic is not None and not isinstance(statistic, str):
        raise ParamWatchError(f"statistic must be the name of one column, such as 'grad_norm', not {statistic!r}; leave it out for all")
    known, level = {found.name: found for found in statistics_of(layout_of(epochs))}, _level(by)
    columns = None if statistic is None else [statistic]
    table = table_of(epochs, columns, parameters=parameters, steps=steps, aliases=aliases, by=by)
    if statistic is None:
        return _tidy(table, tuple(known.values()), EXTRA_COLUMNS, level, finite)
    return _wide(table, statistic, known.get(statistic), level, finite)


def some_columns(epochs: Sequence[Source], columns: Sequence[str], *, parameters: str | Sequence[str], steps: slice | None) -> pd.DataFrame:
    """The tidy frame with these columns alone, in the order they have there; nothing else is read or computed.

    Raises:
        ParamWatchError: As `frame`.
    """
    known = [found for found in statistics_of(layout_of(epochs)) if found.name in columns]
    table = table_of(epochs, columns, parameters=parameters, steps=steps, aliases=False, by="parameter")
    return _tidy(table, known, [name for name in EXTRA_COLUMNS if name in columns], "parameter", finite=False)


def table_of(
    epochs: Sequence[Source], columns: Sequence[str] | None, *, parameters: str | Sequence[str], steps: slice | None, aliases: bool, by: By
) -> Table:
    """What some columns follow from, None for all of them: their parts and what is kept of each row are read once, and no more than that.

    Raises:
        ParamWatchError: As `frame`.
    """
    known = {found.name: found for found in statistics_of(layout_of(epochs))}
    for column in columns or ():
        if column not in (*known, *EXTRA_COLUMNS):
            raise ParamWatchError(f"there is no statistic {column!r} here{nearest(column, (*known, *EXTRA_COLUMNS))}")
    _level(by)
    span, labels = span_of(steps), labels_of(epochs, parameters, aliases)
    needed = None if columns is None else [pair for column in columns if column in known for pair in known[column].needs]
    per_row: Collection[str] = tuple(PER_ROW) if columns is None else [column for column in columns if column in EXTRA_COLUMNS]
    if by != "parameter":
        needed = None if needed is None else list(merged_with(needed))
        per_row = (*per_row, "stepped")
    blocks = [
        epoch.block(needed, None if found.rows == tuple(range(len(epoch.inventory.rows))) else found.rows, span, per_row=per_row, keys=())
        for epoch, found in zip(epochs, labels, strict=True)
    ]
    table = join(blocks, labels, epochs)
    return table if by == "parameter" else group(table, by)


def steps_frame(epochs: Sequence[Source]) -> pd.DataFrame:
    """What is known of each step as a whole.

    Index `step`; columns `time` (datetime64, UTC), `lr` (float64, NaN where the rows that stepped differ), `skipped` (boolean), `amp_scale`
    (float64), `evaluations`, `backwards` (Int64), `update_mode` (string), `full_rate` (boolean), `overhead_us` (float64), the totals
    `param_norm`, `grad_norm`, `grad_raw_norm`, `clip_coef`, `update_norm` (float64) and `nonfinite` (Int64: elements of parameters and
    gradients) as `totals` has them, then whatever else was recorded. Where nothing is known: NaN or <NA>.
    """
    read = [epoch.block(NEEDED, per_row=("stepped", "lr")) for epoch in epochs]
    block = join(read, [all_rows(epoch) for epoch in epochs], epochs).block
    totals = _totals(block)
    time = pd.DatetimeIndex((block.time * 1e6).round().astype("datetime64[us]")).tz_localize("UTC")
    columns: dict[str, Any] = {"time": time, "lr": totals["lr"]}
    columns |= {key: _column(block, key) for key in _KNOWN}
    columns |= {name: totals[name] for name in _TOTALS} | {"nonfinite": _whole(totals["nonfinite"])}
    columns |= {key: _column(block, key) for key in block.steps if key not in columns}
    return pd.DataFrame(columns, index=pd.Index(block.step, name="step"))


def _totals(block: Block) -> dict[str, Array]:
    found = []
    for lines in runs(block):
        values = {part: at(lines, array) for part, array in block.values.items()}
        n, each = len(block.step[lines]), totals_of(values, block.inventory.kinds, at(lines, block.stepped), at(lines, block.lr))
        found.append({name: np.broadcast_to(total, n) for name, total in each.items()})
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def parameters_frame(inventory: Inventory) -> pd.DataFrame:
    """The rows of a model: index `parameter`; `aliases` and `shape` are tuples, `tie_group` is nullable Int64."""
    names = [field.name for field in fields(Row) if field.name not in ("name", "real_name")]
    types = {"aliases": "object", "shape": "object", "tie_group": "Int64"}
    index = pd.Index([row.name for row in inventory.rows], name="parameter")
    columns = {name: pd.Series([getattr(row, name) for row in inventory.rows], index, types.get(name)) for name in names}
    return pd.DataFrame(columns, index=index)


def findings_frame(findings: Sequence[Finding]) -> pd.DataFrame:
    """What the rules said: `step` (int64), `rule`, `parameter` ("" for a whole step), `message`."""
    columns = {name: pd.Series([getattr(finding, name) for finding in findings], dtype="str") for name in ("rule", "parameter", "message")}
    return pd.DataFrame({"step": np.array([finding.step for finding in findings], np.int64), **columns})


def histograms_frame(
    epochs: Sequence[Source], lines: Any, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False
) -> pd.DataFrame:
    """The bins that hold something: index (`step`, `parameter`, `kind`), columns `low`, `high` (float64) and `count` (int64).

    Args:
        epochs: At least one, in order: which names are which rows.
        lines: The lines of the long stream `histograms`.
        parameters: As for `frame`.
        steps: As for `frame`.
        aliases: As for `frame`.

    Raises:
        ParamWatchError: Patterns that fit no row, or an argument that makes no sense.
    """
    labels = labels_of(epochs, parameters, aliases)
    # as the model was last: its order, and its row where a name was that of another one
    rows: dict[str, str] = {}
    for epoch, known in zip(reversed(epochs), reversed(labels), strict=True):
        for name, row in zip(known.names, known.rows, strict=True):
            rows.setdefault(name, epoch.inventory.rows[row].name)
    found = filled(lines, list(map(text, rows.values())), chosen_steps(lines["step"].to_numpy(), steps))
    codes: list[Any] = [np.unique(found.step, return_inverse=True)[1], found.parameter, found.kind]
    levels: list[Any] = [np.unique(found.step), list(rows), list(KINDS)]
    index = pd.MultiIndex(levels, codes, names=["step", "parameter", "kind"])
    return pd.DataFrame({"low": LOW[found.bin], "high": HIGH[found.bin], "count": found.count}, index=index)


def _level(by: By) -> str:
    if by in ("parameter", "layer"):
        return str(by)
    if isinstance(by, bool) or not isinstance(by, int) or by < 1:
        raise ParamWatchError(f"by={by!r}: expected 'parameter', 'layer', or a number of leading name components (1 or more)")
    return "block"


def compute(block: Block, statistics: Sequence[Statistic], finite: bool) -> dict[str, Array]:
    """Statistic -> float64 [n, labels]."""
    out = {statistic.name: np.empty(block.stepped.shape) for statistic in statistics}
    for lines in runs(block):
        values = {part: at(lines, array) for part, array in block.values.items()}
        get = cache(getter(values, block.inventory.kinds))
        # infinities of both signs meet where a part was held as infinite
        with np.errstate(invalid="ignore", over="ignore"):
            for statistic in statistics:
                out[statistic.name][lines] = statistic.compute(get, finite)
    return out


def _tidy(table: Table, statistics: Sequence[Statistic], extra: Collection[str], level: str, finite: bool) -> pd.DataFrame:
    block = table.block
    n, width = table.exists.shape
    # a view where every row was there at every step
    there: Any = slice(None) if table.exists.all() else table.exists.ravel()
    codes: list[Any] = [np.repeat(np.arange(n), width)[there], np.tile(np.arange(width), n)[there]]
    levels: list[Any] = [pd.Index(block.step), pd.Index(list(table.labels))]
    index = pd.MultiIndex(levels, codes, names=["step", level])
    computed = compute(block, statistics, finite)
    columns: dict[str, Any] = {}
    for statistic in statistics:
        column = computed.pop(statistic.name).ravel()[there]
        columns[statistic.name] = _whole(column) if statistic.integer else column
    if "lr" in extra:
        columns["lr"] = block.lr.ravel()[there]
    if "grad_state" in extra:
        columns["grad_state"] = pd.Categorical.from_codes(block.grad_state.ravel()[there], dtype=_STATES)
    return pd.DataFrame(columns, index=index, copy=False)


def _wide(table: Table, name: str, statistic: Statistic | None, level: str, finite: bool) -> pd.DataFrame:
    block = table.block
    index, labels = pd.Index(block.step, name="step"), pd.Index(list(table.labels), name=level)
    made: list[Any]
    if statistic is None and name == "grad_state":
        made = [pd.Categorical.from_codes(column, dtype=_STATES) for column in block.grad_state.T]
    elif statistic is not None and statistic.integer:
        made = [_whole(column) for column in compute(block, [statistic], finite)[name].T]
    else:
        values = block.lr if statistic is None else compute(block, [statistic], finite)[name]
        return pd.DataFrame(values, index, labels)
    return pd.DataFrame(dict(enumerate(made)), index).set_axis(labels, axis=1)


def _whole(column: Array) -> Any:
    """float64 with NaN -> nullable Int64."""
    unknown = np.isnan(column)
    known = np.where(unknown, 0, column) if unknown.any() else column
    return pd.arrays.IntegerArray(known.astype(np.int64), unknown)


def _column(block: Block, key: str) -> Any:
    """A column of the steps as pandas has it: boolean, Int64, float64 or string."""
    column = block.steps.get(key, nulls(key, len(block.step)))
    unknown = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_string(column.type):
        return pd.array(column.to_pylist(), dtype="string")
    if pa.types.is_floating(column.type):
        return np.where(unknown, np.nan, column.fill_null(0).to_numpy(zero_copy_only=False))
    kind = pd.arrays.BooleanArray if pa.types.is_boolean(column.type) else pd.arrays.IntegerArray
    return kind(column.fill_null(False if pa.types.is_boolean(column.type) else 0).to_numpy(zero_copy_only=False).copy(), unknown)
