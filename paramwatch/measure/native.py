"""The compiled kernel as a measuring path: which tensors it takes, the table of their addresses, the call.

Addresses are read by the kernel as they are, so whoever calls holds the tensors until the call is over, which it is when it returns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import PARTS, Array
from paramwatch.measure.compiler import library
from paramwatch.storage import has_address

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""As the kernel numbers them."""

NO_GRAD = -1

NOTHING = -1
"""The type of a row of the table where there is no tensor: its parts are NaN."""

_COLUMNS = 7
"""Of a row of the kernel's table: address, elements, type, address of the copy, address before the step, of the gradient, its type."""

_SHORT = 1 << 17
"""Elements that are measured faster than another thread could take over: below, Python's lock is kept."""

_PLAIN = (Tensor, torch.nn.Parameter)

_PARTS = len(PARTS)


def available() -> bool:
    """Whether there is a kernel. The first call may compile it."""
    return library() is not None


def takes(tensor: Tensor) -> bool:
    """Whether the kernel can read a tensor: plain, on the CPU, of a floating type, its elements side by side in memory that is there."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype in TYPES
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and (tensor.is_contiguous() or _is_dense(tensor))
        and not tensor.is_neg()
        and not tensor.is_nested
        and has_address(tensor)
    )


def are_alike(after: Tensor, before: Tensor, grad: Tensor | None) -> bool:
    """Whether a tensor that it takes can be compared with its copy, and multiplied by its gradient, element by element as they lie."""
    return after.dtype == before.dtype and _lie_alike(after, before) and (grad is None or _lie_alike(after, grad))


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not takes(other):
        return False
    # of a dimension of one element the stride means nothing
    return one.stride() == other.stride() or (one.is_contiguous() and other.is_contiguous())


def parts_of(tensors: Sequence[Tensor], copies: Sequence[Tensor] | None = None) -> Array:
    """float64 [tensors, parts].

    Args:
        tensors: Of those it `takes`.
        copies: Of the same sizes, types and strides: each tensor is copied there as it is read.
    """
    rows: list[int] = []
    total = 0
    for i, tensor in enumerate(tensors):
        n = tensor.numel()
        total += n
        rows += (tensor.data_ptr(), n, TYPES[tensor.dtype], 0 if copies is None else copies[i].data_ptr(), 0, 0, NO_GRAD)
    return _call(rows, len(tensors), total, None)


def update_parts(after: Sequence[Tensor], before: Sequence[Tensor], grads: Sequence[Tensor | None] | None = None) -> tuple[Array, Array]:
    """The parts of `after - before`, and those of `after`, float64 [tensors, parts] each.

    Args:
        after: Of those it `takes`.
        before: Of the same sizes, types and strides.
        grads: For the inner product; of those it takes, and of the same strides.
    """
    rows: list[int] = []
    total = 0
    for i, (new, old) in enumerate(zip(after, before, strict=True)):
        n, grad = new.numel(), None if grads is None else grads[i]
        total += 2 * n
        known = (0, NO_GRAD) if grad is None else (grad.data_ptr(), TYPES[grad.dtype])
        rows += (new.data_ptr(), n, TYPES[new.dtype], 0, old.data_ptr(), *known)
    itself = np.empty((len(after), _PARTS))
    return _call(rows, len(after), total, itself), itself


class Table:
    """What the kernel shall read of some tensors, made once for many calls: of these only the addresses change.

    Args:
        sizes: Elements of each.
        types: As the kernel numbers them, `NOTHING` where there is no tensor.
        copies: Where the elements are copied to as they are read.
        before: Where elements of the same type lie: what is measured is the difference from these.
    """

    def __init__(self, sizes: Sequence[int], types: Sequence[int], copies: Sequence[int] = (), before: Sequence[int] = ()) -> None:
        self._addresses: list[int] = []
        self._table = np.zeros((len(sizes), _COLUMNS), dtype=np.int64)
        self._table[:, 1], self._table[:, 2], self._table[:, 6] = sizes, types, NO_GRAD
        if copies:
            self._table[:, 3] = copies
        if before:
            self._table[:, 4] = before
        there = self._table[:, 2] != NOTHING
        self._all, self._there, self._column = bool(there.all()), np.flatnonzero(there), self._table[:, 0]
        self._at, self._rows = _at(self._table), len(sizes)
        self._long = sum(sizes) * (2 if before else 1) > _SHORT
        self._function = _functions()[self._long]

    def read(self, addresses: list[int], parts: int, after: int = 0) -> None:
        """Measure.

        Args:
            addresses: Where the elements are, one for each tensor that there is. Whoever calls holds the memory.
            parts: Where float64 [tensors, parts] go.
            after: Where those of what is compared with `before` itself go.
        """
        if addresses != self._addresses:
            self._addresses = addresses
            # this is quicker where it can be, and is done at nearly every step
            if self._all:
                self._column[:] = addresses
            else:
                self._column[self._there] = addresses
        self._function(self._at, self._rows, parts, after, torch.get_num_threads() if self._long else 1)


def _call(rows: list[int], count: int, total: int, after: Array | None) -> Array:
    table, parts = np.array(rows, dtype=np.int64), np.empty((count, _PARTS))
    function = _functions()[total > _SHORT]
    function(_at(table), count, _at(parts), None if after is None else _at(after), torch.get_num_threads())
    return parts


@cache
def _functions() -> tuple[Any, Any]:
    """The kernel for little work, which keeps Python's lock, and for much, which lets other threads run."""
    lets_go = library()
    assert lets_go is not None
    both = ctypes.PyDLL(lets_go._name).paramwatch_measure, lets_go.paramwatch_measure
    for function in both:
        function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        function.restype = None
    return both


def _at(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without a gap or an overlap, in whatever order (channels last, transposed)."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True
