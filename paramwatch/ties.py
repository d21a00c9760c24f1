"""Tie groups: which names share one tensor, and which parameters share memory without being tied."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn

from paramwatch.guard import ParamWatchError
from paramwatch.record import TieGroup
from paramwatch.rows import Place, has_values, is_lazy, places


class _Span(NamedTuple):
    """The bytes a tensor reaches: `width` from `start` on, and again after each `pitch`, up to `end`."""

    name: str
    device: str
    start: int
    end: int
    pitch: int
    width: int
    item: int
    bytes: int


def tie_groups(module: nn.Module) -> tuple[TieGroup, ...]:
    """The tie groups of a module, in model order.

    A group of kind `parameter` is one tensor reached by several names: one module at two places, or two modules that hold one
    `nn.Parameter`. A group of kind `storage` is separate parameters on overlapping memory, which looks like tying and is not: their
    gradients are not summed, and every optimizer update hits the same memory.

    Raises:
        ParamWatchError: Something else than a module was given.
    """
    if not isinstance(module, nn.Module):
        raise ParamWatchError(f"tie_groups takes an nn.Module, not {type(module).__name__}")
    return find_ties(places(module))


def find_ties(found: Sequence[Place]) -> tuple[TieGroup, ...]:
    """`tie_groups` for places already looked up."""
    named: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for place in found:
        tensor = place.tensor
        if tensor is not None:
            named.setdefault(id(tensor), []).append(place.name)
            tensors[id(tensor)] = tensor
    shared = [_one_tensor(names, tensors[key]) for key, names in named.items() if len(names) > 1]
    spans = [span for key, names in named.items() if (span := _span(names[0], tensors[key])) is not None]
    return (*shared, *_one_memory(spans))


def _one_tensor(names: Sequence[str], tensor: torch.Tensor) -> TieGroup:
    numel = 0 if is_lazy(tensor) else tensor.numel()
    size = 0 if is_lazy(tensor) else numel * tensor.element_size()
    return TieGroup(tuple(names), "parameter", numel, size * (len(names) - 1))


def _span(name: str, tensor: torch.Tensor) -> _Span | None:
    """Where a tensor is, None where that question has no answer (lazy, meta, sparse, subclasses without storage)."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.numel() == 0 or not has_values(tensor):
        return None
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    # wrapper subclasses report address 0: they hold other tensors, not memory
    start = local.data_ptr()
    if start == 0 or local.numel() == 0:
        return None
    item = local.element_size()
    if local.is_contiguous():
        # several elements of a quantised dtype may share a byte
        size = local.untyped_storage().nbytes() if local.is_quantized else local.numel() * item
        return _Span(name, str(local.device), start, start + size, size, size, item, size)
    dimensions = sorted((stride * item, size) for stride, size in zip(local.stride(), local.shape, strict=True) if size > 1 and stride > 0)
    pitch, count = dimensions[-1] if dimensions else (item, 1)
    width = item + sum(stride * (size - 1) for stride, size in dimensions[:-1])
    return _Span(name, str(local.device), start, start + pitch * (count - 1) + width, pitch, width, item, tensor.numel() * item)


def _one_memory(spans: Sequence[_Span]) -> list[TieGroup]:
    """Groups of spans that meet, in the order of their first ones."""
    order = {span.name: i for i, span in enumerate(spans)}
    groups: list[list[_Span]] = []
    for near in _overlapping(spans):
        met: list[list[_Span]] = []
        for span in near:
            touched = [group for group in met if any(_meet(span, other) for other in group)]
            met = [group for group in met if group not in touched] + [[span, *(other for group in touched for other in group)]]
        groups += [sorted(group, key=lambda span: order[span.name]) for group in met if len(group) > 1]
    return [_one_piece(group) for group in sorted(groups, key=lambda group: order[group[0].name])]


def _overlapping(spans: Sequence[_Span]) -> list[list[_Span]]:
    """Spans whose ranges of addresses overlap, by one sweep over the sorted addresses."""
    clusters: list[list[_Span]] = []
    end = 0
    for span in sorted(spans, key=attrgetter("device", "start", "end")):
        if clusters and clusters[-1][0].device == span.device and span.start < end:
            clusters[-1].append(span)
            end = max(end, span.end)
        else:
            clusters.append([span])
            end = span.end
    return [cluster for cluster in clusters if len(cluster) > 1]


def _meet(a: _Span, b: _Span) -> bool:
    """Whether two spans share a byte; columns of one matrix, side by side, have overlapping ranges and share none."""
    if a.start >= b.end or b.start >= a.end:
        return False
    apart = (b.start - a.start) % a.pitch
    side_by_side = a.pitch == b.pitch and a.width <= apart <= a.pitch - b.width
    return not side_by_side


def _one_piece(group: Sequence[_Span]) -> TieGroup:
    reach = max(span.end for span in group) - min(span.start for span in group)
    saved = max(sum(span.bytes for span in group) - reach, 0)
    return TieGroup(tuple(span.name for span in group), "storage", reach // group[0].item, saved)
