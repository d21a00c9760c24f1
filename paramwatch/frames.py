"""Blocks to pandas: every frame that a run can give.

The last stage of the pipe before a reader's own eyes. Numbers are derived from parts by `columns` alone; here they are only chosen, joined
over epochs and laid out, many steps at a time.
"""

from __future__ import annotations

import difflib
import fnmatch
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa

from paramwatch.block import Block, joined_steps, null_of, nulls, one_per_step
from paramwatch.columns import ABSENT, EXTRA_COLUMNS, PARTS, Array, Pair, Statistic, getter, kinds_of, merge, statistics_of
from paramwatch.guard import ParamWatchError
from paramwatch.record import GRAD_STATES, Finding, Inventory, Row
from paramwatch.totals import totals_of

By: TypeAlias = Literal["parameter", "layer"] | int
"""One line a row, a module, or a block of that many leading name components."""

_CELLS = 1 << 16
"""Cells that are derived at a time: what a statistic needs of so many stays in the cache."""

_STATES = pd.CategoricalDtype(list(GRAD_STATES))
_KNOWN = ("skipped", "amp_scale", "evaluations", "backwards", "update_mode", "full_rate", "overhead_us")
_TOTALS = ("param_norm", "grad_norm", "grad_raw_norm", "clip_coef", "update_norm")


