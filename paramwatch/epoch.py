"""An epoch: the steps that one session recorded with one inventory, as they lie in two files, of which any part can be read as a block.

Between the files of the store and frames: which batches and columns a question is about, and in which order their lines come.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from paramwatch.arrowfile import ArrowFile, Batch
from paramwatch.block import Block, null_of, one_per_step
from paramwatch.columns import ABSENT, PARTS, Array, Pair, kinds_of
from paramwatch.format import column_of, inventory_of, lists_of
from paramwatch.record import Inventory

PER_ROW = {"stepped": (np.bool_, False), "lr": (np.float64, np.nan), "grad_state": (np.int8, ABSENT)}
"""What is kept of each row besides its parts: the type, and what stands for a null."""

FULL_RATE = "full_rate"
"""The note of a batch that was written late: `first last`, two steps between which none is missing."""

SAME = "same"
"""The note of a batch of steps on the batch of rows beside it: JSON, the columns that hold the same line throughout, with a number for the
line. Where two batches have the same number, the lines are the same."""

_Places: TypeAlias = Array | slice


@dataclass(frozen=True)
class Span:
    """Steps by number: from a start, before a stop, every so many."""

    start: int = 0
    stop: float = np.inf
    stride: int = 1

    def holds(self, step: Array) -> Array:
        """bool, for each of some steps."""
        held: Array = (step >= self.start) & (step < self.stop) & ((step - self.start) % self.stride == 0)
        return held


class Epoch:
    """The steps of one session with one inventory. Nothing but their numbers is read before it is asked for.

    Args:
        rows: Its two files. What is whole in both is there: they are apart by the batch that is being written.
        steps: The other one.
    """

    until: float = np.inf
    """From this step on, a later session has replaced what is here."""

    def __init__(self, rows: ArrowFile, steps: ArrowFile) -> None:
        self._rows, self._steps = rows, steps
        self.session = rows.metadata["session"]
        self.number, self.first_step = int(rows.metadata["epoch"]), int(rows.metadata["first_step"])
        noted = list(steps.batches(["step", "time"], range(min(len(rows), len(steps)))))
        read = [batch.columns for batch in noted]
        self._same: list[dict[str, int]] = [json.loads(batch.note.get(SAME, "{}")) for batch in noted]
        self._step, self._time = (_joined([batch[name].to_numpy() for batch in read]) for name in ("step", "time"))
        self._ends = np.cumsum([batch.num_rows for batch in read], dtype=np.int64)

    @property
    def inventory(self) -> Inventory:
        """What was recorded in it."""
        return inventory_of(self._rows.metadata)

    @cached_property
    def step(self) -> Array:
        """int64: the numbers of the steps, in order, each once."""
        step = self._step[self._order]
        return step[np.diff(step, prepend=step[:1] - 1) > 0]

    def block(
        self,
        layout: Collection[Pair] | None = None,
        rows: Sequence[int] | None = None,
        span: Span | None = None,
        *,
        per_row: Collection[str] = tuple(PER_ROW),
        keys: Collection[str] | None = None,
    ) -> Block:
        """Read some of it.

        Args:
            layout: Which parts of which kinds, None for all; those that are not recorded are left out.
            rows: The rows to read, as the last axis is to have them: positions in the inventory, some perhaps twice. None for all.
            span: Which steps. None for all.
            per_row: Which of `PER_ROW`; the others are null throughout.
            keys: Which columns of the steps, None for all; those that are not there are left out.
        """
        inventory = self.inventory
        pairs = tuple(pair for pair in inventory.layout if layout is None or pair in layout)
        lines = self._order if span is None else self._order[span.holds(self._step[self._order])]
        in_parts = (np.diff(self._step[lines]) == 0).any()
        # the parts of a step are put together by who stepped in each
        wanted = {name for name in PER_ROW if name in per_row or (in_parts and name == "stepped")}
        names = [*(column_of(*pair) for pair in pairs), *wanted]
        chosen = slice(None) if rows is None else as_range(np.asarray(rows, np.intp))
        fixed = {name: line[chosen] for name, line in self._fixed(names, lines).items()}
        out = _Arrays(pairs, wanted, len(lines), len(inventory.rows) if rows is None else len(rows), fixed)
        if others := [name for name in names if name not in fixed]:
            for batch, source, target in self._batches(self._rows, others, lines):
                out.fill(batch.columns, source, target, chosen)
        found = Block(
            inventory=replace(inventory, layout=pairs),
            step=self._step[lines],
            time=self._time[lines],
            values=out.values,
            steps=self._of_steps(lines, keys),
            **out.per_row,
        )
        return one_per_step(found)

    @cached_property
    def _order(self) -> Array:
        """Where the lines are that count: by step, and the parts of one step by time."""
        visible = np.flatnonzero(self._step < self.until)
        return visible[np.lexsort((self._time[visible], self._step[visible]))]

    def _fixed(self, names: Sequence[str], lines: Array) -> dict[str, Array]:
        """Those of some columns that hold the same line throughout, as it is found in the first batch: the others need not be looked at."""
        which = np.unique(np.searchsorted(self._ends, lines, side="right")).tolist()
        if len(which) == 0:
            return {}
        first, *rest = (self._same[i] for i in which)
        same = [name for name in names if name in first and all(first[name] == each.get(name) for each in rest)]
        if not same:
            return {}
        (batch,) = self._rows.batches(same, which[:1])
        return {name: lists_of(batch.columns[name].slice(0, 1), _null(name))[0] for name in same}

    def _of_steps(self, lines: Array, keys: Collection[str] | None) -> dict[str, Any]:
        names = [name for name in self._steps.schema.names if name not in ("step", "time") and (keys is None or name in keys)]
        read = list(self._batches(self._steps, names, lines)) if names else []
        if not read:
            return {name: pa.nulls(0, self._steps.schema.field(name).type) for name in names}
        order = np.empty(len(lines), np.int64)
        start = 0
        for batch, source, target in read:
            order[target] = np.arange(start, start + batch.columns.num_rows)[source]
            start += batch.columns.num_rows
        table = pa.Table.from_batches([batch.columns for batch, _, _ in read])
        found = {name: table[name].combine_chunks().take(pa.array(order)) for name in names}
        if FULL_RATE in found:
            found[FULL_RATE] = self._full_rate(found[FULL_RATE], self._step[lines])
        return found

    def _full_rate(self, known: Any, step: Array) -> Any:
        """Also where it turned out later that nothing is missing."""
        full = known.to_numpy(zero_copy_only=False).copy()
        for batch in self._steps.batches(["step"], range(len(self._ends))):
            if note := batch.note.get(FULL_RATE):
                first, last = map(int, note.split())
                full |= (step >= first) & (step <= last)
        return pa.array(full)

    def _batches(self, file: ArrowFile, columns: Sequence[str], lines: Array) -> Iterator[tuple[Batch, _Places, _Places]]:
        """The batches that hold these lines, with where in each they are, and where among the lines."""
        holds = np.searchsorted(self._ends, lines, side="right")
        targets = np.argsort(holds, kind="stable")
        which, starts = np.unique(holds[targets], return_index=True)
        for i, batch, target in zip(which, file.batches(columns, which.tolist()), np.split(targets, starts[1:]), strict=False):
            yield batch, as_range(lines[target] - (self._ends[i - 1] if i else 0)), as_range(target)


class NoSteps:
    """What stands for the epochs of a run that has none yet."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.step: Array = np.empty(0, np.int64)

    def block(
        self,
        layout: Collection[Pair] | None = None,
        rows: Sequence[int] | None = None,
        span: Span | None = None,
        *,
        per_row: Collection[str] = tuple(PER_ROW),
        keys: Collection[str] | None = None,
    ) -> Block:
        """As that of an `Epoch`."""
        pairs = tuple(pair for pair in self.inventory.layout if layout is None or pair in layout)
        out = _Arrays(pairs, PER_ROW, 0, len(self.inventory.rows) if rows is None else len(rows), {})
        nothing = np.empty(0)
        return Block(replace(self.inventory, layout=pairs), self.step, nothing, out.values, **out.per_row, steps={})


