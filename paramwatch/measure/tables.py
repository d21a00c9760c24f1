"""What the Triton kernels are told of the tensors of a call: addresses, sizes, and which chunk is whose.

Sizes, dtypes and alignments make a plan, which is made once for a model. Addresses make a table of their own, which is sent again only when
one of them is new: parameters stay where they are, and of gradients the allocator mostly repeats the addresses. Tables go through pinned
memory, so that nobody waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure.native import TYPES

DTYPES = tuple(TYPES)

KEPT = 16
"""Tables that stay on the devices: of parameters, of gradients, and of the few layouts that gradients alternate between."""

_dtype_of = attrgetter("dtype")


@dataclass(frozen=True)
class Sizes:
    """What the kernels are compiled for. The tests take less, so that the edges come early."""

    chunk: int = 1 << 17
    """Bytes of a chunk: so many that its beginning and end cost little, so few that all of a GPU is busy with a model of 20 MB."""
    lanes: int = 1024
    warps: int = 8
    slow_lanes: int = 256
    registers: int = 80
    """Of a thread, for the update: three blocks of threads fit a multiprocessor then; above 85 only two."""
    few: int = 64
    """Chunks up to which one warp folds a row. It goes by the row alone: the order of its sums must not depend on what is beside it."""
    many_lanes: int = 1024
    many_warps: int = 16

    def elements(self, dtype: torch.dtype) -> int:
        """Of a chunk; of float64, which is read twice, half as many bytes, so that the second time is from the cache."""
        return self.chunk // (16 if dtype is torch.float64 else dtype.itemsize)


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: chunks of different variants need a launch each."""

    dtype: torch.dtype
    aligned: bool
    """At 16 bytes."""
    other_aligned: bool
    """The same of the copy, or of what was before."""
    grad_aligned: bool
    grad: torch.dtype | None

    @classmethod
    def of(cls, code: int) -> Variant:
        """From the number that `Layout` makes."""
        grad = DTYPES[(code >> 5) - 1] if code >> 5 else None
        return cls(DTYPES[code & 3], bool(code & 4), bool(code & 8), bool(code & 16), grad)


class Layout:
    """Where the elements of one call lie. Holds no tensor.

    Args:
        device: Where they lie.
        numel: How many there are of each tensor.
        types: Of each, as `native.TYPES` numbers them.
        addresses: Of the tensors; of their copies, to be written or to be compared with; of their gradients, 0 for none.
        grad_types: Of the gradients, -1 for none.
    """

    def __init__(
        self, device: torch.device, numel: Array, types: Array, addresses: Sequence[Array], grad_types: Array | None = None
    ) -> None:
        self.device, self.numel = device, numel
        self.copied = len(addresses) > 1
        aligned = addresses[0] % 16 == 0
        self.codes = types + (aligned << 2)
        if self.copied:
            # beside a tensor that is not aligned everything is read element by element
            self.codes += (aligned & (addresses[1] % 16 == 0)) << 3
        if grad_types is not None:
            self.codes += ((aligned & (addresses[-1] != 0) & (addresses[-1] % 16 == 0)) << 4) + ((1 + grad_types) << 5)
        self._addresses = np.concatenate(addresses)
        self._sent: dict[tuple[Sizes, int], tuple[Plan, Tensor]] = {}

    @classmethod
    def of(cls, tensors: Sequence[Tensor], others: Sequence[Tensor] | None = None, grads: Sequence[Tensor | None] | None = None) -> Layout:
        """Of tensors on one device, their copies, and their gradients with None for "no gradient"."""
        n = len(tensors)
        numel, addresses, grad_types = _numbers(Tensor.numel, tensors), [_numbers(Tensor.data_ptr, tensors)], None
        if others is not None:
            _check(numel, others)
            addresses.append(_numbers(Tensor.data_ptr, others))
        if grads is not None:
            given = np.array([grad is not None for grad in grads], bool)
            pulls = [grad for grad in grads if grad is not None]
            _check(numel[given], pulls)
            at, grad_types = np.zeros(n, np.int64), np.full(n, -1, np.int64)
            at[given] = _numbers(Tensor.data_ptr, pulls)
            grad_types[given] = types_of(pulls)
            addresses.append(at)
        return cls(tensors[0].device, numel, types_of(tensors), addresses, grad_types)

    def sent(self, sizes: Sizes, stream: int) -> tuple[Plan, Tensor]:
        """`plan` and `addresses`; who keeps the layout for the next time needs nobody to look for them."""
        known = self._sent.get((sizes, stream))
        if known is None:
            known = self._sent[sizes, stream] = self.plan(sizes, stream), self.addresses(stream)
        return known

    def plan(self, sizes: Sizes, stream: int) -> Plan:
        """Who reads what, on the device."""
        return _plan(self.device, stream, sizes, self.codes.tobytes(), self.numel.tobytes())

    def addresses(self, stream: int) -> Tensor:
        """int64 on the device: of the tensors, behind them of the others, behind these of the gradients."""
        return _address_table(self.device, stream, self._addresses.tobytes())


