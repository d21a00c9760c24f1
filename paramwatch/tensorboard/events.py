"""The TensorBoard event file: what is useful of a run where nothing but TensorBoard itself is installed.

A sink at the end of the pipe, beside the store, on a schedule of its own. It writes a digest: of a step one event with its `curves`, the
distributions over the parameters and, where they were asked for, `histograms` of their elements; now and then heat maps (`strip`,
`picture`) of the whole run; and the inventory and the ties as text. Every number is in the store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2

from paramwatch.batch import Batch, BatchSink
from paramwatch.block import joined_record
from paramwatch.columns import Array
from paramwatch.heatmap import levels
from paramwatch.record import Inventory, Record, Split
from paramwatch.tensorboard import messages
from paramwatch.tensorboard.budget import Budget
from paramwatch.tensorboard.curves import HEAT_MAP
from paramwatch.tensorboard.digest import Digest
from paramwatch.tensorboard.norms import Norms
from paramwatch.tensorboard.picture import picture
from paramwatch.tensorboard.recordfile import FRAMING, RecordFile
from paramwatch.tensorboard.strip import Strip
from paramwatch.tensorboard.tables import contents_text, inventory_text, ties_text

MAX_BYTES = 64_000_000
"""What one file may take: the Rust loader holds it in memory, the Python loader reads about 1 MB a second."""

CONTENTS = "paramwatch/curves"
"""The tag of the text that says what the file shows and what it leaves out."""

HEAT_MAPS = ("grad_norm", "update_ratio")
"""The statistics that have heat maps."""

FIRST_PICTURE, GROWTH = 8, 1.6
"""Heat maps are drawn after so many steps, and again each time there are so many times as many; a loader keeps 10 of each."""

PICTURE_SECONDS = 10.0
"""But no sooner than so long after the last ones: to draw them takes as long as hundreds of steps of curves, and nobody looks so often."""

_NONE: Mapping[str, Any] = MappingProxyType({})


class EventFile(BatchSink):
    """A sink that writes one event file into a folder, made when the first record comes.

    A step that is written twice (its round was read before it was over) shows its whole round. A later file in the same folder hides what
    earlier ones hold from its first step on: a re-run replaces, a resumed run continues.
    """

    called = "TensorBoard's event file"
    """In messages."""

    _digest: Digest

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder
        self._budget = Budget(max_bytes)
        self._file: RecordFile | None = None
        self._inventory: Inventory | None = None
        self._texts: dict[str, tuple[int, str]] = {}
        self._last: Record | None = None
        self._drawn: int | None = None
        self._strip = Strip()
        self._due, self._pictured, self._time, self._pictured_at = FIRST_PICTURE, 0, 0.0, -math.inf

    def write(self, record: Record) -> None:
        first = self._file is None
        file = self._file or self._begin(record)
        if self._last is not None and self._last.step == record.step:
            record = _merged(self._last, record)
        self._last = record
        if self._drawn == record.step and not file.take_back():
            self._start(file, record)
        if record.inventory is not self._inventory:
            self._describe(file, record)
        self._take(file, Batch.of(record), record.histograms, record.uses)
        if first:
            file.flush()

    def write_batch(self, batch: Batch) -> None:
        if self._file is not None:
            self._last = batch.record(len(batch) - 1)
            begin = 0
            while begin < len(batch):
                # a picture that comes due within the batch is of the steps before
                first = begin + max(1, self._due - self._strip.steps)
                late = np.abs(np.array(batch.time[first:]) - self._pictured_at) >= PICTURE_SECONDS
                end = first + int(late.argmax()) if late.any() else len(batch)
                self._take(self._file, batch.at(range(begin, end)))
                begin = end

    def flush(self) -> None:
        """Hand everything to the operating system now, rather than with a record that comes a second later."""
        if self._file is not None:
            self._file.flush()

    def tick(self) -> None:
        """Called about every second, whether or not something was written."""
        self.flush()

    def close(self) -> None:
        if self._file is not None:
            try:
                self._draw_pictures(self._file)
            finally:
                self._file.close()

    def _take(self, file: RecordFile, batch: Batch, histograms: Mapping[str, Array] = _NONE, uses: Mapping[str, Split] = _NONE) -> None:
        """Draw the steps that the schedules keep, and remember all of them for the heat maps."""
        if self._strip.steps >= self._due and self._is_time(batch.time[0]) and batch.step[0] > self._strip.last:
            self._draw_pictures(file)
            self._due = math.ceil(self._strip.steps * GROWTH)
        norms = Norms.of(batch)
        self._strip.add(batch.step, {name: levels(*norms.lines[name]) for name in HEAT_MAPS if name in norms.lines})
        self._time = batch.time[-1]
        for i, parts in sorted(self._digest.of(batch, norms, histograms, uses).items()):
            step, time = batch.step[i], batch.time[i]
            if payload := b"".join([part for kind, part in parts if self._affordable(file, kind, part, step, time)]):
                file.append(payload)
                self._drawn = step

    def _is_time(self, time: float) -> bool:
        """Whether heat maps may be drawn before a step of this time, if so many steps have come that they are due."""
        return abs(time - self._pictured_at) >= PICTURE_SECONDS

    def _draw_pictures(self, file: RecordFile) -> None:
        """Heat maps of the whole run until now."""
        strip, step = self._strip, self._strip.last
        if self._inventory is not None and strip.steps > self._pictured:
            self._pictured, self._pictured_at = strip.steps, self._time
            names = [row.name for row in self._inventory.rows]
            for name in strip.statistics:
                drawn = messages.image(step, self._time, f"{name}/{HEAT_MAP}", *picture(strip.levels(name), names, strip.first, step))
                if self._affordable(file, "heat maps", drawn, step, self._time):
                    file.append(drawn)

    def _affordable(self, file: RecordFile, kind: str, payload: bytes, step: int, time: float) -> bool:
        """Whether something still has room; the first time it has not, the text says so."""
        if self._budget.spend(kind, len(payload) + FRAMING, step):
            return True
        if self._budget.ended[kind] == step and kind != "texts":
            self._tell(file, CONTENTS, contents_text(self._digest, self._budget), step, time, last=True)
        return False

    def _begin(self, record: Record) -> RecordFile:
        file = self._file = RecordFile(self._folder)
        file.append(messages.event(record.step, record.time, file_version="brain.Event:2"))
        self._start(file, record)
        return file

    def _start(self, file: RecordFile, record: Record) -> None:
        """Hide what came before from this step on: the Python loader does so where it is told that a session starts."""
        file.append(messages.event(record.step, record.time, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))
        for tag, (step, text) in self._texts.items():
            if step == record.step:
                self._tell(file, tag, text, step, record.time)

    def _describe(self, file: RecordFile, record: Record) -> None:
        """What there is to draw, and in words."""
        known, inventory = self._inventory, record.inventory
        if known is None or [row.name for row in known.rows] != [row.name for row in inventory.rows]:
            self._strip, self._due, self._pictured = Strip(), FIRST_PICTURE, 0
        self._digest = Digest(inventory, self._budget, self._digest if known else None)
        self._inventory = inventory
        texts = {
            "paramwatch/ties": ties_text(inventory),
            "paramwatch/inventory": inventory_text(inventory),
            CONTENTS: contents_text(self._digest, self._budget),
        }
        for tag, text in texts.items():
            if tag not in self._texts or self._texts[tag][1] != text:
                self._tell(file, tag, text, record.step, record.time)

    def _tell(self, file: RecordFile, tag: str, text: str, step: int, time: float, last: bool = False) -> None:
        """Write a text; `last` for the few that must find room."""
        payload = messages.text(step, time, tag, text)
        if last or self._budget.spend("texts", len(payload) + FRAMING, step):
            self._texts[tag] = step, text
            file.append(payload)


def _merged(earlier: Record, later: Record) -> Record:
    """The one record of a step that came in two. Where the rows themselves changed in between, the later half stands alone."""
    if [row.name for row in earlier.inventory.rows] != [row.name for row in later.inventory.rows]:
        return later
    if earlier.inventory.layout != later.inventory.layout:
        return later
    return joined_record(earlier, later)
