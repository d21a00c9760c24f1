"""The form of steps in Arrow, written and read side by side: which columns there are, and the inventory in the schema's metadata.

Between records or blocks and the files of the store; `docs/format.md` describes it for others. Neither torch nor pandas is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from paramwatch.batch import Batch
from paramwatch.block import STEP_COLUMNS, WIDENING
from paramwatch.columns import NON_FINITE, PARTS, Array
from paramwatch.globs import text
from paramwatch.record import Inventory, Row, TieGroup

_OWN = ("step", "time", "full_rate")
_MAKE: Mapping[Any, type] = {pa.bool_(): bool, pa.int64(): int, pa.float64(): float, pa.string(): str}


# ---- written ----------------------------------------------------------------


def rows_schema(inventory: Inventory) -> Any:
    """One list over all rows for each kind and part; the inventory is in the metadata."""
    fields = [pa.field("step", pa.int64())]
    for kind, part in inventory.layout:
        item = pa.from_numpy_dtype(PARTS[part].dtype)
        fields.append(pa.field(column_of(kind, part), pa.list_(item, len(inventory.rows)), metadata={"kind": kind, "part": part}))
    for name, item in (("stepped", pa.bool_()), ("lr", pa.float64()), ("grad_state", pa.int8())):
        fields.append(pa.field(name, pa.list_(item, len(inventory.rows))))
    described = {
        # column by column, which is half as long as row by row
        "rows": {field.name: [getattr(row, field.name) for row in inventory.rows] for field in fields_of(Row)},
        "names": [[name for name, _ in inventory.names], [row for _, row in inventory.names]],
        "ties": [vars(tie) for tie in inventory.ties],
        "layout": inventory.layout,
    }
    # escapes keep what is no Unicode text
    return pa.schema(fields, {"model": text(inventory.model), "inventory": json.dumps(described, separators=(",", ":"))})


def column_of(kind: str, part: str) -> str:
    """What a column of the rows is called."""
    return f"{kind}.{part}"


class RowsWriter:
    """Makes the rows of some steps of one inventory, in memory that is used again: what it gave is good until it is asked for the next.

    New memory of megabytes is most of the cost of a batch: the system fills it with zeros page by page.
    """

    same: dict[str, int]
    """Of the latest batch, the columns that hold the same line in each of its steps, with a number for that line: a later batch has the
    same number if its line is the same too. Counts, rates and states nearly always are, and a reader looks at one of many batches."""

    def __init__(self, inventory: Inventory) -> None:
        self.schema = rows_schema(inventory)
        self._inventory = inventory
        self._room: dict[str, Array] = {}
        self._known: dict[str, _Line] = {}

    def batch(self, batches: Sequence[Batch]) -> Any:
        """The rows of some steps; what was not measured is null."""
        inventory, n = self._inventory, sum(map(len, batches))
        self.same = {}
        made: dict[str, Any] = {}
        # then the three counts that say so need no look of their own
        finite = all(batch.finite for batch in batches)
        for kind in inventory.kinds:
            axis = inventory.kinds.index(kind)
            parts = [part for of, part in inventory.layout if of == kind]
            # where a count says that nothing was measured there is a null
            absent, beside = self._absent(kind, [batch.values["count"][:, axis] for batch in batches])
            for part in parts:
                name = column_of(kind, part)
                pieces = [batch.values[part][:, axis] for batch in batches]
                made[name] = self._column(name, n, pieces, absent, beside, finite and part in NON_FINITE)
        for name, null in (("stepped", None), ("lr", np.isnan), ("grad_state", lambda state: state < 0)):
            pieces = [np.broadcast_to(getattr(batch, name), batch.lr.shape) for batch in batches]
            made[name] = self._column(name, n, pieces, null, -1)
        step = pa.array([step for batch in batches for step in batch.step], pa.int64())
        return pa.RecordBatch.from_arrays([step, *(made[name] for name in self.schema.names[1:])], schema=self.schema)

    def _absent(self, kind: str, counts: Sequence[Array]) -> tuple[Callable[[Array], Array] | None, int | None]:
        """Where nothing was measured of a kind, and the number of its count's line, None where that changes."""
        name = column_of(kind, "count")
        known = self._known.get(name)
        absent: Array | None
        if known is not None and known.fits(counts, -1):
            self.same[name] = known.number
            absent = None if known.whole else known.line < 0
        else:
            together = np.concatenate(counts)
            self._look(name, together, -1)
            absent = together < 0 if (together < 0).any() else None
        return (None if absent is None else lambda array: np.broadcast_to(absent, array.shape)), self.same.get(name)

    def _column(
        self,
        name: str,
        n: int,
        pieces: Sequence[Array],
        null: Callable[[Array], Array] | None,
        beside: int | None,
        zeros: bool = False,
    ) -> Any:
        known = self._known.get(name)
        # of a count it is known already
        if known is not None and (name in self.same or (beside is not None and known.fits(pieces, beside, zeros))):
            # what was there is there still
            self.same[name] = known.number
            # a slice would have the buffers of the whole, and their checksum
            if known.made is None or len(known.made) != n:
                known.made = self._arrow(name, np.broadcast_to(known.line, (n, len(known.line))).copy(), null)
            return known.made
        room = self._room.get(name)
        if room is None or len(room) < n:
            room = self._room[name] = np.empty((n, len(self._inventory.rows)), pieces[0].dtype)
        array = np.concatenate(pieces, out=room[:n])
        if beside is not None:
            self._look(name, array, beside)
        return self._arrow(name, array, null)

    def _look(self, name: str, array: Array, beside: int) -> None:
        """Look whether a column holds one line throughout, and remember that."""
        lines = _bits(array)
        if array.shape[1] and (lines[0, 0] != lines[-1, 0] or not (lines == lines[0]).all()):
            return
        known = self._known.get(name)
        if known is None or known.beside != beside or not np.array_equal(_bits(known.line), lines[0]):
            known = self._known[name] = _Line(array[0].copy(), beside, -1 if known is None else known.number)
            known.number += 1
        self.same[name] = known.number

    def _arrow(self, name: str, array: Array, null: Callable[[Array], Array] | None) -> Any:
        mask = None if null is None else null(array)
        kind = self.schema.field(name).type
        items = pa.array(array.ravel(), kind.value_type, mask=mask.ravel() if mask is not None and mask.any() else None)
        return pa.FixedSizeListArray.from_arrays(items, len(self._inventory.rows))


