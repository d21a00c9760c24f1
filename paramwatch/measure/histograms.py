"""Histograms of the tensors of a step, in the bins of `bins`: a measurement of its own, made at some steps only.

As in the rest of `measure`, the path of each tensor is chosen here and all give the same numbers, to the last one. Nobody waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramwatch.bins import BINS, ZERO
from paramwatch.columns import Array
from paramwatch.measure import gpu, native, trusted
from paramwatch.measure.compiler import library
from paramwatch.measure.naive import as_reals, histogram, is_supported
from paramwatch.measure.reading import Numbers, Reading, stacked

_PIECE = 1 << 20
"""Elements that are made float64 at a time."""


def histograms(tensors: Sequence[Tensor | None], scale: Tensor | None = None) -> Reading:
    """How many elements of each tensor are in each bin, [tensors, bins]; NaN throughout for one that is None or unsupported.

    Args:
        tensors: Of any dtype, layout, device and shape.
        scale: A positive factor that the tensors carry and what is counted shall not, on any device. Of tensors on the CPU whose factor
            is elsewhere there is no histogram: it would have to be waited for.
    """
    there = [i for i, x in enumerate(tensors) if x is not None and is_supported(x) and _meets(x, scale)]
    chosen: list[Tensor] = [tensors[i] for i in there]  # type: ignore[misc]  # those are not None
    return _reading(len(tensors), there, chosen, None, scale)


def update_histograms(after: Sequence[Tensor], before: Sequence[Tensor]) -> Reading:
    """The same of the differences `after - before`; NaN throughout where a shape has changed."""
    same = [i for i, (new, old) in enumerate(zip(after, before, strict=True)) if new.shape == old.shape]
    there = [i for i in same if is_supported(after[i]) and is_supported(before[i])]
    return _reading(len(after), there, [after[i] for i in there], [before[i] for i in there], None)


def _reading(n: int, there: Sequence[int], after: Sequence[Tensor], before: Sequence[Tensor] | None, scale: Tensor | None) -> Reading:
    olds: Sequence[Tensor | None] = [None] * len(after) if before is None else before
    quick = [i for i, (x, old) in enumerate(zip(after, olds, strict=True)) if _is_quick(x, old)]
    devices: dict[torch.device, list[int]] = {}
    for i, (x, old) in enumerate(zip(after, olds, strict=True)):
        if trusted.takes(x, histograms=True) and (old is None or gpu.are_alike(x, old, None)):
            devices.setdefault(x.device, []).append(i)
    found: list[Numbers] = []
    done = set(quick)
    for device, which in devices.items():
        pasts = [old for i in which if (old := olds[i]) is not None]
        counts = trusted.attempt(device, partial(gpu.histograms, [after[i] for i in which], pasts or None, scale))
        if counts is not None:
            found.append(([there[i] for i in which], counts))
            done.update(which)
    found += stacked([(there[i], _plain(after[i], olds[i], scale)) for i in range(len(after)) if i not in done])
    if quick:
        found.append(([there[i] for i in quick], _compiled([after[i] for i in quick], [olds[i] for i in quick], scale)))
    return Reading(found, (n, BINS))


def _meets(tensor: Tensor, scale: Tensor | None) -> bool:
    return scale is None or scale.device == tensor.device or not tensor.is_cpu


def _is_quick(x: Tensor, old: Tensor | None) -> bool:
    return native.available() and native.takes(x) and (old is None or native.are_alike(x, old, None))


def _plain(x: Tensor, old: Tensor | None, scale: Tensor | None) -> Tensor:
    """In plain torch, as the specification says. Of a sparse one on the CPU only the elements that it stores are looked at."""
    if x.layout is not torch.sparse_coo or not x.is_cpu or old is not None:
        return _counted(x, old, scale)
    stored = as_reals(x.detach().coalesce().values())
    counts = _counted(stored, None, scale)
    counts[ZERO] += x.numel() * (2 if x.is_complex() else 1) - stored.numel()
    return counts


def _counted(x: Tensor, old: Tensor | None, scale: Tensor | None) -> Tensor:
    factor = None if scale is None else scale.detach().to(torch.float64).reshape(())
    if factor is not None and not factor.is_cpu:
        factor = factor.to(x.device, non_blocking=True)
    total = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    for piece, before in zip(_pieces(x), repeat(None) if old is None else _pieces(old), strict=False):
        moved = piece if before is None else piece - before
        total = total.to(moved.device) + histogram(moved if factor is None else moved / factor)
    return total


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """The elements as float64 vectors, of which only one is there at a time where they lie in memory as they are."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and not (x.is_quantized or x.is_complex())
    yield from map(as_reals, x.detach().reshape(-1).split(_PIECE)) if plain else as_reals(x).split(_PIECE)


def _compiled(after: Sequence[Tensor], before: Sequence[Tensor | None], scale: Tensor | None) -> Array:
    """int64 [tensors, bins], by the compiled kernel."""
    rows: list[int] = []
    for x, old in zip(after, before, strict=True):
        rows += (x.data_ptr(), x.numel(), native.TYPES[x.dtype], 0 if old is None else old.data_ptr())
    table, counts = np.array(rows, dtype=np.int64), np.zeros((len(after), BINS), np.int64)
    factor = 1.0 if scale is None else float(scale)
    _function()(table.ctypes.data, len(after), factor, counts.ctypes.data, torch.get_num_threads())
    return counts


@cache
def _function() -> Any:
    compiled = library()
    assert compiled is not None
    function = compiled.paramwatch_histograms
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_int64)
    function.restype = None
    return function
