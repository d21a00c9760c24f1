"""A block: many steps of one inventory, as arrays; and its form in Arrow, written and read side by side.

What the store keeps and frames are made of. Neither torch nor pandas is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paramwatch.batch import Batch
from paramwatch.columns import ABSENT, PARTS, Array
from paramwatch.record import Inventory, Record, Row, TieGroup
from paramwatch.schedule import Schedule

STEP_COLUMNS: Mapping[str, Any] = {
    "skipped": pa.bool_(),
    "amp_scale": pa.float64(),
    "evaluations": pa.int64(),
    "backwards": pa.int64(),
    "update_mode": pa.string(),
    "overhead_us": pa.float64(),
    "epoch": pa.int64(),
    "batch_idx": pa.int64(),
    "global_step": pa.int64(),
}
"""Types of the known keys of `Record.steps`; those of other keys follow from their values."""

SUMMED = ("evaluations", "backwards", "overhead_us")
"""Keys of `Record.steps` that add up over the parts of a step."""

_OWN = ("step", "time", "full_rate")
_MAKE: Mapping[Any, type] = {pa.bool_(): bool, pa.int64(): int, pa.float64(): float, pa.string(): str}
_WIDENING = tuple(_MAKE)


@dataclass(frozen=True)
class Block:
    """Steps with one inventory, in order. Arrays are shaped [n, ...], n steps."""

    inventory: Inventory
    session: str
    epoch: int
    first_step: int
    """The step its session started with."""
    step: Array
    """int64 [n], each number once."""
    time: Array
    """float64 [n], seconds since the epoch."""
    values: Mapping[str, Array]
    """Part -> [n, kinds, rows], as in `Record.values`."""
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
        rows = self._rows
        measured, stepped = rows.values["count"] >= 0, np.logical_or.reduceat(rows.stepped, self.first)
        stepping = self.last(rows.stepped)
        then = np.take_along_axis(measured, stepping[:, None], 0) & stepped[:, None]
        chosen = np.where(then, stepping[:, None], self.last(measured))
        states = np.where(stepped, stepping, self.last(rows.grad_state >= 0))
        return {
            "values": {part: np.take_along_axis(array, chosen, 0) for part, array in rows.values.items()},
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
        kind = max((block.steps[key].type for block in blocks if key in block.steps), key=_WIDENING.index)
        out[key] = pa.concat_arrays([block.steps.get(key, nulls(key, len(block.step))).cast(kind, safe=False) for block in blocks])
    return out


# ---- the Arrow form, written ----------------------------------------------------------------


def rows_schema(inventory: Inventory, label: Mapping[str, str]) -> Any:
    """One list over all rows for each kind and part; the inventory is in the metadata."""
    fields = [pa.field("step", pa.int64())]
    for kind, part in inventory.layout:
        item = pa.from_numpy_dtype(PARTS[part].dtype)
        fields.append(pa.field(f"{kind}.{part}", pa.list_(item, len(inventory.rows)), metadata={"kind": kind, "part": part}))
    for name, item in (("stepped", pa.bool_()), ("lr", pa.float64()), ("grad_state", pa.int8())):
        fields.append(pa.field(name, pa.list_(item, len(inventory.rows))))
    described = {
        "rows": [vars(row) for row in inventory.rows],
        "names": inventory.names,
        "ties": [vars(tie) for tie in inventory.ties],
        "layout": inventory.layout,
    }
    return pa.schema(fields, {**label, "model": inventory.model, "inventory": json.dumps(described)})


def rows_batch(batches: Sequence[Batch], schema: Any) -> Any:
    """The rows of some steps; what was not measured is null."""
    inventory = batches[0].inventory

    def column(kind: str, part: str) -> Array:
        return np.concatenate([batch.values[part][:, inventory.kinds.index(kind)] for batch in batches])

    lr, state = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("lr", "grad_state"))
    stepped = np.concatenate([np.broadcast_to(batch.stepped, batch.lr.shape) for batch in batches])
    absent = {kind: column(kind, "count") < 0 for kind in inventory.kinds}
    lists = [(column(*pair), absent[pair[0]]) for pair in inventory.layout]
    lists += [(stepped, np.zeros_like(stepped)), (lr, np.isnan(lr)), (state, state < 0)]
    columns = [pa.array([step for batch in batches for step in batch.step], pa.int64())]
    for field, (array, null) in zip(list(schema)[1:], lists, strict=True):
        items = pa.array(array.ravel(), field.type.value_type, mask=null.ravel() if null.any() else None)
        columns.append(pa.FixedSizeListArray.from_arrays(items, len(inventory.rows)))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def steps_schema(types: Mapping[str, Any], label: Mapping[str, str]) -> Any:
    """One column for each key of `Record.steps`."""
    own = {"step": pa.int64(), "time": pa.float64(), "full_rate": pa.bool_()}
    return pa.schema([pa.field(key, kind) for key, kind in (own | dict(types)).items()], dict(label))


def steps_batch(batches: Sequence[Batch], schema: Any, schedule: Schedule) -> Any:
    """What is known of some steps as a whole; a key that a record lacks is null."""
    of_each = [each for batch in batches for each in zip(batch.steps, batch.step, batch.time, strict=True)]
    found = [{**steps, "step": step, "time": time, "full_rate": schedule.full_rate(step)} for steps, step, time in of_each]
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        make = _MAKE[kind]
        columns.append(pa.array([None if (value := steps.get(name)) is None else make(value) for steps in found], kind))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def widened(types: Mapping[str, Any], steps: Mapping[str, Any]) -> dict[str, Any]:
    """Column types that hold these values too: a column once there stays, and its type changes only to a wider one."""
    out = dict(types)
    for key, value in steps.items():
        if key in STEP_COLUMNS:
            out[key] = STEP_COLUMNS[key]
        elif value is not None and key not in _OWN:
            plain = value.item() if isinstance(value, np.generic) else value
            kind = next((kind for kind in _WIDENING if isinstance(plain, _MAKE[kind])), pa.string())
            out[key] = max(kind, out.get(key, kind), key=_WIDENING.index)
    return out


# ---- the Arrow form, read -------------------------------------------------------------------


def block_of(rows: Any, steps: Any) -> Block:
    """A block from the tables of its two files, which have as many lines."""
    n, metadata = rows.num_rows, {key.decode(): value.decode() for key, value in rows.schema.metadata.items()}
    inventory = _inventory(metadata["model"], json.loads(metadata["inventory"]))

    def lists(name: str, fill: Any) -> Array:
        column: Array = pc.list_flatten(rows[name]).fill_null(fill).to_numpy().reshape(n, len(inventory.rows))
        return column

    shape = (n, len(inventory.kinds), len(inventory.rows))
    fills = {part: null_of(part) for _, part in inventory.layout}
    values = {part: np.full(shape, fill, PARTS[part].dtype) for part, fill in fills.items()}
    for field in rows.schema:
        if field.metadata:
            kind, part = field.metadata[b"kind"].decode(), field.metadata[b"part"].decode()
            values[part][:, inventory.kinds.index(kind)] = lists(field.name, fills[part])
    return Block(
        inventory=inventory,
        session=metadata["session"],
        epoch=int(metadata["epoch"]),
        first_step=int(metadata["first_step"]),
        step=rows["step"].to_numpy(),
        time=steps["time"].to_numpy(),
        values=values,
        stepped=lists("stepped", False),
        lr=lists("lr", np.nan),
        grad_state=lists("grad_state", ABSENT),
        steps={key: steps[key].combine_chunks() for key in steps.column_names if key not in ("step", "time")},
    )


def empty_block(inventory: Inventory) -> Block:
    """A block without steps."""
    rows, steps = rows_schema(inventory, {"session": "", "epoch": "0", "first_step": "0"}), steps_schema({}, {})
    return block_of(rows.empty_table(), steps.empty_table())


def _inventory(model: str, found: Mapping[str, Any]) -> Inventory:
    return Inventory(
        rows=tuple(Row(**row | {"aliases": tuple(row["aliases"]), "shape": tuple(row["shape"])}) for row in found["rows"]),
        names=tuple((name, row) for name, row in found["names"]),
        ties=tuple(TieGroup(**tie | {"names": tuple(tie["names"])}) for tie in found["ties"]),
        layout=tuple((kind, part) for kind, part in found["layout"]),
        model=model,
    )
