"""The TensorBoard event file: what is useful of a run where nothing but TensorBoard itself is installed.

A sink at the end of the pipe, beside the store, on a schedule of its own. It writes a digest, the `curves` of a step in one event and the
inventory and the ties as text; every number is in the store. Scalars are written as `simple_value`, as torch's writer does: both loaders
of TensorBoard read that right, and so does its `EventAccumulator.Scalars`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, types_pb2

from paramwatch.block import joined_record
from paramwatch.record import Inventory, Record
from paramwatch.schedule import Schedule
from paramwatch.tensorboard.curves import Curves
from paramwatch.tensorboard.recordfile import RecordFile
from paramwatch.tensorboard.tables import curves_text, inventory_text, ties_text

MAX_BYTES = 64_000_000
"""What one file may take: the Rust loader holds it in memory, the Python loader reads about 1 MB a second."""

MAX_BASE = 512
"""The schedule's base is at most this: every step is drawn up to twice this number, and a loader keeps 1000 samples of a curve."""

_TEXT = summary_pb2.SummaryMetadata(
    plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text"),
    # Without the class the Rust loader keeps nothing.
    data_class=summary_pb2.DATA_CLASS_TENSOR,
)


class EventFile:
    """A sink that writes one event file into a folder, made when the first record comes.

    A step that is written twice (its round was read before it was over) shows its whole round. A later file in the same folder hides what
    earlier ones hold from its first step on: a re-run replaces, a resumed run continues.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._file: RecordFile | None = None
        self._inventory: Inventory | None = None
        self._texts: dict[str, tuple[int, str]] = {}
        self._last: Record | None = None
        self._drawn: int | None = None

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
        if self._schedule.keeps(record.step):
            self._drawn = record.step
            summary = summary_pb2.Summary()
            for tag, value in self._curves.scalars(record):
                summary.value.add(tag=tag, simple_value=value)
            file.append(_event(record, summary=summary))
        if first:
            file.flush()

    def flush(self) -> None:
        """Hand everything to the operating system now, rather than with a record that comes a second later."""
        if self._file is not None:
            self._file.flush()

    def tick(self) -> None:
        """Called about every second, whether or not something was written."""
        self.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin(self, record: Record) -> RecordFile:
        file = self._file = RecordFile(self._folder)
        file.append(_event(record, file_version="brain.Event:2"))
        self._start(file, record)
        return file

    def _start(self, file: RecordFile, record: Record) -> None:
        """Hide what came before from this step on: the Python loader does so where it is told that a session starts."""
        file.append(_event(record, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))
        for tag, (step, text) in self._texts.items():
            if step == record.step:
                file.append(_text_event(record, tag, text))

    def _describe(self, file: RecordFile, record: Record) -> None:
        inventory = self._inventory = record.inventory
        self._curves = Curves.of(inventory)
        self._schedule = Schedule(self._curves.event_bytes(), self._max_bytes, max_base=MAX_BASE)
        texts = {
            "paramwatch/ties": ties_text(inventory),
            "paramwatch/inventory": inventory_text(inventory),
            "paramwatch/curves": curves_text(self._curves.depth, self._schedule),
        }
        for tag, text in texts.items():
            if tag not in self._texts or self._texts[tag][1] != text:
                self._texts[tag] = record.step, text
                file.append(_text_event(record, tag, text))


def _event(record: Record, **what: Any) -> bytes:
    payload: bytes = event_pb2.Event(wall_time=record.time, step=record.step, **what).SerializeToString()
    return payload


def _text_event(record: Record, tag: str, text: str) -> bytes:
    value = summary_pb2.Summary.Value(tag=tag, metadata=_TEXT)
    value.tensor.dtype = types_pb2.DT_STRING
    value.tensor.tensor_shape.SetInParent()
    value.tensor.string_val.append(text.encode())
    return _event(record, summary=summary_pb2.Summary(value=[value]))


def _merged(earlier: Record, later: Record) -> Record:
    """The one record of a step that came in two. Where the rows themselves changed in between, the later half stands alone."""
    if [row.name for row in earlier.inventory.rows] != [row.name for row in later.inventory.rows]:
        return later
    if earlier.inventory.layout != later.inventory.layout:
        return later
    return joined_record(earlier, later)
