"""The store: the sink that keeps records, on disk or in memory, in the format that `contents` reads.

At the end of the pipe, and the single source of everything that is read later. A session appends Arrow IPC streams to a folder:
`<session>.<epoch>.rows.arrow` (one line a step, one list over all rows for each kind and part), `.steps.arrow` (what is known of the step
as a whole) and one `<session>.<name>.arrow` for each of the long `streams`. Neither torch nor pandas is needed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from paramwatch.batch import Batch, BatchSink
from paramwatch.block import STEP_COLUMNS
from paramwatch.columns import PARTS
from paramwatch.contents import Contents as Contents
from paramwatch.contents import read as read
from paramwatch.epoch import FULL_RATE, SAME
from paramwatch.files import Files, session_after
from paramwatch.folder import DiskFolder as DiskFolder
from paramwatch.folder import Folder as Folder
from paramwatch.folder import MemoryFolder as MemoryFolder
from paramwatch.folder import WithSpare as WithSpare
from paramwatch.format import RowsWriter, steps_batch, steps_schema, widened
from paramwatch.latest import Alarm, Latest
from paramwatch.record import Finding, Inventory, Record
from paramwatch.schedule import Schedule
from paramwatch.streams import Lines

BATCH_STEPS, BATCH_BYTES, BATCH_SECONDS = 512, 8_000_000, 5.0
"""A batch is written when it holds that much, as it is on disk, or is that old: a step written alone costs many times its share."""

MEMORY_BYTES = 256_000_000
"""What a session without a folder may take, or one that has lost it."""

LATEST_BYTES = 64_000_000
"""What the latest steps beyond the schedule may take, and no more than a sixteenth of the bytes of a session."""

LONG_SHARE = 0.25
"""What each long stream may take of the bytes of a session."""


class Store(BatchSink):
    """The sink that keeps records, thinned by a schedule that is fixed at the session's first record.

    A step that the schedule drops is kept all the same where a row was stepped for the first time, or for the first time since a whole
    stride: an optimizer that steps in odd rounds only would otherwise vanish once the stride is even. All parts of a kept step are kept.
    The latest of the steps that were dropped are held in memory, and written at the first step that is not finite after many that were,
    and when the store is closed.

    Where the folder is one `WithSpare` and cannot be written any more, that is said once; what could not be written and all that follows is
    kept in memory, with a schedule for what there is of it.

    Args:
        folder: Where to; nothing is made in it before records are written.
        max_bytes: What the first 2^20 steps of the session may take, with the latest steps and the long streams.
        session: Names the session's files and orders it among others; by default as `session_after` the others names it.
        long: The names of those long streams that take much.

    Raises:
        OSError: From any method, where the folder cannot be written and has no spare.
    """

    def __init__(self, folder: Folder, *, max_bytes: int, session: str | None = None, long: Collection[str] = ()) -> None:
        self.session = session or session_after(folder)
        self.schedule: Schedule | None = None
        self._files = Files(folder, self.session, self._stay_small)
        self._max_bytes = max_bytes
        self._long = len(long)
        self._latest, self._alarm = Latest(_held(max_bytes)), Alarm()
        self._last = self._seen = -1
        self._inventory: Inventory | None = None
        self._types: dict[str, Any] = {}
        # keys whose types do not depend on their values, and are among `_types`
        self._plain: Sequence[str] = ()
        self._kept_steps, self._dropped_steps = _Waiting(), _Waiting()
        self._lines = Lines(max_bytes * LONG_SHARE)
        self._since = 0.0
        self._released = False
        # the background thread writes while a read may flush from any other
        self._lock = threading.RLock()

    def write(self, record: Record) -> None:
        """Take a record, and keep it if the schedule does."""
        with self._lock:
            if self.schedule is None:
                self.schedule = Schedule(_stored_bytes(record.inventory), self._budget)
                self._files.first_step = record.step
            new = record.inventory is not self._inventory and record.inventory != self._inventory
            if new:
                self._begin(record.inventory, widened(self._types, record.steps))
                self._latest.clear()
                self._stepped = np.full(len(record.stepped), np.iinfo(np.int64).min // 2)
            self._take(Batch.of(record), self.schedule, always=new)
            self._wait_since_now()
            if self._lines.take(record) >= BATCH_BYTES:
                self._write_lines()

    def write_batch(self, batch: Batch) -> None:
        """Take the records of a batch, and keep those that the schedule does."""
        with self._lock:
            if self.schedule is not None:
                self._take(batch, self.schedule)

    def find(self, findings: Iterable[Finding]) -> None:
        """Take what the rules said."""
        with self._lock:
            self._wait_since_now()
            for finding in () if self._released else findings:
                self._lines.add("findings", finding.step, {key: [value] for key, value in vars(finding).items() if key != "step"})

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

    def release(self) -> None:
        """Give up what is held and take nothing more, since it cannot be written. What was written before can be read."""
        with self._lock:
            self._released = True
            self._latest.clear()
            self._kept_steps.taken()
            self._dropped_steps.taken()
            self._lines.clear()

    def close(self) -> None:
        """Write what is left, the latest steps included, and close the files."""
        with self._lock:
            try:
                self.flush()
                self._write_latest()
            finally:
                self._latest.clear()
                self._files.close()

    @property
    def _budget(self) -> float:
        """Bytes for the steps that the schedule keeps."""
        # the latest steps may be written twice
        return self._max_bytes * (1 - LONG_SHARE * self._long) - 2 * _held(self._max_bytes)

    def _begin(self, inventory: Inventory, types: dict[str, Any]) -> None:
        """Further files, for steps of another inventory or with other columns."""
        self._write_records()
        self._hold_dropped()
        self._files.begin()
        self._inventory, self._types = inventory, types
        self._rows, self._steps_schema = RowsWriter(inventory), steps_schema(types)
        size = max(1, _stored_bytes(inventory))
        self._kept_steps.most = most = min(BATCH_STEPS, ceil(BATCH_BYTES / size))
        # the oldest of the latest steps are given up as they were held, and most of them have to stay
        self._dropped_steps.most = min(most, ceil(self._latest.max_bytes / 4 / size) or most)

    def _take(self, batch: Batch, schedule: Schedule, always: bool = False) -> None:
        start = 0
        if (keys := tuple(batch.steps)) != self._plain:
            # of a key that is known the type is the same throughout
            self._plain = keys if batch.steps.keys() <= STEP_COLUMNS.keys() else ()
            for i in range(1 if self._plain else len(batch)):
                types = widened(self._types, batch.described(i))
                if types != self._types and self._inventory is not None:
                    self._share(batch.at(range(start, i)), schedule, always)
                    self._begin(self._inventory, types)
                    start = i
        self._share(batch.at(range(start, len(batch))), schedule, always)

    def _share(self, batch: Batch, schedule: Schedule, always: bool) -> None:
        """Keep some steps and drop the others, all of which fit the files that there are."""
        if not len(batch):
            return
        heard = self._alarm.heard(batch)
        if heard is not None and heard[0] + 1 < len(batch):
            # what is news is written before what comes after it
            self._divide(batch.at(range(heard[0] + 1)), schedule, always, heard)
            self._share(batch.at(range(heard[0] + 1, len(batch))), schedule, always)
        else:
            self._divide(batch, schedule, always, heard)

    def _divide(self, batch: Batch, schedule: Schedule, always: bool, heard: tuple[int, bool] | None) -> None:
        self._seen = batch.step[-1]
        kept = self._chosen(batch, schedule, always, None if heard is None else heard[0])
        self._wait(self._kept_steps, batch, kept, self._write_records)
        if len(kept) < len(batch):
            chosen = set(kept)
            self._wait(self._dropped_steps, batch, [i for i in range(len(batch)) if i not in chosen], self._hold_dropped)
        if heard is not None:
            if heard[1]:
                self._write_latest()
            self.flush()

    def _chosen(self, batch: Batch, schedule: Schedule, always: bool, wanted: int | None) -> list[int]:
        """Which steps are kept."""
        if always or schedule.full_rate(batch.step[-1]):
            self._last = self._stepped[batch.stepped] = batch.step[-1]
            return [*range(len(batch))]
        latest = self._stepped[batch.stepped]
        # the row that has waited longest decides; where no row stepped, none does
        oldest = int(latest.min()) if len(latest) else None
        chosen = []
        for i, step in enumerate(batch.step):
            due = oldest is not None and step - oldest >= schedule.stride(step)
            if due or i == wanted or step == self._last or schedule.keeps(step):
                chosen.append(i)
                self._last, oldest = step, None if oldest is None else step
        if chosen:
            self._stepped[batch.stepped] = self._last
        return chosen

    def _wait(self, waiting: _Waiting, batch: Batch, chosen: Sequence[int], full: Callable[[], None]) -> None:
        """Hold steps until they are many."""
        while chosen:
            room = waiting.most - waiting.steps
            self._wait_since_now()
            waiting.batches.append(batch.at(chosen[:room]))
            waiting.steps += len(waiting.batches[-1])
            if waiting.steps >= waiting.most:
                full()
            chosen = chosen[room:]

    def _wait_since_now(self) -> None:
        if not self._kept_steps.steps and not self._lines.bytes:
            self._since = time.monotonic()

    def _write_records(self) -> None:
        if (batches := self._kept_steps.taken()) and self.schedule is not None:
            rows = self._rows.batch(batches)
            self._append_steps(rows, steps_batch(batches, self._steps_schema, self.schedule.full_rate), {SAME: json.dumps(self._rows.same)})

    def _hold_dropped(self) -> None:
        if batches := self._dropped_steps.taken():
            rows = self._rows.batch(batches)
            self._latest.add(rows, steps_batch(batches, self._steps_schema, lambda step: True), {SAME: json.dumps(self._rows.same)})

    def _write_latest(self) -> None:
        """The steps that were dropped: with those that were kept, none is missing from where the ring starts."""
        if self.schedule is not None:
            self._write_records()
            self._hold_dropped()
            whole = {FULL_RATE: f"{self._latest.start} {self._seen}"}
            for rows, steps, note in self._latest.taken(self._steps_schema):
                self._append_steps(rows, steps, note | whole)

    def _append_steps(self, rows: Any, steps: Any, note: Mapping[str, str]) -> None:
        self._files.append_steps(rows, self._rows.schema, steps, self._steps_schema, note, json.loads(note[SAME]))

    def _write_lines(self) -> None:
        for name, lines in self._lines.taken():
            self._files.append_lines(name, lines)

    def _stay_small(self) -> None:
        """From now on everything is kept in memory."""
        self._max_bytes = min(self._max_bytes, MEMORY_BYTES)
        self._latest.max_bytes = _held(self._max_bytes)
        self._lines.within(self._max_bytes * LONG_SHARE)
        if self._inventory is not None:
            self.schedule = Schedule(_stored_bytes(self._inventory), self._budget)


class _Waiting:
    """Steps that are to become one Arrow batch."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.steps, self.most = 0, 1

    def taken(self) -> list[Batch]:
        batches, self.batches, self.steps = self.batches, [], 0
        return batches


def _held(max_bytes: float) -> float:
    """What of these bytes the latest steps may take."""
    return min(LATEST_BYTES, max_bytes // 16)


def _stored_bytes(inventory: Inventory) -> int:
    """What a step takes on disk: noise does not compress, counts hardly change."""
    return len(inventory.rows) * sum(1 if (held := PARTS[part]).integer else np.dtype(held.dtype).itemsize for _, part in inventory.layout)
