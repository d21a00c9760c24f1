"""The store: the one format in which records are kept, on disk or in memory, its writer and its reader side by side.

A sink at the end of the pipe, and the single source of everything that is read later. A session appends Arrow IPC streams to a folder:
`<session>.<epoch>.rows.arrow` (one line a step, one list over all rows for each kind and part), `.steps.arrow` (what is known of the step
as a whole) and `<session>.findings.arrow`. Neither torch nor pandas is needed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from paramwatch.batch import Batch, BatchSink
from paramwatch.block import STEP_COLUMNS, block_of, one_per_step, rows_batch, rows_schema, steps_batch, steps_schema, widened
from paramwatch.block import Block as Block
from paramwatch.columns import PARTS
from paramwatch.folder import DiskFolder as DiskFolder
from paramwatch.folder import Folder as Folder
from paramwatch.folder import MemoryFolder as MemoryFolder
from paramwatch.guard import ParamWatchError
from paramwatch.record import Finding, Inventory, Record
from paramwatch.schedule import Schedule

VERSION = 1
BATCH_STEPS, BATCH_BYTES, BATCH_SECONDS = 256, 8_000_000, 5.0
"""A batch is written when it holds that much or is that old: a small step written alone costs many times its share."""

_FINDINGS = pa.schema([("step", pa.int64()), ("rule", pa.string()), ("parameter", pa.string()), ("message", pa.string())])
_OPENING = b"\xff\xff\xff\xff"
_NOTHING = pa.table({})


@dataclass(frozen=True)
class Contents:
    """What a folder holds, after later sessions have hidden what they replace."""

    blocks: list[Block]
    """By session, then by epoch. Two blocks of one session share a step in which the inventory changed."""
    findings: list[Finding]


def read(folder: Folder) -> Contents:
    """Read what is whole in a folder, also while it is being written.

    Raises:
        ParamWatchError: A file has one of our names but is not ours, or was written by a newer paramwatch.
    """
    names = folder.names()
    epochs = [name.removesuffix(".rows") for name in names if name.endswith(".rows")]
    blocks = [block for epoch in epochs if (block := _read_block(folder, epoch))]
    said = [table for name in names if name.endswith(".findings") and (table := _read_table(folder, name)).num_rows]
    starts = {block.session: block.first_step for block in blocks} | dict(_session(table.schema) for table in said)

    def end(session: str) -> float:
        return min((start for other, start in starts.items() if other > session), default=np.inf)

    blocks = [block.at(block.step < end(block.session)) for block in sorted(blocks, key=lambda block: (block.session, block.epoch))]
    findings = [Finding(**line) for table in said for line in table.to_pylist() if line["step"] < end(_session(table.schema)[0])]
    return Contents([one_per_step(block) for block in blocks if len(block.step)], findings)


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
        self._findings: list[Finding] = []
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

    def write_batch(self, batch: Batch) -> None:
        """Take the records of a batch, and keep those that the schedule does."""
        with self._lock:
            if self.schedule is not None:
                self._keep(batch, self._chosen(batch, self.schedule))

    def find(self, findings: Iterable[Finding]) -> None:
        """Take what the rules said."""
        with self._lock:
            self._wait_since_now()
            self._findings += findings

    def tick(self) -> None:
        """Write what has waited for 5 seconds. To be called about every second."""
        with self._lock:
            if time.monotonic() - self._since >= BATCH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what was handed over; any process can read it afterwards."""
        with self._lock:
            self._write_records()
            findings, self._findings = self._findings, []
            if findings:
                first = findings[0].step if self.schedule is None else self._first_step
                schema = _FINDINGS.with_metadata(_label(self.session, first))
                batch = pa.RecordBatch.from_pylist([vars(finding) for finding in findings], schema=schema)
                self._append("findings", f"{self.session}.findings", batch)

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

    def _wait_since_now(self) -> None:
        if not self._waiting and not self._findings:
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


def _session(schema: Any) -> tuple[str, int]:
    return schema.metadata[b"session"].decode(), int(schema.metadata[b"first_step"])


def _read_block(folder: Folder, epoch: str) -> Block | None:
    """The steps that are whole in both files: they are apart by the batch that is being written."""
    rows, steps = _read_table(folder, f"{epoch}.rows"), _read_table(folder, f"{epoch}.steps")
    n = min(rows.num_rows, steps.num_rows)
    return block_of(rows.slice(0, n), steps.slice(0, n)) if n else None


def _read_table(folder: Folder, name: str) -> Any:
    """The whole batches of a stream: a torn or growing tail is left out, and a file without a whole header is empty."""
    if name not in folder.names():
        return _NOTHING
    batches = []
    with folder.open(name) as file:
        opening = file.read(4)
        if opening != _OPENING[: len(opening)] and opening.strip(b"\0"):
            raise ParamWatchError(f"{folder.where(name)} is not a file of paramwatch: no Arrow IPC stream. Move it elsewhere.")
        file.seek(0)
        try:
            stream = ipc.open_stream(file)
        except (pa.ArrowInvalid, OSError):
            return _NOTHING
        metadata = stream.schema.metadata or {}
        if metadata.get(b"format") != b"paramwatch":
            raise ParamWatchError(f"{folder.where(name)} is not a file of paramwatch. Move it elsewhere.")
        if (version := int(metadata[b"version"])) > VERSION:
            raise ParamWatchError(
                f"{folder.where(name)} is of a newer paramwatch (format {version}, {VERSION} is known here). Upgrade to read it."
            )
        with suppress(pa.ArrowInvalid, OSError):
            # one by one: those before the torn one count
            for batch in stream:
                batches.append(batch)  # noqa: PERF402
    return pa.Table.from_batches(batches, stream.schema)


def _raw_bytes(inventory: Inventory) -> int:
    return 8 * len(inventory.rows) * len(inventory.layout)


def _stored_bytes(inventory: Inventory) -> float:
    """What a step takes on disk: noise does not compress, counts hardly change."""
    return len(inventory.rows) * sum(1 if (held := PARTS[part]).integer else np.dtype(held.dtype).itemsize for _, part in inventory.layout)
