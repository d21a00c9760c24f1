"""Tie groups: which names share one tensor, and which parameters share memory without being tied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

from paramwatch.record import TieGroup
from paramwatch.rows import Place, is_lazy, places

_Span: TypeAlias = tuple[str, int, int, int, str, torch.Tensor]
"""Device, start and end address, identity, name, tensor."""


def tie_groups(module: nn.Module) -> tuple[TieGroup, ...]:
    """The tie groups of a module, in model order.

    A group of kind `parameter` is one tensor reached by several names: one module at two places, or two modules that hold one
    `nn.Parameter`. A group of kind `storage` is separate parameters on overlapping memory, which looks like tying and is not: their
    gradients are not summed, and every optimizer update hits the same memory.
    """
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
    """The bytes a tensor reaches, None where that question has no answer (lazy, meta, sparse, subclasses without storage)."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.numel() == 0 or tensor.is_meta:
        return None
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    # wrapper subclasses report address 0: they hold other tensors, not memory
    start = local.data_ptr()
    if start == 0 or local.numel() == 0:
        return None
    reach = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True)) + 1
    return (str(local.device), start, start + reach * local.element_size(), id(tensor), name, tensor)


def _one_memory(spans: list[_Span]) -> list[TieGroup]:
    """Groups of spans that overlap, by one sweep over the sorted addresses."""
    clusters: list[list[_Span]] = []
    end = 0
    for span in sorted(spans, key=lambda span: span[:4]):
        if clusters and clusters[-1][0][0] == span[0] and span[1] < end:
            clusters[-1].append(span)
            end = max(end, span[2])
        else:
            clusters.append([span])
            end = span[2]
    order = {span[3]: i for i, span in enumerate(spans)}
    groups = []
    for cluster in clusters:
        if len(cluster) > 1:
            cluster.sort(key=lambda span: order[span[3]])
            reach = max(span[2] for span in cluster) - min(span[1] for span in cluster)
            taken = sum(span[5].numel() * span[5].element_size() for span in cluster)
            numel = reach // cluster[0][5].element_size()
            groups.append(TieGroup(tuple(span[4] for span in cluster), "storage", numel, max(taken - reach, 0)))
    return sorted(groups, key=lambda group: [span[4] for span in spans].index(group.names[0]))