def frame(
    blocks: Sequence[Block],
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
        blocks: At least one, in order.
        statistic: A column of the tidy frame. None for all.
        parameters: Glob patterns over names and aliases; a pattern that is a name means that name only.
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
    known = {found.name: found for found in statistics_of(_layout(blocks))}
    if statistic is not None and statistic not in (*known, *EXTRA_COLUMNS):
        raise ParamWatchError(f"there is no statistic {statistic!r} here{_nearest(statistic, (*known, *EXTRA_COLUMNS))}")
    level = _level(by)
    table = _join([_at_steps(block, steps) for block in blocks], _labels(blocks, parameters, aliases))
    if by != "parameter":
        table = _group(table if statistic is None else _narrow(table, known.get(statistic)), by)
    if statistic is None:
        return _tidy(table, tuple(known.values()), level, finite)
    return _wide(table, statistic, known.get(statistic), level, finite)


def steps_frame(blocks: Sequence[Block]) -> pd.DataFrame:
    """What is known of each step as a whole.

    Index `step`; columns `time` (datetime64, UTC), `lr` (float64, NaN where the rows that stepped differ), `skipped` (boolean), `amp_scale`
    (float64), `evaluations`, `backwards` (Int64), `update_mode` (string), `full_rate` (boolean), `overhead_us` (float64), the totals
    `param_norm`, `grad_norm`, `grad_raw_norm`, `clip_coef`, `update_norm` (float64) and `nonfinite` (Int64: elements of parameters and
    gradients) as `totals` has them, then whatever else was recorded. Where nothing is known: NaN or <NA>.
    """
    block = _join(blocks, [_all_rows(block) for block in blocks]).block
    totals = totals_of(block.values, block.inventory.kinds, block.stepped, block.lr)
    time = pd.DatetimeIndex((block.time * 1e6).round().astype("datetime64[us]")).tz_localize("UTC")
    columns: dict[str, Any] = {"time": time, "lr": totals["lr"]}
    columns |= {key: _column(block, key) for key in _KNOWN}
    columns |= {name: totals[name] for name in _TOTALS} | {"nonfinite": _whole(totals["nonfinite"])}
    columns |= {key: _column(block, key) for key in block.steps if key not in columns}
    return pd.DataFrame(columns, index=pd.Index(block.step, name="step"))


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


# ---- which rows, which steps ----------------------------------------------------------------


@dataclass(frozen=True)
class _Labels:
    """What the columns of a block are to be called, and which row each of them shows."""

    names: tuple[str, ...]
    rows: tuple[int, ...]


def _all_rows(block: Block) -> _Labels:
    rows = block.inventory.rows
    return _Labels(tuple(row.name for row in rows), tuple(range(len(rows))))


def _labels(blocks: Sequence[Block], parameters: str | Sequence[str], aliases: bool) -> list[_Labels]:
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    names = dict.fromkeys(name for block in blocks for name, _ in block.inventory.names)
    chosen: set[str] = set()
    for pattern in patterns:
        fits = re.compile(fnmatch.translate(pattern)).match
        chosen.update([pattern] if pattern in names else filter(fits, names))
    if not chosen:
        wanted = ", ".join(map(repr, patterns))
        raise ParamWatchError(f"no parameter fits {wanted}{_nearest(patterns[0] if patterns else '', names)}")
    out = []
    for block in blocks:
        inventory = block.inventory
        found = {row for name, row in inventory.names if name in chosen}
        shown = inventory.names if aliases else [(row.name, i) for i, row in enumerate(inventory.rows)]
        out.append(_Labels(tuple(name for name, row in shown if row in found), tuple(row for _, row in shown if row in found)))
    return out


def _at_steps(block: Block, steps: slice | None) -> Block:
    if steps is None:
        return block
    if not isinstance(steps, slice):
        raise ParamWatchError(f"steps={steps!r} is not a slice; for one step write slice({steps}, {steps} + 1)")
    start, stride = operator.index(steps.start or 0), operator.index(1 if steps.step is None else steps.step)
    stop = np.iinfo(np.int64).max if steps.stop is None else operator.index(steps.stop)
    if start < 0 or stop < 0 or stride < 1:
        raise ParamWatchError(f"steps={steps!r}: steps are chosen by number, so start and stop cannot be negative, nor the stride below 1")
    return block.at((block.step >= start) & (block.step < stop) & ((block.step - start) % stride == 0))


def _nearest(word: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return f"; nearest: {', '.join(map(repr, near))}"
    return f"; there are {', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else "; there are none"


# ---- blocks to one table --------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """One block whose last axis is labels, not the rows of its inventory."""

    block: Block
    labels: tuple[str, ...]
    tensors: tuple[str, ...]
    """The canonical name behind each label."""
    exists: Array
    """bool [n, labels]"""


def _layout(blocks: Sequence[Block]) -> tuple[Pair, ...]:
    return tuple(dict.fromkeys(pair for block in blocks for pair in block.inventory.layout))


def _join(blocks: Sequence[Block], labels: Sequence[_Labels]) -> _Table:
    """Put blocks one after the other, their columns matched by label; what a block lacks is null."""
    tensor_of: dict[str, str] = {}
    for block, found in zip(reversed(blocks), reversed(labels), strict=True):
        for name, row in zip(found.names, found.rows, strict=True):
            tensor_of.setdefault(name, block.inventory.rows[row].name)
    names = tuple(tensor_of)
    if len(blocks) == 1:
        block = _only(blocks[0], labels[0])
        return _Table(block, names, tuple(tensor_of.values()), np.ones(block.stepped.shape, bool))

    layout = _layout(blocks)
    kinds, ends = kinds_of(layout), np.cumsum([len(block.step) for block in blocks])
    n, width = int(ends[-1]), len(names)
    values = {part: np.full((n, len(kinds), width), null_of(part), PARTS[part].dtype) for part in {part for _, part in layout}}
    stepped, lr, state = np.zeros((n, width), bool), np.full((n, width), np.nan), np.full((n, width), ABSENT, np.int8)
    position = {name: i for i, name in enumerate(names)}
    places = []
    for block, found, end in zip(blocks, labels, ends, strict=True):
        lines, rows, columns = slice(end - len(block.step), end), list(found.rows), [position[name] for name in found.names]
        places.append((block, columns))
        for j, kind in enumerate(block.inventory.kinds):
            for part, array in block.values.items():
                values[part][lines, kinds.index(kind)][:, columns] = array[:, j, rows]
        for out, array in ((stepped, block.stepped), (lr, block.lr), (state, block.grad_state)):
            out[lines][:, columns] = array[:, rows]
    joined = replace(
        blocks[-1],
        inventory=replace(blocks[-1].inventory, layout=layout),
        step=np.concatenate([block.step for block in blocks]),
        time=np.concatenate([block.time for block in blocks]),
        values=values,
        stepped=stepped,
        lr=lr,
        grad_state=state,
        steps=joined_steps(blocks),
    )
    joined = one_per_step(joined)
    exists = np.zeros(joined.stepped.shape, bool)
    for block, columns in places:
        exists[np.searchsorted(joined.step, block.step)[:, None], columns] = True
    return _Table(joined, names, tuple(tensor_of.values()), exists)


def _only(block: Block, labels: _Labels) -> Block:
    """A block with these columns only."""
    if labels.rows == tuple(range(len(block.inventory.rows))):
        return block
    rows = list(labels.rows)
    values = {part: array[..., rows] for part, array in block.values.items()}
    return replace(block, values=values, **{name: getattr(block, name)[:, rows] for name in ("stepped", "lr", "grad_state")})


def _narrow(table: _Table, statistic: Statistic | None) -> _Table:
    """Only the parts that a statistic needs, since merging is what costs (no statistic: those of one kind)."""
    inventory = table.block.inventory
    layout = statistic.needs if statistic else tuple(pair for pair in inventory.layout if pair[0] == inventory.kinds[0])
    axis = [inventory.kinds.index(kind) for kind in kinds_of(layout)]
    parts = {part for _, part in layout}
    # these two merge together
    parts |= {"mean", "std"} if parts & {"mean", "std"} else set()
    values = {part: table.block.values[part][:, axis] for part in parts}
    return replace(table, block=replace(table.block, inventory=replace(inventory, layout=layout), values=values))


def _group(table: _Table, by: By) -> _Table:
    """Merge the columns of one module, or of one prefix, each tensor once."""
    groups: dict[str, dict[str, int]] = {}
    for i, (label, tensor) in enumerate(zip(table.labels, table.tensors, strict=True)):
        name = ".".join(label.split(".")[:by]) if isinstance(by, int) else label.rpartition(".")[0] or "(root)"
        groups.setdefault(name, {}).setdefault(tensor, i)
    members = [list(group.values()) for group in groups.values()]
    order, sizes = [i for group in members for i in group], [len(group) for group in members]
    starts = np.cumsum([0, *sizes[:-1]])
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    block = table.block
    stepped = block.stepped[:, order]
    some = np.logical_or.reduceat(stepped, starts, axis=1)
    counted = stepped | ~np.repeat(some, sizes, axis=1)
    merged: list[dict[str, Array]] = []
    for lines in _runs(block):
        values = {part: array[lines][..., order] for part, array in block.values.items()}
        values["count"] = np.where(counted[lines, None], values["count"], ABSENT)
        merged.append(merge(values, ranges))
    low, high = (reduce.reduceat(np.where(stepped, block.lr[:, order], np.nan), starts, axis=1) for reduce in (np.fmin, np.fmax))
    state = block.grad_state[:, order]
    first = np.minimum.reduceat(np.where(state < 0, len(GRAD_STATES), state), starts, axis=1)
    grouped = replace(
        block,
        values={part: np.concatenate([found[part] for found in merged]) for part in merged[0]},
        stepped=some,
        lr=np.where(low == high, low, np.nan),
        grad_state=np.where(first == len(GRAD_STATES), ABSENT, first).astype(np.int8),
    )
    names = tuple(groups)
    return _Table(grouped, names, names, np.logical_or.reduceat(table.exists[:, order], starts, axis=1))


def _level(by: By) -> str:
    if by in ("parameter", "layer"):
        return str(by)
    if isinstance(by, bool) or not isinstance(by, int) or by < 1:
        raise ParamWatchError(f"by={by!r}: expected 'parameter', 'layer', or a number of leading name components (1 or more)")
    return "block"


# ---- a table to pandas ----------------------------------------------------------------------


def _runs(block: Block) -> list[slice]:
    """The steps of a block, some thousand cells at a time: temporaries stay small. At least one run."""
    n, width = block.stepped.shape
    size = max(1, _CELLS // max(1, width))
    return [slice(start, start + size) for start in range(0, max(n, 1), size)]


def _compute(block: Block, statistics: Sequence[Statistic], finite: bool) -> dict[str, Array]:
    """Statistic -> float64 [n, labels]."""
    out = {statistic.name: np.empty(block.stepped.shape) for statistic in statistics}
    for lines in _runs(block):
        get = cache(getter({part: array[lines] for part, array in block.values.items()}, block.inventory.kinds))
        # infinities of both signs meet where a part was held as infinite
        with np.errstate(invalid="ignore", over="ignore"):
            for statistic in statistics:
                out[statistic.name][lines] = statistic.compute(get, finite)
    return out


def _tidy(table: _Table, statistics: Sequence[Statistic], level: str, finite: bool) -> pd.DataFrame:
    block, there = table.block, table.exists.ravel()
    n, width = table.exists.shape
    codes: list[Any] = [np.repeat(np.arange(n), width)[there], np.tile(np.arange(width), n)[there]]
    levels: list[Any] = [pd.Index(block.step), pd.Index(list(table.labels))]
    index = pd.MultiIndex(levels, codes, names=["step", level])
    computed = _compute(block, statistics, finite)
    columns: dict[str, Any] = {}
    for statistic in statistics:
        column = computed.pop(statistic.name).ravel()[there]
        columns[statistic.name] = _whole(column) if statistic.integer else column
    columns["lr"] = block.lr.ravel()[there]
    columns["grad_state"] = pd.Categorical.from_codes(block.grad_state.ravel()[there], dtype=_STATES)
    return pd.DataFrame(columns, index=index, copy=False)


def _wide(table: _Table, name: str, statistic: Statistic | None, level: str, finite: bool) -> pd.DataFrame:
    block = table.block
    index, labels = pd.Index(block.step, name="step"), pd.Index(list(table.labels), name=level)
    made: list[Any]
    if statistic is None and name == "grad_state":
        made = [pd.Categorical.from_codes(column, dtype=_STATES) for column in block.grad_state.T]
    elif statistic is not None and statistic.integer:
        made = [_whole(column) for column in _compute(block, [statistic], finite)[name].T]
    else:
        values = block.lr if statistic is None else _compute(block, [statistic], finite)[name]
        return pd.DataFrame(values, index, labels)
    return pd.DataFrame(dict(enumerate(made)), index).set_axis(labels, axis=1)


def _whole(column: Array) -> Any:
    """float64 with NaN -> nullable Int64."""
    unknown = np.isnan(column)
    return pd.arrays.IntegerArray(np.where(unknown, 0, column).astype(np.int64), unknown)


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