class _Arrays:
    """What is read of rows, filled batch by batch.

    Args:
        pairs: Parts of kinds.
        per_row: Which of `PER_ROW`.
        n: Lines.
        width: Rows.
        fixed: Columns that hold one line throughout, and are not filled. Where all kinds of a part do, its array is a view of that line.
    """

    def __init__(self, pairs: Sequence[Pair], per_row: Collection[str], n: int, width: int, fixed: Mapping[str, Array]) -> None:
        kinds = kinds_of(pairs)
        self._places = {column_of(*pair): (pair[1], kinds.index(pair[0])) for pair in pairs}
        self.values: dict[str, Array] = {}
        for part in dict.fromkeys(part for _, part in pairs):
            lines = np.full((len(kinds), width), null_of(part), PARTS[part].dtype)
            varied = []
            for name, (each, axis) in self._places.items():
                if each == part and name in fixed:
                    lines[axis] = fixed[name]
                elif each == part:
                    varied.append(axis)
            array = np.broadcast_to(lines, (n, *lines.shape))
            if varied:
                # the lines of one kind lie together
                array = np.empty((len(kinds), n, width), lines.dtype).swapaxes(0, 1)
                for axis in set(range(len(kinds))).difference(varied):
                    array[:, axis] = lines[axis]
            self.values[part] = array
        self.per_row: dict[str, Array] = {
            name: np.empty((n, width), kind)
            if name in per_row and name not in fixed
            else np.broadcast_to(fixed.get(name, np.array(null, kind)), (n, width))
            for name, (kind, null) in PER_ROW.items()
        }

    def fill(self, batch: Any, source: _Places, target: _Places, rows: _Places) -> None:
        """Take lines from a batch."""
        for name in batch.schema.names:
            part, axis = self._places.get(name, ("", 0))
            out = self.values[part][:, axis] if part else self.per_row[name]
            out[target] = lists_of(batch[name], _null(name))[source][:, rows]


def _null(column: str) -> Any:
    """What stands for a null in a column of rows."""
    return PER_ROW[column][1] if column in PER_ROW else null_of(column.rpartition(".")[2])


def as_range(places: Array) -> _Places:
    """The same positions, as a slice where they can be: that is a view."""
    if len(places) and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def _joined(arrays: Sequence[Array]) -> Array:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)
