"""What an event file holds, as TensorBoard's own protobuf messages: events of curves, histograms, pictures and texts.

All are of the kinds that torch's writer writes: both loaders of TensorBoard read them, and so does its `EventAccumulator`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2, types_pb2

from paramwatch.columns import Array
from paramwatch.tensorboard.histograms import Histograms

_TEXT = summary_pb2.SummaryMetadata(
    plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text"),
    # Without the class the Rust loader keeps nothing.
    data_class=summary_pb2.DATA_CLASS_TENSOR,
)

_TIME, _STEP, _SUMMARY = 0x09, 0x10, 0x2A
"""What stands before these fields of an event,"""
_VALUE, _TAG, _HISTOGRAM = 0x0A, 0x0A, 0x2A
"""before a value in a summary, and these two in a value,"""
_NUMBERS, _LIMITS, _COUNTS = (0x09, 0x11, 0x19, 0x21, 0x29), 0x32, 0x3A
"""and before what a histogram has, in the order of `Histograms`."""
_SIZES = np.array([1 << 7 * i for i in range(9)])
"""The least step numbers that take 1, 2, ... bytes: each holds seven bits, the last ones first, and says whether another follows."""


class Form:
    """Events of the same curves, made for many steps at once: but for the step, the time and the numbers their bytes are the same."""

    def __init__(self, tags: Sequence[str]) -> None:
        values = [_bytes_of(summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, simple_value=0.0)])) for tag in tags]
        whole = event_pb2.Event(summary=summary_pb2.Summary.FromString(b"".join(values)))
        self._event = np.frombuffer(_bytes_of(whole), np.uint8)
        # the number is the last thing in a value, and the last value the last in an event
        ends = len(self._event) - sum(map(len, values)) + np.cumsum([len(value) for value in values], dtype=np.intp)
        self._places = ends[:, None] + np.arange(-4, 0)

    def filled(self, steps: Sequence[int], times: Sequence[float], numbers: Array) -> list[bytes]:
        """The events of some steps in order, whose numbers are [n, tags]."""
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(numbers, "<f4").view(np.uint8).reshape(len(steps), *self._places.shape)
        events: list[bytes] = []
        for begin in _beginnings(steps, times):
            n, ahead = begin.shape
            rows = np.empty((n, ahead + len(self._event)), np.uint8)
            rows[:, :ahead], rows[:, ahead:] = begin, self._event
            rows[:, ahead + self._places] = numbers[len(events) : len(events) + n]
            whole, width = rows.tobytes(), rows.shape[1]
            events += [whole[i : i + width] for i in range(0, len(whole), width)]
        return events


def event(step: int, time: float, **what: Any) -> bytes:
    """An event of anything. Two of one step, one behind the other, are one event with the content of both."""
    return _bytes_of(event_pb2.Event(wall_time=time, step=step, **what))


def histograms(step: int, time: float, values: Iterable[bytes]) -> bytes:
    """An event of histograms, as `histogram_values` has them; nothing at all where there is none."""
    summary = b"".join(values)
    return event(step, time) + _field(_SUMMARY, summary) if summary else b""


def histogram_values(tags: Iterable[str], found: Histograms) -> list[bytes]:
    """Histograms by their tags as fields of a summary, nothing where there is none: as protobuf itself has them, in a tenth of the time."""
    numbers = np.ascontiguousarray(found.numbers, "<f8")
    fields = np.empty((*numbers.shape, 9), np.uint8)
    fields[..., 0], fields[..., 1:] = _NUMBERS, numbers.view(np.uint8).reshape(*numbers.shape, 8)
    # protobuf leaves a zero out, of which no bit is set
    written = numbers.view(np.int64) != 0
    parts = [fields[written].tobytes(), *(each.astype("<f8").tobytes() for each in (found.limits, found.counts))]
    numbers_end, buckets_end = (9 * written.sum(1)).cumsum().tolist(), (8 * found.sizes).cumsum().tolist()
    values: list[bytes] = []
    begin = start = 0
    for tag, end, stop in zip(tags, numbers_end, buckets_end, strict=True):
        if stop > start:
            histogram = parts[0][begin:end] + _field(_LIMITS, parts[1][start:stop]) + _field(_COUNTS, parts[2][start:stop])
            values.append(_field(_VALUE, _field(_TAG, tag.encode()) + _field(_HISTOGRAM, histogram)))
        else:
            values.append(b"")
        begin, start = end, stop
    return values


def _field(key: int, content: bytes) -> bytes:
    """A field of a message that holds another, or text, or many numbers."""
    return _beginning(key, len(content)) + content


# most are as long as many others
@lru_cache(maxsize=1024)
def _beginning(key: int, size: int) -> bytes:
    """Of a field: its key, and its length as `_SIZES` says."""
    begin = [key]
    while size > 0x7F:
        begin.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*begin, size))


def scalars(step: int, time: float, found: Mapping[str, float]) -> bytes:
    """An event of numbers by their tags; nothing at all where there is none."""
    values = [summary_pb2.Summary.Value(tag=tag, simple_value=number) for tag, number in found.items()]
    return event(step, time, summary=summary_pb2.Summary(value=values)) if values else b""


def image(step: int, time: float, tag: str, png: bytes, width: int, height: int) -> bytes:
    """An event of a picture."""
    picture = summary_pb2.Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return event(step, time, summary=summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, image=picture)]))


def text(step: int, time: float, tag: str, markdown: str) -> bytes:
    """An event of a text."""
    value = summary_pb2.Summary.Value(tag=tag, metadata=_TEXT)
    value.tensor.dtype = types_pb2.DT_STRING
    value.tensor.tensor_shape.SetInParent()
    value.tensor.string_val.append(markdown.encode())
    return event(step, time, summary=summary_pb2.Summary(value=[value]))


def _beginnings(steps: Sequence[int], times: Sequence[float]) -> Iterator[Array]:
    """What `event` begins with, the time and the step, uint8 [n, bytes]: for as many steps at once as take the same number of bytes.

    One such event of protobuf's own takes longer than all else that is done for a step.
    """
    numbers, stamps = np.array(steps, np.int64), np.array(times, "<f8").view(np.uint8).reshape(-1, 8)
    # protobuf leaves a zero out
    sizes = np.searchsorted(_SIZES, numbers, side="right")
    start = 0
    for end in (*(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(numbers)):
        shifts = 7 * np.arange(sizes[start])
        begin = np.empty((end - start, 9 + len(shifts) + (len(shifts) > 0)), np.uint8)
        begin[:, :1], begin[:, 1:9], begin[:, 9:10] = _TIME, stamps[start:end], _STEP
        begin[:, 10:] = numbers[start:end, None] >> shifts & 0x7F | np.where(shifts < shifts[-1:], 0x80, 0)
        yield begin
        start = end


def _bytes_of(message: event_pb2.Event | summary_pb2.Summary) -> bytes:
    payload: bytes = message.SerializeToString()
    return payload
