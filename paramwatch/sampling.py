"""How much of each parameter `summary` looks at: all of it, or a sample beside what is cheap to know of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.drawn import Answers, Rows
from paramwatch.initial import Lines
from paramwatch.measure import SAMPLE, sample
from paramwatch.measure.naive import ORDER, as_reals
from paramwatch.measure.native import available, takes
from paramwatch.rows import is_plain

EXACT, EXACT_TOGETHER = 1 << 20, 1 << 24
"""Elements up to which all of a tensor is measured (of a larger one extremes are exact, the rest a sample's), and all such tensors together
(of a model with more the small ones alone, up to the size of a sample)."""

EXACT_COMPILED = 1 << 28
"""Either where the compiled kernel reads them."""

JUDGED_TOGETHER, JUDGED_LEAST = 1 << 23, 1024
"""Elements that all samples have together, and what one of them has at least. It has `SAMPLE` at most."""

_COUNT = ORDER.index("count")
AS_IT_IS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
READABLE = frozenset((torch.float32, torch.float64))
_SPARSE = frozenset((torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc))


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
        exact, together = (EXACT_COMPILED, EXACT_COMPILED) if available() else (EXACT, EXACT_TOGETHER)
        fits = sum(size for size in sizes if size <= exact) <= together
        return cls(exact if fits else judged, judged)


@dataclass(frozen=True, slots=True)
class Whole:
    """What is cheap to know of all elements of a large tensor, or of a sparse one."""

    n: int
    low: float
    high: float
    zeros: int
    stored: int
    """How many elements the measured ones are all or a sample of; those that a sparse tensor does not store are zero."""


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the local shard of a sharded one."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local().detach()
    return tensor.detach().resolve_neg() if tensor.is_neg() else tensor


def stored(x: Tensor) -> Tensor:
    """The elements that a sparse tensor stores, all of another."""
    if x.layout not in _SPARSE:
        return x
    return (x.detach().coalesce() if x.layout is torch.sparse_coo else x.detach()).values()


def looked(x: Tensor | None, limits: Limits) -> tuple[Tensor | None, Whole | None]:
    """What is measured: all of a tensor, or a sample beside what is known of all; all of it where something is not finite.

    Args:
        x: As `held` gives it. Of a sparse one the stored elements are measured.
        limits: What there is time for.
    """
    if x is None:
        return None, None
    exact = min(limits.exact, EXACT)
    if x.layout not in _SPARSE and (x.numel() <= limits.judged or (is_plain(x) and x.numel() <= exact)):
        return x, None
    if x.numel() <= limits.exact and takes(x):
        return x, None
    x, n = x.detach(), x.numel() * (2 if x.is_complex() else 1)
    part = stored(x)
    part = part if is_plain(part) else as_reals(part)
    whole = _whole(part, n)
    few = part.numel() <= exact or not (math.isfinite(whole.low) and math.isfinite(whole.high))
    return (part if few else sample(part, limits.judged)), whole if x.layout in _SPARSE or not few else None


def _whole(part: Tensor, n: int) -> Whole:
    x = part if part.dtype in AS_IT_IS else as_reals(part)
    rest = n - x.numel()
    low, high = (float(end) for end in x.aminmax()) if x.numel() else (0.0, 0.0)
    if rest:
        # a comparison with NaN is false, and leaves it
        low, high = (0.0 if low > 0 else low), (0.0 if high < 0 else high)
    return Whole(n, low, high, n - int(x.count_nonzero()), x.numel())


def completed(numbers: Array, wholes: Sequence[Whole | None]) -> tuple[Array, Array]:
    """Puts what is known of all elements into the parts [part, row] of those that were measured.

    Returns:
        How many elements each row has, and whether all that it stores were measured [row].
    """
    totals: Array = numbers[_COUNT].copy()
    exact = np.full(len(wholes), True)
    at = [i for i, whole in enumerate(wholes) if whole is not None]
    if not at:
        return totals, exact
    known = [whole for whole in wholes if whole is not None]
    n, low, high, zeros, here = np.array([(whole.n, whole.low, whole.high, whole.zeros, whole.stored) for whole in known]).T
    seen, share = numbers[_COUNT, at], here / n
    totals[at], exact[at] = n, seen == here
    # where a sample is measured, so many are those of the whole that it stands for
    count = np.where(here > 0, seen / np.maximum(share, 1 / n), n)
    for part, values in (("count", count), ("min", low), ("max", high), ("zero", zeros / n * count)):
        numbers[ORDER.index(part), at] = values
    # beside what is stored all else is zero
    some = np.array(at)[here < n]
    mean, square = (np.where(here > 0, numbers[ORDER.index(part), at] ** k * share, 0.0) for part, k in (("mean", 1), ("rms", 2)))
    for part, values in (("mean", mean), ("rms", np.sqrt(square)), ("std", np.sqrt(np.maximum(square - mean**2, 0.0)))):
        numbers[ORDER.index(part), some] = values[here < n]
    return totals, exact


def elements(x: Tensor, most: int) -> Array:
    """A sample of the elements, all of them if they are few; those that NumPy can read where they are are not copied."""
    if x.numel() > most:
        return sample(x, most).cpu().numpy()
    readable = x.is_cpu and x.dtype in READABLE and is_plain(x)
    return x.detach().reshape(-1).numpy() if readable else as_reals(x).cpu().numpy()


class Source(NamedTuple):
    """What `initial` asks of the elements of one tensor."""

    here: Tensor
    """As `held` gives it."""
    shape: tuple[int, ...]
    """Of the tensor, wherever the rest of it is."""
    looked_at: Tensor
    most: int
    """How many elements the shape of its distribution is judged on."""
    answers: Answers
    rows: Rows
    """What is known of its rows."""

    def ascending(self) -> Array:
        """A sample of the elements, all of them if they are few, in float64."""
        # sorting is quicker in the precision they have
        return np.sort(elements(self.looked_at, self.most)).astype(np.float64, copy=False)

    def lines(self) -> tuple[Lines | None, int | None]:
        """Gives some rows of a matrix in float64, columns where it has more rows than columns; and how many are held, if not all of them.

        None where it is no matrix of reals, or where the shard holds no whole rows (columns).
        """
        x, shape = self.here, self.shape
        if not _is_real_matrix(x, shape):
            return None, None
        rows, width, all_here = shape[0], math.prod(shape[1:]), x.shape == shape
        columns = rows > width
        if not all_here:
            if x.shape[0] != rows if columns else x.shape[1:] != shape[1:]:
                return None, None
            rows, width = x.shape[0], math.prod(x.shape[1:])

        def chosen(at: Sequence[int]) -> Array:
            if x.numel() <= SAMPLE:
                # all are at hand
                whole = elements(x, SAMPLE).reshape(rows, width)
                some: Array = (whole.T if columns else whole)[list(at)].astype(np.float64)
                return some
            w = _picked(x).reshape(rows, width)
            found: Array = as_reals((w.T if columns else w)[list(at)]).reshape(len(at), -1).cpu().numpy()
            return found

        return chosen, (None if all_here else width if columns else rows)

    def column_zeros(self) -> Array | None:
        """How many elements of each column are zero; None where it is no matrix of reals, or not all of it is here."""
        x, shape = self.here, self.shape
        if len(shape) != 2 or not _is_real_matrix(x, shape) or x.shape != shape:
            return None
        found: Array = (_picked(x).reshape(shape) == 0).sum(0).cpu().numpy()
        return found


def _picked(x: Tensor) -> Tensor:
    """Elements that can be picked out: those of a quantised tensor, or of one that knows few operations, are made plain."""
    return x.detach() if is_plain(x) else as_reals(x)


def _is_real_matrix(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.dim() == len(shape) > 1 and not x.is_complex() and x.layout is torch.strided