def types_of(tensors: Sequence[Tensor]) -> Array:
    """int64, as `native.TYPES` numbers them."""
    return np.fromiter(map(TYPES.__getitem__, map(_dtype_of, tensors)), np.int64, len(tensors))


@dataclass(frozen=True)
class Launch:
    """The chunks of one variant."""

    variant: Variant
    base: int
    chunks: int


@dataclass(frozen=True)
class Plan:
    """Who reads what."""

    table: Tensor
    """As `triton_tiles` says."""
    launches: tuple[Launch, ...]
    chunks: int
    few: int
    """Rows that one warp folds; in the table they come before the others."""


# streams are part of the keys, since a table that was sent on one stream need not have arrived on another


@lru_cache(maxsize=KEPT)
def _plan(device: torch.device, stream: int, sizes: Sizes, codes: bytes, numel: bytes) -> Plan:
    code, n = np.frombuffer(codes, np.int64), np.frombuffer(numel, np.int64)
    count = -(-n // np.array([sizes.elements(dtype) for dtype in DTYPES])[code & 3])
    order = np.argsort(code, kind="stable")
    base = np.zeros(len(n), np.int64)
    base[order] = np.cumsum(count[order]) - count[order]
    launches = []
    for value in np.unique(code):
        chosen = np.flatnonzero(code == value)
        if chunks := int(count[chosen].sum()):
            launches.append(Launch(Variant.of(int(value)), int(base[chosen[0]]), chunks))
    few = count <= sizes.few
    turns = np.concatenate((np.flatnonzero(few), np.flatnonzero(~few)))
    table = np.concatenate((n, base, count, code >> 5 != 0, turns, np.repeat(order, count[order])))
    return Plan(_sent(device, table), tuple(launches), int(count.sum()), int(few.sum()))


@lru_cache(maxsize=KEPT)
def _address_table(device: torch.device, stream: int, addresses: bytes) -> Tensor:
    return _sent(device, np.frombuffer(addresses, np.int64))


def forget() -> None:
    """Give back the memory of all tables."""
    _plan.cache_clear()
    _address_table.cache_clear()


def _sent(device: torch.device, numbers: Array) -> Tensor:
    """A copy on the device by way of pinned memory, which torch gives to nobody else before the device has read it."""
    host = torch.from_numpy(np.array(numbers, np.int64))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _numbers(of: Callable[[Tensor], int], tensors: Sequence[Tensor]) -> Array:
    return np.fromiter(map(of, tensors), np.int64, len(tensors))


def _check(numel: Array, others: Sequence[Tensor]) -> None:
    # beyond the end of a smaller tensor a kernel would read, or write, what belongs to others
    if not np.array_equal(numel, _numbers(Tensor.numel, others)):
        raise ValueError("tensors that are measured beside each other differ in size")
