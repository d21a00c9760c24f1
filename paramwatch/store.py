"""The store: the sink that keeps records, on disk or in memory, in the format that `contents` reads.

At the end of the pipe, and the single source of everything that is read later. A session appends Arrow IPC streams to a folder:
`<session>.<epoch>.rows.arrow` (one line a step, one list over all rows for each kind and part), `.steps.arrow` (what is known of the step
as a whole) and one `<session>.<name>.arrow` for each of the long `streams`. Neither torch nor pandas is needed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import IO, Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from paramwatch.batch import Batch, BatchSink
from paramwatch.block import STEP_COLUMNS
from paramwatch.columns import PARTS
from paramwatch.contents import VERSION
from paramwatch.contents import Contents as Contents
from paramwatch.contents import read as read
from paramwatch.folder import DiskFolder as DiskFolder
from paramwatch.folder import Folder as Folder
from paramwatch.folder import MemoryFolder as MemoryFolder
from paramwatch.format import rows_batch, rows_schema, steps_batch, steps_schema, widened
from paramwatch.record import Finding, Inventory, Record
from paramwatch.schedule import Schedule
from paramwatch.streams import LONG, Columns

BATCH_STEPS, BATCH_BYTES, BATCH_SECONDS = 256, 8_000_000, 5.0
"""A batch is written when it holds that much or is that old: a small step written alone costs many times its share."""

LONG_SHARE = 0.25
"""What each long stream may take of the bytes of a session."""


class Store(BatchSink):
    """The sink that keeps records, thinned by a schedule that is fixed at the session's first record.

    A step that the schedule drops is kept all the same where a row was stepped for the first time, or for the first time since a whole
    stride: an optimizer that steps in odd rounds only would otherwise vanish once the stride is even. All parts of a kept step are kept.

    Args:
        folder: Where to; nothing is made in it before records are written.
        max_bytes: What the first 2^20 steps of the session may take.
        session: Names the session's files and orders it among others; by default the time it starts (UTC), and the process.

    Raises:
        OSError: From any method, where the folder cannot be written.
    """

    def __init__(self, folder: Folder, *, max_bytes: int, session: str | None = None) -> None:
        self.session = session or f"{datetime.now(UTC):%Y%m%dT%H%M%S-%f}-{os.getpid()}"
        self.schedule: Schedule | None = None
        self._folder = folder
        self._max_bytes = max_bytes
        self._first_step = self._last = -1
        self._inventory: Inventory | None = None
        self._types: dict[str, Any] = {}
        # keys whose types do not depend on their values, and are among `_types`
        self._plain: Collection[str] = frozenset()
        self._epoch = -1
        self._streams: dict[str, _Stream] = {}
        self._waiting: list[Batch] = []
        self._steps_waiting = 0
        self._lines: dict[str, list[Any]] = {}
        self._line_bytes = 0
        self._thinned: dict[str, _Thinned] = {}
        self._since = 0.0
        # the background thread writes while a read may flush from any other
        self._lock = threading.RLock()

    def write(self, record: Record) -> None:
        """Take a record, and keep it if the schedule does."""
        with self._lock:
            if self.schedule is None:
                self.schedule, self._first_step = Schedule(_stored_bytes(record.inventory), self._max_bytes), record.step
            same = record.inventory is self._inventory or record.inventory == self._inventory
            if not same:
                self._begin(record.inventory, widened(self._types, record.steps))
                self._kept = np.full(len(record.stepped), np.iinfo(np.int64).min // 2)
            alone = Batch.of(record)
            self._keep(alone, self._chosen(alone, self.schedule, always=not same))
            for name, stream in LONG.items():
                if lines := stream.lines(record):
                    self._keep_lines(name, record.step, lines)

    def write_batch(self, batch: Batch) -> None:
        """Take the records of a batch, and keep those that the schedule does."""
        with self._lock:
            if self.schedule is not None:
                self._keep(batch, self._chosen(batch, self.schedule))

    def find(self, findings: Iterable[Finding]) -> None:
        """Take what the rules said."""
        with self._lock:
            for finding in findings:
                said = {key: [value] for key, value in vars(finding).items() if key != "step"}
                self._add_lines("findings", LONG["findings"].batch(finding.step, said))

    def tick(self) -> None:
        """Write what has waited for 5 seconds. To be called about every second."""
        with self._lock:
            if time.monotonic() - self._since >= BATCH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what was handed over; any process can read it afterwards."""
        with self._lock:
            self._write_records()
            self._write_lines()

    def close(self) -> None:
        """Write what is left, and close the files."""
        with self._lock:
            try:
                self.flush()
            finally:
                self._close(*self._streams)

    def _begin(self, inventory: Inventory, types: dict[str, Any]) -> None:
        """Further files, for steps of another inventory or with other columns."""
        self._write_records()
        self._close("rows", "steps")
        self._inventory, self._types, self._epoch = inventory, types, self._epoch + 1
        label = _label(self.session, self._first_step) | {"epoch": str(self._epoch)}
        self._schemas = rows_schema(inventory, label), steps_schema(types, label)
        # a batch is written as soon as it holds that many bytes
        self._most_steps = max(1, min(BATCH_STEPS, -(-BATCH_BYTES // max(1, _raw_bytes(inventory)))))

    def _chosen(self, batch: Batch, schedule: Schedule, always: bool = False) -> list[int]:
        """Which steps are kept."""
        latest = self._kept[batch.stepped]
        # the row that has waited longest decides; where no row stepped, none does
        oldest = int(latest.min()) if len(latest) else None
        chosen = []
        for i, step in enumerate(batch.step):
            due = oldest is not None and step - oldest >= schedule.stride(step)
            if always or due or step == self._last or schedule.keeps(step):
                chosen.append(i)
                self._last, oldest = step, None if oldest is None else step
        if chosen:
            self._kept[batch.stepped] = self._last
        return chosen

    def _keep(self, batch: Batch, chosen: Sequence[int]) -> None:
        start = 0
        for end, i in enumerate(chosen):
            if batch.steps[i].keys() == self._plain:
                continue
            types, keys = widened(self._types, batch.steps[i]), frozenset(batch.steps[i])
            self._plain = keys if keys <= STEP_COLUMNS.keys() else frozenset()
            if types != self._types and self._inventory is not None:
                self._wait(batch, chosen[start:end])
                self._begin(self._inventory, types)
                start = end
        self._wait(batch, chosen[start:])

    def _wait(self, batch: Batch, chosen: Sequence[int]) -> None:
        """Hold steps until they are many."""
        while chosen:
            room = self._most_steps - self._steps_waiting
            self._wait_since_now()
            self._waiting.append(batch.at(chosen[:room]))
            self._steps_waiting += len(self._waiting[-1])
            if self._steps_waiting >= self._most_steps:
                self._write_records()
            chosen = chosen[room:]

    def _keep_lines(self, name: str, step: int, columns: Columns) -> None:
        """Lines of a step, unless there are too many steps of them already."""
        batch = LONG[name].batch(step, columns)
        if name not in self._thinned:
            self._thinned[name] = _Thinned(Schedule(batch.nbytes, self._max_bytes * LONG_SHARE))
        if self._thinned[name].keeps(step):
            self._add_lines(name, batch)

    def _add_lines(self, name: str, batch: Any) -> None:
        self._wait_since_now()
        self._lines.setdefault(name, []).append(batch)
        self._line_bytes += batch.nbytes
        if self._line_bytes >= BATCH_BYTES:
            self._write_lines()

    def _write_lines(self) -> None:
        waiting, self._lines, self._line_bytes = self._lines, {}, 0
        for name, batches in waiting.items():
            first = batches[0]["step"][0].as_py() if self.schedule is None else self._first_step
            lines = pa.Table.from_batches(batches).replace_schema_metadata(_label(self.session, first)).combine_chunks()
            self._append(name, f"{self.session}.{name}", lines.to_batches()[0])

    def _wait_since_now(self) -> None:
        if not self._waiting and not self._lines:
            self._since = time.monotonic()

    def _write_records(self) -> None:
        batches, self._waiting, self._steps_waiting = self._waiting, [], 0
        if batches and self.schedule is not None:
            rows, steps = self._schemas
            name = f"{self.session}.{self._epoch}"
            self._append("rows", f"{name}.rows", rows_batch(batches, rows))
            self._append("steps", f"{name}.steps", steps_batch(batches, steps, self.schedule))

    def _append(self, kind: str, name: str, batch: Any) -> None:
        if kind not in self._streams:
            self._streams[kind] = _Stream(self._folder.create(name), batch.schema)
        self._streams[kind].append(batch)

    def _close(self, *kinds: str) -> None:
        with ExitStack() as streams:
            for kind in kinds:
                if kind in self._streams:
                    streams.callback(self._streams.pop(kind).close)


class _Thinned:
    """Which of the steps that have lines of one kind are kept: a schedule of their ordinals, since they may be rare already."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._ordinal = self._step = -1

    def keeps(self, step: int) -> bool:
        """To be asked in order, once for each record; the parts of one step are kept or dropped together."""
        if step != self._step:
            self._step, self._ordinal = step, self._ordinal + 1
        return self._schedule.keeps(self._ordinal)


class _Stream:
    def __init__(self, file: IO[bytes], schema: Any) -> None:
        self._file = file
        self._writer = ipc.new_stream(file, schema, options=ipc.IpcWriteOptions(compression="lz4"))

    def append(self, batch: Any) -> None:
        self._writer.write_batch(batch)
        self._file.flush()

    def close(self) -> None:
        with self._file:
            self._writer.close()


def _label(session: str, first_step: int) -> dict[str, str]:
    return {"format": "paramwatch", "version": str(VERSION), "session": session, "first_step": str(first_step)}


def _raw_bytes(inventory: Inventory) -> int:
    return 8 * len(inventory.rows) * len(inventory.layout)


def _stored_bytes(inventory: Inventory) -> float:
    """What a step takes on disk: noise does not compress, counts hardly change."""
    return len(inventory.rows) * sum(1 if (held := PARTS[part]).integer else np.dtype(held.dtype).itemsize for _, part in inventory.layout)
