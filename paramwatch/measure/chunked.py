"""A large tensor on the CPU in plain torch, where there is no compiled kernel: chunk by chunk, six operations on each.

The numbers are those of `naive`, to rounding. Sums are in float64, those of a tensor itself about a pivot (float32 sums would give a
LayerNorm's weight no spread at all); what is not finite is looked for only where the extremes show it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import PARTS, Array
from paramwatch.measure.naive import ORDER, parts
from paramwatch.merging import merge
from paramwatch.storage import is_there

CHUNK = 1 << 16
"""Elements: 512 KiB of float64, which stay in the cache from one operation to the next."""

_BLOCK = 1 << 14
"""Elements that one thread sums: torch would split a longer sum by the number of threads, which shows in the last bits."""

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def takes(tensor: Tensor) -> bool:
    """Whether a tensor is large, plain, and in one piece."""
    return (
        tensor.numel() >= CHUNK
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_nested
        and is_there(tensor)
    )


def chunked_parts(x: Tensor, before: Tensor | None = None) -> Array:
    """float64 [parts] of `x`, or of `x - before`.

    Args:
        x: Of those it `takes`.
        before: Of the same shape and dtype, and contiguous.
    """
    room = torch.empty(CHUNK // _BLOCK, _BLOCK, dtype=torch.float64, device="cpu")
    chunks, rest = _cut(x, room)
    old_chunks, old_rest = ([None] * len(chunks), None) if before is None else _cut(before, room)
    found = [_chunk(chunk, old, room) for chunk, old in zip(chunks, old_chunks, strict=True)]
    if rest.numel():
        wide = rest.to(torch.float64)
        found.append(parts(wide if old_rest is None else wide - old_rest.to(torch.float64)).numpy())
    columns = {part: np.array([int(each[i]) if PARTS[part].integer else each[i] for each in found]) for i, part in enumerate(ORDER)}
    merged = merge(columns, [range(len(found))])
    return np.array([float(merged[part][0]) for part in ORDER])


def _cut(x: Tensor, room: Tensor) -> tuple[list[Tensor], Tensor]:
    flat = x.detach().view(-1)
    whole = flat.numel() // CHUNK * CHUNK
    return list(flat[:whole].view(-1, *room.shape).unbind()), flat[whole:]


def _chunk(x: Tensor, old: Tensor | None, room: Tensor) -> Array:
    room.copy_(x)
    if old is not None:
        room.sub_(old)
    low, high = map(_number, torch.aminmax(room))
    nonzero = _number(torch.count_nonzero(room))
    if math.isfinite(low) and math.isfinite(high):
        # an update is small beside nothing: it needs no pivot
        pivot = low / 2 + high / 2 if old is None else 0.0
        if pivot:
            room.sub_(pivot)
        first = sum(room.sum(1).tolist()) / CHUNK
        # a product: a power that is too large raises
        second = sum(norm * norm for norm in torch.linalg.vector_norm(room, dim=1).tolist()) / CHUNK
        if math.isfinite(second):
            spread = math.sqrt(max(second - first * first, 0.0))
            size = math.sqrt(max(second + 2 * pivot * first + pivot * pivot, 0.0))
            return np.array([CHUNK, 0, 0, 0, CHUNK - nonzero, pivot + first, spread, size, low + 0.0, high + 0.0, math.nan])
        if pivot:
            room.copy_(x)
    return parts(room.view(-1)).numpy()


def _number(of: Tensor) -> float:
    # `item` and `numpy` are operations of torch's, this is none
    number: float = of.tolist()  # type: ignore[assignment]  # of no dimensions: the number, no list of them
    return number
