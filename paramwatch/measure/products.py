"""Inner products in the compiled kernel, each vector read once: the fast form of what `paramwatch.uses.gram` does in plain PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure.compiler import library
from paramwatch.measure.native import TYPES, available, takes

CHUNK = 1 << 16
"""Elements of each vector of which the kernel keeps sums apart."""


def can_multiply(vectors: Sequence[Tensor]) -> bool:
    """Whether the kernel reads all of these vectors."""
    return all(takes(x) and x.is_contiguous() for x in vectors) and available()


def products(grads: Sequence[Tensor], total: Tensor, pairs: bool) -> Array:
    """Inner products of K vectors, of `total`, and of `total` minus their sum: float64 [K + 2, K + 2].

    Args:
        grads: Of one size; `can_multiply` says whether they are taken.
        total: Of that size.
        pairs: Whether the K are multiplied with each other; NaN where they are not.
    """
    k, n = len(grads), total.numel()
    if any(grad.numel() != n for grad in grads):
        raise ValueError(f"the vectors have {[grad.numel() for grad in grads]} elements, their sum has {n}")
    table = np.array([(x.data_ptr(), TYPES[x.dtype]) for x in (*grads, total)], dtype=np.int64)
    found = np.empty((k + 2, k + 2))
    _function()(table.ctypes.data, k, n, pairs, found.ctypes.data, torch.get_num_threads())
    return found


@cache
def _function() -> Any:
    kernel = library()
    assert kernel is not None
    function = kernel.paramwatch_products
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
    function.restype = None
    return function
