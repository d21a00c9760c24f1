"""Many small tensors on the CPU, measured together: their elements laid end to end, and one pass over all of them for each part.

For a small model the cost of a measurement is the number of operations, not of elements: this takes as many for a thousand tensors as for
one. It gives the numbers of `naive`, which it calls for the tensors that hold a non-finite element.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure.naive import ORDER, parts

SMALL = 1 << 16
"""Elements up to which a tensor goes here; a larger one keeps the processor busy by itself."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fits(tensor: Tensor) -> bool:
    """Whether a tensor is of the plain kind that is measured here."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= SMALL
    )


def flat(tensors: Sequence[Tensor]) -> Array:
    """The elements of all tensors end to end, in float64."""
    vectors = [tensor.detach().reshape(-1) for tensor in tensors]
    first = vectors[0].dtype
    if any(vector.dtype is not first for vector in vectors):
        vectors = [vector.to(torch.float64) for vector in vectors]
    laid: Array = torch.cat(vectors).to(torch.float64).numpy()
    return laid


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
    with np.errstate(all="ignore"):
        column["count"][:] = n
        for part in ("nan", "posinf", "neginf"):
            column[part][:] = 0
        column["zero"][:] = np.add.reduceat(x == 0, starts, dtype=np.int64)
        column["mean"][:] = np.add.reduceat(x, starts) / n
        apart = x - np.repeat(column["mean"], n)
        column["std"][:] = np.sqrt(np.add.reduceat(apart * apart, starts) / n)
        column["rms"][:] = np.sqrt(np.add.reduceat(x * x, starts) / n)
        column["min"][:] = np.minimum.reduceat(x, starts)
        column["max"][:] = np.maximum.reduceat(x, starts)
    for i in np.flatnonzero(np.logical_or.reduceat(~np.isfinite(x), starts)):
        out[i] = parts(torch.from_numpy(x[starts[i] : starts[i] + n[i]])).numpy()
    return out
