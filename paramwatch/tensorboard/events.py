"""The TensorBoard event file: what is useful of a run where nothing but TensorBoard itself is installed.

A sink at the end of the pipe, beside the store, on a schedule of its own. It writes a digest, the `curves` of a step in one event and the
inventory and the ties as text; every number is in the store. Scalars are written as `simple_value`, as torch's writer does: both loaders
of TensorBoard read that right, and so does its `EventAccumulator.Scalars`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, types_pb2

from paramwatch.batch import Batch, BatchSink
from paramwatch.block import joined_record
from paramwatch.columns import Array
from paramwatch.record import Inventory, Record
from paramwatch.schedule import Schedule
from paramwatch.tensorboard.curves import Curves
from paramwatch.tensorboard.recordfile import RecordFile
from paramwatch.tensorboard.tables import curves_text, inventory_text, ties_text

MAX_BYTES = 64_000_000
"""What one file may take: the Rust loader holds it in memory, the Python loader reads about 1 MB a second."""

MAX_BASE = 512
"""The schedule's base is at most this: every step is drawn up to twice this number, and a loader keeps 1000 samples of a curve."""

_FORMS = 16
_TEXT = summary_pb2.SummaryMetadata(
    plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text"),
    # Without the class the Rust loader keeps nothing.
    data_class=summary_pb2.DATA_CLASS_TENSOR,
)


class EventFile(BatchSink):
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
        self._draw(file, Batch.of(record))
        if first:
            file.flush()

    def write_batch(self, batch: Batch) -> None:
        if self._file is not None:
            self._last = batch.record(len(batch) - 1)
            self._draw(self._file, batch)

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

    def _draw(self, file: RecordFile, batch: Batch) -> None:
        """The curves of those steps that the schedule keeps."""
        kept = batch.at([i for i, step in enumerate(batch.step) if self._schedule.keeps(step)])
        if len(kept):
            values, drawn = self._curves.values(kept)
            for step, time, numbers, shown in zip(kept.step, kept.time, values, drawn, strict=True):
                file.append(self._form(shown).filled(step, time, numbers[shown].tolist()))
            self._drawn = kept.step[-1]

    def _form(self, drawn: Array) -> _Form:
        """For events in which these of the curves are drawn; most are of one form."""
        key = drawn.tobytes()
        if key not in self._forms:
            if len(self._forms) == _FORMS:
                self._forms.clear()
            self._forms[key] = _Form([tag for tag, shown in zip(self._curves.tags(), drawn.tolist(), strict=True) if shown])
        return self._forms[key]

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
        self._curves, self._forms = Curves.of(inventory), dict[bytes, _Form]()
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


class _Form:
    """An event that is filled anew for each step: its tags stay, so that only numbers have to be set."""

    def __init__(self, tags: Sequence[str]) -> None:
        self._event = event_pb2.Event()
        self._event.summary.SetInParent()
        self._values = [self._event.summary.value.add(tag=tag) for tag in tags]

    def filled(self, step: int, time: float, numbers: Sequence[float]) -> bytes:
        """The event of a step."""
        self._event.wall_time, self._event.step = time, step
        for value, number in zip(self._values, numbers, strict=True):
            value.simple_value = number
        payload: bytes = self._event.SerializeToString()
        return payload


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
