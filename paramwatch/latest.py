"""The latest steps that the schedule of a store did not keep, in case they are wanted after all: before a failure, and at the end.

A ring: Arrow batches, compressed as in the files, the oldest of which go when there are too many bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from paramwatch.arrowfile import OPTIONS
from paramwatch.batch import Batch
from paramwatch.columns import NON_FINITE

FINITE_STEPS = 100
"""So many steps have to be finite for the first that is not to be news."""


@dataclass(frozen=True)
class _Held:
    last: int
    """The number of its last step."""
    pair: tuple[Any, Any]
    """Rows and steps, each an IPC stream of one batch."""
    note: dict[str, str]

    @property
    def size(self) -> int:
        return sum(buffer.size for buffer in self.pair)


class Latest:
    """Holds so many bytes, and what was added in the last two times whatever it takes; nothing where there are none."""

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        """May be changed; it holds with the next steps that are added."""
        self._held: deque[_Held] = deque()
        self._bytes = 0
        self._gone = -1

    @property
    def start(self) -> int:
        """The step after the last one that was forgotten: from there on, all are held or were taken."""
        return self._gone + 1

    def add(self, rows: Any, steps: Any, note: dict[str, str]) -> None:
        """Take some steps, as batches of both files, with something to know about them."""
        held = _Held(steps["step"][-1].as_py(), (_packed(rows), _packed(steps)), note)
        self._held.append(held)
        self._bytes += held.size
        # what is added last of all may be a single step
        while self._bytes > self.max_bytes and len(self._held) > min(2, self.max_bytes):
            self._forget()

    def clear(self) -> None:
        """Forget everything."""
        while self._held:
            self._forget()

    def taken(self, steps_schema: Any) -> Iterator[tuple[Any, Any, dict[str, str]]]:
        """Give up everything, in order: rows; steps, with the columns of a schema; the note."""
        while self._held:
            held = self._held.popleft()
            rows, steps = map(_unpacked, held.pair)
            yield rows, _with_columns(steps, steps_schema), held.note
        self._bytes = 0

    def _forget(self) -> None:
        held = self._held.popleft()
        self._bytes -= held.size
        self._gone = held.last


class Alarm:
    """Hears when a run that was finite no longer is."""

    def __init__(self) -> None:
        self._finite = 0
        self._any = self._news = False

    def heard(self, batch: Batch) -> tuple[int, bool] | None:
        """Where in a batch there is the first step of all that is not finite, or the first that comes after many finite ones, once.

        What comes after it in the batch has to be heard again.

        Not finite is a step with such an element in a parameter or gradient; one that a `GradScaler` skipped is not looked at.

        Returns:
            Its position, and whether it came after many finite ones. None if there is nothing to say.
        """
        if self._news:
            return None
        if batch.finite:
            self._finite += len(batch) - sum(map(bool, batch.known("skipped")))
            return None
        axes = [i for i, kind in enumerate(batch.inventory.kinds) if kind in ("param", "grad")]
        bad = np.any([(batch.values[part][:, axes] > 0).any((1, 2)) for part in NON_FINITE], 0)
        for i, (spoilt, skipped) in enumerate(zip(bad.tolist(), batch.known("skipped"), strict=True)):
            if skipped:
                continue
            if spoilt and not self._news and (not self._any or self._finite >= FINITE_STEPS):
                self._any, self._news = True, self._finite >= FINITE_STEPS
                self._finite = 0
                return i, self._news
            self._finite = 0 if spoilt else self._finite + 1
        return None


def _packed(batch: Any) -> Any:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema.remove_metadata(), options=OPTIONS) as stream:
        stream.write_batch(batch.replace_schema_metadata())
    return sink.getvalue()


def _unpacked(packed: Any) -> Any:
    return ipc.open_stream(packed).read_next_batch()


def _with_columns(steps: Any, schema: Any) -> Any:
    columns = [
        steps[field.name].cast(field.type) if field.name in steps.schema.names else pa.nulls(steps.num_rows, field.type) for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
