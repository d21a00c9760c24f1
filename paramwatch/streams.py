"""Long streams: what of a step takes several lines, each a file of its own beside the rows: findings, and what is measured now and then.

To add one: an entry in `LONG`. The store then writes `<session>.<name>.arrow`, and `Contents.lines[name]` has its lines, those of replaced
steps hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from paramwatch import histograms, uselines
from paramwatch.globs import text
from paramwatch.record import Record
from paramwatch.schedule import Schedule

Columns: TypeAlias = Mapping[str, Sequence[Any] | Any]
"""Name -> values, a list or an array, of NumPy or of Arrow, all of one length: the columns of some lines without `step`."""


def _nothing(_: Record) -> Columns | None:
    return None


@dataclass(frozen=True)
class LongStream:
    """One kind of lines. A record that has any comes to the store alone: a `Batch` has none."""

    schema: Any
    """Its columns: the first is `step`, int64; plain and list types only, no dictionaries."""
    lines: Callable[[Record], Columns | None] = _nothing
    """What a record has for it; nothing, or None, where it has nothing."""

    def batch(self, step: int, columns: Columns) -> Any:
        """The lines of one step in Arrow."""
        n = len(next(iter(columns.values())))
        given = {"step": np.full(n, step), **columns}
        return pa.RecordBatch.from_arrays([_array(given[field.name], field.type) for field in self.schema], schema=self.schema)


LONG: dict[str, LongStream] = {
    "findings": LongStream(pa.schema([("step", pa.int64()), ("rule", pa.string()), ("parameter", pa.string()), ("message", pa.string())])),
    "histograms": LongStream(histograms.SCHEMA, histograms.lines_of),
    "uses": LongStream(uselines.SCHEMA, uselines.lines_of),
}
"""Every long stream by the name of its files."""


class Lines:
    """The lines that wait to be written, thinned where there are too many steps of them.

    Args:
        max_bytes: What one stream may take, over 2^20 steps that have lines for it.
    """

    bytes = 0
    """How much waits."""

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes = max_bytes
        self._waiting: dict[str, list[Any]] = {}
        self._thinned: dict[str, _Thinned] = {}

    def take(self, record: Record) -> int:
        """Take what a record has; gives how many bytes wait now."""
        for name, stream in LONG.items():
            if columns := stream.lines(record):
                batch = stream.batch(record.step, columns)
                if name not in self._thinned:
                    self._thinned[name] = _Thinned(Schedule(batch.nbytes, self._max_bytes), batch.nbytes)
                if self._thinned[name].keeps(record.step):
                    self._hold(name, batch)
        return self.bytes

    def add(self, name: str, step: int, columns: Columns) -> None:
        """Take lines that are never too many."""
        self._hold(name, LONG[name].batch(step, columns))

    def taken(self) -> Iterator[tuple[str, Any]]:
        """Give up everything: the name of each stream, and its lines as one batch."""
        waiting, self._waiting, self.bytes = self._waiting, {}, 0
        for name, batches in waiting.items():
            yield name, pa.Table.from_batches(batches).combine_chunks().to_batches()[0]

    def within(self, max_bytes: float) -> None:
        """Thin further: from now on a stream may take no more than that."""
        self._max_bytes = max_bytes
        for thinned in self._thinned.values():
            thinned.schedule = Schedule(thinned.size, max_bytes)

    def clear(self) -> None:
        """Forget everything."""
        self._waiting, self.bytes = {}, 0

    def _hold(self, name: str, batch: Any) -> None:
        self._waiting.setdefault(name, []).append(batch)
        self.bytes += batch.nbytes


class _Thinned:
    """Which of the steps that have lines of one kind are kept: a schedule of their ordinals, since they may be rare already."""

    def __init__(self, schedule: Schedule, size: int) -> None:
        self.schedule, self.size = schedule, size
        self._ordinal = self._step = -1

    def keeps(self, step: int) -> bool:
        """To be asked in order, once for each record; the parts of one step are kept or dropped together."""
        if step != self._step:
            self._step, self._ordinal = step, self._ordinal + 1
        return self.schedule.keeps(self._ordinal)


def _array(values: Any, kind: Any) -> Any:
    if isinstance(values, pa.Array):
        return values
    if pa.types.is_string(kind):
        values = [None if value is None else text(value) for value in values]
    return pa.array(values, kind)
