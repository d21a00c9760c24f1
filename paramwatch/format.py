"""The form of steps in Arrow, written and read side by side: which columns there are, and the inventory in the schema's metadata.

Between records or blocks and the files of the store; `docs/format.md` describes it for others. Neither torch nor pandas is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paramwatch.batch import Batch
from paramwatch.block import STEP_COLUMNS, WIDENING, Block, null_of
from paramwatch.columns import ABSENT, PARTS, Array
from paramwatch.record import Inventory, Row, TieGroup
from paramwatch.schedule import Schedule
from paramwatch.streams import text

_OWN = ("step", "time", "full_rate")
_MAKE: Mapping[Any, type] = {pa.bool_(): bool, pa.int64(): int, pa.float64(): float, pa.string(): str}


# ---- written ----------------------------------------------------------------


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
        make = _string if pa.types.is_string(kind) else _MAKE[kind]
        columns.append(pa.array([None if (value := steps.get(name)) is None else make(value) for steps in found], kind))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _string(value: object) -> str:
    return text(str(value))


def widened(types: Mapping[str, Any], steps: Mapping[str, Any]) -> dict[str, Any]:
    """Column types that hold these values too: a column once there stays, and its type changes only to a wider one."""
    out = dict(types)
    for key, value in steps.items():
        if key in STEP_COLUMNS:
            out[key] = STEP_COLUMNS[key]
        elif value is not None and key not in _OWN:
            plain = value.item() if isinstance(value, np.generic) else value
            kind = next((kind for kind in WIDENING if isinstance(plain, _MAKE[kind])), pa.string())
            out[key] = max(kind, out.get(key, kind), key=WIDENING.index)
    return out


# ---- read -------------------------------------------------------------------


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
