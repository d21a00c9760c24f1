"""How much of each parameter `summary` looks at: all of it, or a sample beside what is cheap to know of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from paramwatch.columns import Array
from paramwatch.measure import SAMPLE, sample
from paramwatch.measure.naive import as_reals

EXACT = 1 << 20
"""Elements up to which all of a tensor is measured; of a larger one extremes are exact, the rest a sample's."""

EXACT_TOGETHER = 1 << 24
"""Elements up to which all such tensors are measured; of a model with more the small ones alone, up to the size of a sample."""

JUDGED_TOGETHER, JUDGED_LEAST = 1 << 23, 1024
"""Elements that all samples have together, and what one of them has at least. It has `SAMPLE` at most."""

_PLAIN = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_READABLE = frozenset((torch.float32, torch.float64))


@dataclass(frozen=True, slots=True)
class Limits:
    """What so many rows leave time for."""

    exact: int
    """Elements up to which all of a tensor is measured."""
    judged: int
    """Elements of a tensor that the shape of its distribution is judged on."""

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Limits:
        """For tensors of so many elements."""
        judged = min(SAMPLE, max(JUDGED_LEAST, JUDGED_TOGETHER // max(len(sizes), 1)))
        fits = sum(size for size in sizes if size <= EXACT) <= EXACT_TOGETHER
        return cls(EXACT if fits else judged, judged)


@dataclass(frozen=True, slots=True)
class Whole:
    """What is cheap to know of all elements of a large tensor."""

    n: int
    low: float
    high: float
    zeros: int


def looked(tensor: Tensor | None, limits: Limits) -> tuple[Tensor | None, Whole | None]:
    """What is measured: all of a tensor, or a sample beside what is known of all; all of it where something is not finite."""
    if tensor is None or tensor.numel() <= limits.exact:
        return tensor, None
    whole = _whole(tensor)
    finite = math.isfinite(whole.low) and math.isfinite(whole.high)
    return (sample(tensor, limits.judged), whole) if finite else (tensor, None)


def _whole(tensor: Tensor) -> Whole:
    x = tensor.detach()
    if type(tensor) not in (Tensor, nn.Parameter) or x.layout is not torch.strided or x.dtype not in _PLAIN:
        x = as_reals(tensor)
    low, high = x.aminmax()
    return Whole(x.numel(), float(low), float(high), x.numel() - int(x.count_nonzero()))


def elements(tensor: Tensor, most: int) -> Array:
    """A sample of the elements, all of them if they are few; those that NumPy can read where they are are not copied."""
    if tensor.numel() > most:
        return sample(tensor, most).cpu().numpy()
    x = tensor.detach()
    readable = type(tensor) in (Tensor, nn.Parameter) and x.is_cpu and x.dtype in _READABLE and x.layout is torch.strided
    return x.reshape(-1).numpy() if readable else as_reals(tensor).cpu().numpy()


def lines(tensor: Tensor) -> Callable[[Sequence[int]], Array] | None:
    """Gives some rows of a matrix in float64, columns where it has more rows than columns; None where it is no matrix of reals."""
    if not _is_real_matrix(tensor):
        return None

    def chosen(at: Sequence[int]) -> Array:
        if tensor.numel() <= SAMPLE:
            # all are at hand
            whole = elements(tensor, SAMPLE).reshape(tensor.shape[0], -1)
            some: Array = (whole if whole.shape[0] <= whole.shape[1] else whole.T)[list(at)].astype(np.float64)
            return some
        w = tensor.detach().reshape(tensor.shape[0], -1)
        w = w if w.shape[0] <= w.shape[1] else w.T
        found: Array = as_reals(w[list(at)]).reshape(len(at), -1).cpu().numpy()
        return found

    return chosen


def column_zeros(tensor: Tensor) -> Callable[[], Array] | None:
    """Gives how many elements of each column are zero; None where it is no matrix of reals."""
    if tensor.dim() != 2 or not _is_real_matrix(tensor):
        return None

    def counted() -> Array:
        found: Array = (tensor.detach() == 0).sum(0).cpu().numpy()
        return found

    return counted


def _is_real_matrix(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and not tensor.is_complex() and tensor.layout is torch.strided and not hasattr(tensor, "to_local")
