"""Long streams: what of a step takes several lines, each a file of its own beside the rows: findings, and what is measured now and then.

To add one: an entry in `LONG`. The store then writes `<session>.<name>.arrow`, and `Contents.lines[name]` has its lines, those of replaced
steps hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from paramwatch import histograms
from paramwatch.record import Record

Columns: TypeAlias = Mapping[str, Sequence[Any] | Any]
"""Name -> values, a list or an array, all of one length: the columns of some lines without `step`."""


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
}
"""Every long stream by the name of its files."""


def text(given: str) -> str:
    """The same, with what no Unicode text can hold (half a surrogate pair) written out."""
    return given.encode("utf-8", "backslashreplace").decode()


def _array(values: Any, kind: Any) -> Any:
    if pa.types.is_string(kind):
        values = [None if value is None else text(value) for value in values]
    return pa.array(values, kind)
