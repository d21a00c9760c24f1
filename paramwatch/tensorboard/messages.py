"""What an event file holds, as TensorBoard's own protobuf messages: events of curves, histograms, pictures and texts.

All are of the kinds that torch's writer writes: both loaders of TensorBoard read them, and so does its `EventAccumulator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, types_pb2

_TEXT = summary_pb2.SummaryMetadata(
    plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text"),
    # Without the class the Rust loader keeps nothing.
    data_class=summary_pb2.DATA_CLASS_TENSOR,
)


class Form:
    """An event of curves that is filled anew for each step: its tags stay, so that only numbers have to be set."""

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


def event(step: int, time: float, **what: Any) -> bytes:
    """An event of anything. Two of one step, one behind the other, are one event with the content of both."""
    payload: bytes = event_pb2.Event(wall_time=time, step=step, **what).SerializeToString()
    return payload


def histograms(step: int, time: float, found: Mapping[str, summary_pb2.HistogramProto | None]) -> bytes:
    """An event of histograms by their tags; nothing at all where there is none."""
    values = [summary_pb2.Summary.Value(tag=tag, histo=histogram) for tag, histogram in found.items() if histogram is not None]
    return event(step, time, summary=summary_pb2.Summary(value=values)) if values else b""


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
