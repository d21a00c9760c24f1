"""Many small tensors on the CPU, measured together: their elements laid end to end, and one pass over all of them for each part.

For a small model the cost of a measurement is the number of operations, not of elements: this takes as many for a thousand tensors as for
one. It gives the numbers of `naive`, and takes a few operations more where an element of any tensor is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from paramwatch.columns import Array
from paramwatch.measure.naive import ORDER
from paramwatch.storage import is_there

SMALL = 1 << 16
"""Elements up to which a tensor goes here; a larger one keeps the processor busy by itself."""

_SPECIAL = [ORDER.index(part) for part in ("nan", "posinf", "neginf")]
_TYPES = frozenset((Tensor, torch.nn.Parameter))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def fits(tensor: Tensor) -> bool:
    """Whether a tensor is of the plain kind that is measured here."""
    return (
        type(tensor) in _TYPES
        and tensor.is_cpu
        and tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= SMALL
        and not tensor.is_nested
        and is_there(tensor)
    )


def parts_of(tensors: Sequence[Tensor], before: Sequence[Tensor] | None = None) -> Array:
    """float64 [tensors, parts] of tensors that fit, or of their difference from others of the same sizes."""
    x = _flat(tensors)
    if before is not None:
        with np.errstate(all="ignore"):  # the difference of two infinities is not a number, and is counted as such
            x = x - _flat(before)
    return packed_parts(x, [tensor.numel() for tensor in tensors])


def _flat(tensors: Sequence[Tensor]) -> Array:
    """The elements of all tensors end to end, in float64."""
    laid: Tensor = _flatten_dense_tensors(tensors).detach()
    wide: Array = laid.to(torch.float64).numpy()
    return wide


def packed_parts(x: Array, sizes: Sequence[int]) -> Array:
    """float64 [tensors, parts] of the tensors that `x` holds end to end.

    Args:
        x: The elements of all.
        sizes: How many belong to each; none is 0.
    """
    n = np.asarray(sizes, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(n[:-1])))
    out = np.full((len(n), len(ORDER)), np.nan)
    column = {part: out[:, i] for i, part in enumerate(ORDER)}

    def total(of: Array) -> Array:
        return np.add.reduceat(of, starts, dtype=np.int64) if of.dtype == bool else np.add.reduceat(of, starts)

    with np.errstate(all="ignore"):
        column["count"][:] = n
        column["zero"][:] = 0 if x.all() else total(x == 0)
        low, high = np.minimum.reduceat(x, starts), np.maximum.reduceat(x, starts)
        out[:, _SPECIAL] = 0
        finite: Array | None = None
        # an extreme shows whatever is not finite, so that looking for it costs nothing
        if not np.isfinite(low + high).all():
            finite = np.isfinite(x)
            column["nan"][:], column["posinf"][:], column["neginf"][:] = total(np.isnan(x)), total(x == np.inf), total(x == -np.inf)
            low = np.minimum.reduceat(np.where(finite, x, np.inf), starts)
            high = np.maximum.reduceat(np.where(finite, x, -np.inf), starts)
            x, n = np.where(finite, x, 0.0), total(finite)
            low, high = np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)
        column["min"][:], column["max"][:] = low + 0.0, high + 0.0
        column["mean"][:] = total(x) / n
        apart = x - np.repeat(column["mean"], sizes)
        if finite is not None:
            apart[~finite] = 0.0
        column["std"][:] = np.sqrt(total(apart * apart) / n)
        column["rms"][:] = np.sqrt(total(x * x) / n)
    return out
