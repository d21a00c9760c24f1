"""Where tensors are in memory: how many bytes each takes, which of them overlap, and what they take together.

Beside `rows`: what `ties` calls shared storage, and the totals of a summary, come from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch

from paramwatch.rows import has_values, is_lazy
from paramwatch.storage import PARTS, is_there


class Span(NamedTuple):
    """The bytes a tensor reaches: `width` from `start` on, and again after each `pitch`, up to `end`."""

    at: int
    """Which tensor."""
    device: str
    start: int
    end: int
    pitch: int
    width: int
    item: int
    bytes: int

    @property
    def place(self) -> tuple[int, ...]:
        """Equal for what is the same bytes."""
        return self.start, self.end, self.pitch, self.width


class Shared(NamedTuple):
    """Tensors whose bytes overlap."""

    at: tuple[int, ...]
    numel: int
    """Elements between the first byte and the last."""
    saved: int
    """Bytes that they would take more, each apart."""


def bytes_of(tensor: torch.Tensor) -> int:
    """What a tensor takes: what is one place in memory (`expand`) once, of a sparse one what it stores. 0 while it is lazy."""
    if is_lazy(tensor):
        return 0
    if tensor.layout in PARTS:
        return sum(bytes_of(getattr(tensor.detach(), part)()) for part in PARTS[tensor.layout])
    numel = tensor.numel()
    if numel and tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_contiguous():
        apart = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if stride > 0]
        numel = min(math.prod(size for _, size in apart), 1 + sum(stride * (size - 1) for stride, size in apart))
    return numel * tensor.element_size()


def bytes_together(tensors: Sequence[torch.Tensor]) -> int:
    """What distinct tensors take together, memory that several lie on once."""
    return sum(map(bytes_of, tensors)) - sum(shared.saved for shared in overlaps(tensors))


def overlaps(tensors: Iterable[torch.Tensor]) -> list[Shared]:
    """The groups of distinct tensors that share bytes, in the order of their first ones."""
    spans = [span for at, tensor in enumerate(tensors) if (span := span_of(at, tensor)) is not None]
    groups: list[list[Span]] = []
    for near in _overlapping(spans):
        met: list[list[Span]] = []
        for span in near:
            touched = [group for group in met if any(_meet(span, other) for other in group)]
            met = [group for group in met if group not in touched] + [[span, *(other for group in touched for other in group)]]
        groups += [sorted(group) for group in met if len(group) > 1]
    return [_shared(group) for group in sorted(groups)]


def span_of(at: int, tensor: torch.Tensor) -> Span | None:
    """Where a tensor is, None where that question has no answer (lazy, meta, sparse, subclasses without storage, memory taken away)."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.numel() == 0 or not has_values(tensor):
        return None
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    # wrapper subclasses report address 0: they hold other tensors, not memory
    start = local.data_ptr()
    if start == 0 or local.numel() == 0 or not is_there(local):
        return None
    item = local.element_size()
    if local.is_contiguous():
        # several elements of a quantised dtype may share a byte
        size = local.untyped_storage().nbytes() if local.is_quantized else local.numel() * item
        return Span(at, str(local.device), start, start + size, size, size, item, size)
    dimensions = sorted((stride * item, size) for stride, size in zip(local.stride(), local.shape, strict=True) if size > 1 and stride > 0)
    pitch, count = dimensions[-1] if dimensions else (item, 1)
    width = item + sum(stride * (size - 1) for stride, size in dimensions[:-1])
    return Span(at, str(local.device), start, start + pitch * (count - 1) + width, pitch, width, item, bytes_of(local))


def _overlapping(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans whose ranges of addresses overlap, by one sweep over the sorted addresses."""
    clusters: list[list[Span]] = []
    end = 0
    for span in sorted(spans, key=attrgetter("device", "start", "end")):
        if clusters and clusters[-1][0].device == span.device and span.start < end:
            clusters[-1].append(span)
            end = max(end, span.end)
        else:
            clusters.append([span])
            end = span.end
    return [cluster for cluster in clusters if len(cluster) > 1]


def _meet(a: Span, b: Span) -> bool:
    """Whether two spans share a byte; columns of one matrix, side by side, have overlapping ranges and share none."""
    if a.start >= b.end or b.start >= a.end:
        return False
    apart = (b.start - a.start) % a.pitch
    side_by_side = a.pitch == b.pitch and a.width <= apart <= a.pitch - b.width
    return not side_by_side


def _shared(group: Sequence[Span]) -> Shared:
    reach = max(span.end for span in group) - min(span.start for span in group)
    taken = min(reach, sum({span.place: span.bytes for span in group}.values()))
    return Shared(tuple(span.at for span in group), reach // group[0].item, sum(span.bytes for span in group) - taken)
