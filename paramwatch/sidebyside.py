"""Small tensors of one dtype, laid side by side in one array: what reads elements is cheap for many of them at once.

Below `matrices` and `together`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure.sampled import positions
from paramwatch.measure.scaled import stream_of
from paramwatch.ragged import Ragged
from paramwatch.rows import is_plain
from paramwatch.sampling import AS_IT_IS, READABLE, Whole

Shape: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]

_LARGE = 1 << 14
"""Elements from which on a tensor costs more than what is saved by laying several side by side."""

_AT_ONCE = 1 << 18
"""Elements that are laid side by side: they stay in a processor's cache."""


def alike(tensors: Sequence[Tensor | None]) -> dict[Shape, list[int]]:
    """Positions of small plain tensors, those of one shape, dtype and device together."""
    found: dict[Shape, list[int]] = {}
    for i, x in enumerate(tensors):
        if x is not None and 1 < x.numel() <= _LARGE and x.dtype in AS_IT_IS and is_plain(x):
            found.setdefault((x.shape, x.dtype, x.device), []).append(i)
    return found


def at_once(which: Sequence[int], lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    """So many positions at a time as are laid side by side, with so many elements each."""
    start = held = 0
    for i, length in enumerate(lengths):
        if held + length > _AT_ONCE and i > start:
            yield which[start:i]
            start, held = i, 0
        held += length
    if held:
        yield which[start:]


@torch.no_grad()
def sampled(tensors: Sequence[Tensor], most: int) -> tuple[Sequence[Tensor], Sequence[Whole]]:
    """A sample of each and what is known of all its elements: `looked`, where there are too many to measure them all."""
    flat = torch.stack(list(tensors)).reshape(len(tensors), -1)
    n = flat.shape[1]
    low, high = flat.amin(1).double().tolist(), flat.amax(1).double().tolist()
    # counting row by row is dearer, and mostly there are none
    zeros = (n - flat.count_nonzero(dim=1)).tolist() if int(flat.count_nonzero()) < flat.numel() else [0] * len(flat)
    return _picked(flat, most).double().unbind(), [Whole(n, *known, n) for known in zip(low, high, zeros, strict=True)]


def side_by_side(tensors: Sequence[Tensor], most: int | None = None) -> Ragged:
    """The elements of each tensor of one dtype, or so many of them, in a row of their own; those of a coarse dtype in float32."""
    first = tensors[0]
    if not first.is_cpu:
        alike = [torch.stack([x.detach().reshape(-1) for x in same]) for _, same in groupby(tensors, Tensor.numel)]
        blocks = alike if most is None else [_picked(flat, most) for flat in alike]
        flat = torch.cat([block.reshape(-1) for block in blocks])
        lengths = np.array([block.shape[1] for block in blocks for _ in range(len(block))])
        return Ragged(flat.to(flat.dtype if flat.dtype in READABLE else torch.float32).cpu().numpy(), lengths)
    # NumPy's copy keeps to one thread: for so few elements at a time the others are in the way
    coarse = first.dtype is torch.bfloat16
    each = [(x.detach().view(torch.int16) if coarse else x.detach()).numpy().reshape(-1) for x in tensors]
    if most is not None:
        stream = stream_of(first.device)
        each = [x if len(x) <= most else x.take(positions(len(x), most, first.device, stream).numpy()) for x in each]
    found = Ragged.of(each)
    return found.like(_readable(found.flat))


def _readable(flat: Array) -> Array:
    """In float32 where that is exact and the dtype is coarser: the bits of a bfloat16 are the upper half of it."""
    if flat.dtype == np.int16:
        bits: Array = flat.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return flat.astype(np.float32) if flat.dtype == np.float16 else flat


def _picked(flat: Tensor, most: int) -> Tensor:
    """So many elements of each row, those that `sample` gives."""
    if flat.shape[1] <= most:
        return flat
    return flat.index_select(1, positions(flat.shape[1], most, flat.device, stream_of(flat.device)))
