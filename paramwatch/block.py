"""A block: many steps of one inventory, as arrays. What frames are made of. Neither torch nor pandas is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from paramwatch.columns import ABSENT, PARTS, Array
from paramwatch.record import Inventory, Record

STEP_COLUMNS: Mapping[str, Any] = {
    "skipped": pa.bool_(),
    "amp_scale": pa.float64(),
    "evaluations": pa.int64(),
    "backwards": pa.int64(),
    "update_mode": pa.string(),
    "overhead_us": pa.float64(),
    "overhead_host_us": pa.float64(),
    "epoch": pa.int64(),
    "batch_idx": pa.int64(),
    "global_step": pa.int64(),
}
"""Types of the known keys of `Record.steps`; those of other keys follow from their values."""

SUMMED = ("evaluations", "backwards", "overhead_us", "overhead_host_us")
"""Keys of `Record.steps` that add up over the parts of a step."""

WIDENING = (pa.bool_(), pa.int64(), pa.float64(), pa.string())
"""The types of such columns, from the narrowest on."""


@dataclass(frozen=True)
class Block:
    """Steps with one inventory, in order. Arrays are shaped [n, ...], n steps; rows are those of the inventory or some of them."""

    inventory: Inventory
    """Its layout is what was read of the values."""
    step: Array
    """int64 [n], each number once."""
    time: Array
    """float64 [n], seconds since the epoch."""
    values: Mapping[str, Array]
    """Part -> [n, kinds, rows], as in `Record.values`; empty where none was read."""
    stepped: Array
    lr: Array
    grad_state: Array
    steps: Mapping[str, Any]
    """Key -> pyarrow array of n values, null where unknown: the keys of `Record.steps`, and `full_rate`."""

    def at(self, which: Array) -> Block:
        """The steps chosen by a bool [n], or at the positions in an integer array."""
        if which.dtype == bool and which.all():
            return self
        choice = pa.array(which)
        arrow = pa.Array.filter if which.dtype == bool else pa.Array.take
        return replace(
            self,
            values={part: array[which] for part, array in self.values.items()},
            steps={key: arrow(column, choice) for key, column in self.steps.items()},
            **{name: getattr(self, name)[which] for name in ("step", "time", "stepped", "lr", "grad_state")},
        )


def one_per_step(block: Block) -> Block:
    """Put the steps in order, and merge what was recorded of one step in several parts, as `Parts` says.

    Counts and times of the parts add up, and the step was skipped if any part was.
    """
    if (np.diff(block.step) > 0).all():
        return block
    block = block.at(np.argsort(block.step, kind="stable"))
    parts = Parts(np.flatnonzero(np.diff(block.step, prepend=block.step[0] - 1)), block)
    first = parts.first
    steps = {}
    for key, column in block.steps.items():
        known = column.is_valid().to_numpy(zero_copy_only=False)
        if key in (*SUMMED, "skipped"):
            merge = np.logical_or if key == "skipped" else np.add
            summed = merge.reduceat(column.fill_null(False if key == "skipped" else 0).to_numpy(zero_copy_only=False), first)
            steps[key] = pa.array(summed, column.type, mask=~np.logical_or.reduceat(known, first))
        else:
            steps[key] = column.take(pa.array(parts.last(known)))
    return replace(block, step=block.step[first], time=block.time[first], steps=steps, **parts.joined())


class Rows(Protocol):
    """What is known of the rows of some steps, or of parts of steps: arrays [n, ...]."""

    @property
    def values(self) -> Mapping[str, Array]: ...
    @property
    def stepped(self) -> Array: ...
    @property
    def lr(self) -> Array: ...
    @property
    def grad_state(self) -> Array: ...


class Parts:
    """How the parts in which some steps were recorded become one each: a number is the last one measured.

    A row that stepped stays as it was then, since a later part saw it after its step.

    Args:
        first: Where the parts of each step begin.
        rows: The parts.
    """

    def __init__(self, first: Array, rows: Rows) -> None:
        self.first = first
        self._rows = rows

    def last(self, known: Array) -> Array:
        """The position of the last part of each step in which something is known, of the first part where it never is: [n, ...]."""
        after = [1] * (known.ndim - 1)
        position = np.where(known, np.arange(len(known)).reshape(-1, *after), -1)
        found = np.maximum.reduceat(position, self.first)
        return np.where(found < 0, self.first.reshape(-1, *after), found)

    def joined(self) -> dict[str, Any]:
        """`values`, `stepped`, `lr` and `grad_state` of whole steps."""
        rows, values = self._rows, dict[str, Array]()
        stepped, stepping = np.logical_or.reduceat(rows.stepped, self.first), self.last(rows.stepped)
        if rows.values:
            measured = rows.values["count"] >= 0
            then = np.take_along_axis(measured, stepping[:, None], 0) & stepped[:, None]
            chosen = np.where(then, stepping[:, None], self.last(measured))
            values = {part: np.take_along_axis(array, chosen, 0) for part, array in rows.values.items()}
        states = np.where(stepped, stepping, self.last(rows.grad_state >= 0))
        return {
            "values": values,
            "stepped": stepped,
            "lr": np.take_along_axis(rows.lr, stepping, 0),
            "grad_state": np.take_along_axis(rows.grad_state, states, 0),
        }


def joined_record(earlier: Record, later: Record) -> Record:
    """The one record of a step that came in two parts of the same rows, as `one_per_step` has it in a block."""
    two = (earlier, later)
    stacked: dict[str, Any] = {name: np.stack([getattr(part, name) for part in two]) for name in ("stepped", "lr", "grad_state")}
    values = {part: np.stack([each.values[part] for each in two]) for part in later.values}
    joined = Parts(np.array([0]), replace(later, **stacked, values=values)).joined()
    steps = {**earlier.steps, **{key: value for key, value in later.steps.items() if value is not None}}
    for key in (*SUMMED, "skipped"):
        known = [part.steps[key] for part in two if part.steps.get(key) is not None]
        if known:
            steps[key] = any(known) if key == "skipped" else sum(known)
    whole: dict[str, Any] = {name: array[0] for name, array in joined.items() if name != "values"}
    whole["uses"] = {**earlier.uses, **later.uses}
    whole["histograms"] = dict(earlier.histograms)
    for kind, counts in later.histograms.items():
        before = earlier.histograms.get(kind, counts)
        whole["histograms"][kind] = np.where(counts >= 0, counts, before)
    return replace(later, time=earlier.time, steps=steps, values={part: array[0] for part, array in joined["values"].items()}, **whole)


def null_of(part: str) -> float:
    """What stands in an array for a part that was not measured."""
    return ABSENT if part == "count" else 0 if PARTS[part].integer else np.nan


def nulls(key: str, n: int) -> Any:
    """A column of `Block.steps` in which nothing is known."""
    return pa.nulls(n, STEP_COLUMNS.get(key, pa.bool_()))


def joined_steps(blocks: Sequence[Block]) -> dict[str, Any]:
    """The columns of `Block.steps` of all blocks, one after the other, in the widest type each has."""
    out = {}
    for key in dict.fromkeys(key for block in blocks for key in block.steps):
        kind = max((block.steps[key].type for block in blocks if key in block.steps), key=WIDENING.index)
        out[key] = pa.concat_arrays([block.steps.get(key, nulls(key, len(block.step))).cast(kind, safe=False) for block in blocks])
    return out