@dataclass
class _Line:
    """What a column held throughout when it last did."""

    line: Array
    beside: int
    """The number of the line of the count beside it, -1 where there is none."""
    number: int
    made: Any = None
    """Many such lines in Arrow."""

    def __post_init__(self) -> None:
        self.whole = not (self.line < 0).any()
        self._zeros = not self.line.any()
        self._bits = _bits(self.line)
        self._first = self._bits[:1].tolist()

    def fits(self, pieces: Sequence[Array], beside: int, zeros: bool = False) -> bool:
        """Whether these lines are all like it, to the bit; with `zeros` they are known to be nothing else."""
        if self.beside != beside:
            return False
        if zeros:
            return self._zeros
        # what is noise differs in the first number already
        return all(bits[0, :1].tolist() == self._first and bool((bits == self._bits).all()) for bits in map(_bits, pieces))


def _bits(array: Array) -> Array:
    """NaN is equal to itself."""
    return array.view(f"i{array.itemsize}") if array.dtype.kind == "f" else array


def steps_schema(types: Mapping[str, Any]) -> Any:
    """One column for each key of `Record.steps`."""
    own = {"step": pa.int64(), "time": pa.float64(), "full_rate": pa.bool_()}
    return pa.schema([pa.field(key, kind) for key, kind in (own | dict(types)).items()])


def steps_batch(batches: Sequence[Batch], schema: Any, full_rate: Callable[[int], bool]) -> Any:
    """What is known of some steps as a whole; a key that a record lacks is null."""
    numbers = [step for batch in batches for step in batch.step]
    times = [time for batch in batches for time in batch.time]
    own: dict[str, Sequence[Any]] = {"step": numbers, "time": times, "full_rate": [*map(full_rate, numbers)]}
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        values = own[name] if name in own else [value for batch in batches for value in batch.known(name)]
        columns.append(pa.array(_made(values, _MAKE[kind]), kind))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _made(values: Sequence[Any], make: type) -> Sequence[Any]:
    """Values of one type, or None."""
    kinds = {*map(type, values)} - {type(None)}
    if make is str and kinds == {str}:
        # few in number, most often one
        as_text = {value: text(value) for value in {*values} - {None}}
        return [as_text.get(value) for value in values]
    if kinds <= {make} - {str}:
        return values
    return [None if value is None else text(str(value)) if make is str else make(value) for value in values]


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


# ---- read -----------------------------------------------------------------------------------


def inventory_of(metadata: Mapping[str, str]) -> Inventory:
    """The inventory in the metadata of a file of rows."""
    return _inventory(metadata["model"], metadata["inventory"])


# a run that is read again and again has the same few inventories each time, and they are long
@lru_cache(maxsize=4)
def _inventory(model: str, described: str) -> Inventory:
    found = json.loads(described)
    rows = found["rows"]
    rows |= {name: map(tuple, rows[name]) for name in ("aliases", "shape")}
    names = [field.name for field in fields_of(Row)]
    return Inventory(
        rows=tuple(Row(*row) for row in zip(*(rows[name] for name in names), strict=True)),
        names=tuple(zip(*found["names"], strict=True)),
        ties=tuple(TieGroup(**tie | {"names": tuple(tie["names"])}) for tie in found["ties"]),
        layout=tuple((kind, part) for kind, part in found["layout"]),
        model=model,
    )


def lists_of(column: Any, fill: Any) -> Array:
    """A column of lists of one length as an array [n, length], with this in place of nulls."""
    items = column.flatten()
    if items.null_count:
        items = items.fill_null(fill)
    array: Array = items.to_numpy(zero_copy_only=False)
    return array.reshape(len(column), column.type.list_size)
