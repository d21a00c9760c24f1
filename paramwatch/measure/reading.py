"""Numbers on their way from their devices to the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure.capture import capturing
from paramwatch.measure.ring import Ring, Slot

Numbers: TypeAlias = tuple[Sequence[int], Array | Tensor]
"""Positions along the first axis, and what belongs there."""


class Reading:
    """Numbers on their way to the host. Nobody waits for them on the training thread.

    What is on a device stays there until it is sent, so that all readings of a step can travel together (`send`).

    Args:
        numbers: Arrays or tensors of equal trailing shape, of 8 bytes an element, by the positions they fill, in ascending order.
        shape: Shape of the whole.
        into: An array of that shape which they shall be written to, of positions that are all filled.
    """

    __slots__ = ("_hosts", "_into", "_shape", "_there", "_under_way")

    def __init__(self, numbers: Sequence[Numbers], shape: tuple[int, ...], into: Array | None = None) -> None:
        self._shape, self._into = shape, into
        self._hosts: list[tuple[Sequence[int], Array]] = []
        self._there: list[tuple[Sequence[int], Tensor, Any]] = []
        self._under_way: list[_Part] = []
        for positions, found in numbers:
            if not isinstance(found, Tensor):
                self._take(positions, found)
            elif (ring := ring_of(found.device)) is not None:
                self._there.append((positions, found, ring.queue(found)))
            else:
                self._take(positions, found.cpu().numpy())

    @property
    def rows(self) -> int:
        """Along the first axis."""
        return self._shape[0]

    @property
    def ready(self) -> bool:
        """Whether `numpy` may be called: by any thread, while only the training thread may ask for this."""
        if self._there:
            send((self,))
        while self._under_way:
            part = self._under_way[-1]
            if not part.load.ready:
                return False
            self._take(part.positions, part.numpy())
            self._under_way.pop()
        return not self._there

    def wait(self) -> None:
        """Block until `ready`: for flush and close only."""
        if self._there:
            send((self,))
        for part in self._under_way:
            part.load.wait()
        if not self.ready:
            raise RuntimeError("a copy was waited for and has not arrived")

    def _take(self, positions: Sequence[int], numbers: Array) -> None:
        if self._into is not None:
            self._into[...] = numbers
            numbers = self._into
        self._hosts.append((positions, numbers))

    def numpy(self) -> Array:
        """float64, or int64 for counts; NaN where no tensor was given, or what was measured was dropped. Not to be written to."""
        if len(self._hosts) == 1 and len(self._hosts[0][0]) == self._shape[0]:
            return self._hosts[0][1]
        out = np.full(self._shape, np.nan)
        for positions, found in self._hosts:
            out[positions] = found
        return out


def send(readings: Iterable[Reading]) -> None:
    """Everything of these that is still on a device: by one copy from each stream of each, most often by one copy.

    While a CUDA graph is captured nothing is sent; a reading that was not is sent when it is asked for.
    """
    together: dict[tuple[torch.device, Any], list[tuple[Reading, Sequence[int], Tensor]]] = {}
    for reading in readings:
        if reading._there:
            if capturing():
                return
            for positions, tensor, queue in reading._there:
                together.setdefault((tensor.device, queue), []).append((reading, positions, tensor))
            reading._there = []
    for (device, queue), parts in together.items():
        ring = ring_of(device)
        assert ring is not None
        slot = ring.send([tensor for _, _, tensor in parts], queue)
        if slot is None:
            continue
        load, start = _Load(slot), 0
        for reading, positions, tensor in parts:
            kind = np.int64 if tensor.dtype == torch.int64 else np.float64
            reading._under_way.append(_Part(positions, load, start, tuple(tensor.shape), kind))
            start += tensor.numel()


class _Load:
    """What was sent by one copy, of one reading or of several."""

    __slots__ = ("_numbers", "_slot")

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._numbers: Array | None = None

    @property
    def ready(self) -> bool:
        if self._numbers is None and self._slot.ready:
            # into memory of its own: the background thread may come to it late, and slots are few
            self._numbers = self._slot.numpy().copy()
            self._slot.release()
        return self._numbers is not None

    def wait(self) -> None:
        if self._numbers is None:
            self._slot.wait()

    def numpy(self) -> Array:
        """Everything, as if of int64."""
        assert self._numbers is not None
        return self._numbers


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a load, what belongs to one reading."""

    positions: Sequence[int]
    load: _Load
    start: int
    shape: tuple[int, ...]
    kind: type[np.int64 | np.float64]

    def numpy(self) -> Array:
        found: Array = self.load.numpy()[self.start : self.start + math.prod(self.shape)].view(self.kind).reshape(self.shape)
        return found


def read_scalars(values: Sequence[Tensor | float | None]) -> Reading:
    """Numbers, some of which may still be on a device, as one reading [n]."""
    plain = np.array([np.nan if value is None or isinstance(value, Tensor) else value for value in values], dtype=np.float64)
    # the rate of a group of parameters is one tensor, which stands here once for each of them
    distinct = {id(value): value for value in values if isinstance(value, Tensor)}
    made = {key: value.detach().to(torch.float64).reshape(()) for key, value in distinct.items()}
    tensors = [(i, made[id(value)]) for i, value in enumerate(values) if id(value) in made]
    return Reading([(range(len(values)), plain), *stacked(tensors)], (len(values),))


def stacked(numbers: Sequence[tuple[int, Tensor]]) -> list[Numbers]:
    """Tensors of equal shape, by position, as one for each device."""
    groups: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for i, tensor in numbers:
        positions, tensors = groups.setdefault(tensor.device, ([], []))
        positions.append(i)
        tensors.append(tensor)
    return [(positions, torch.stack(tensors)) for positions, tensors in groups.values()]


@cache
def ring_of(device: torch.device) -> Ring | None:
    """What numbers travel by from a device, None where they are at hand. All Watches share it: most of its slots are free at any time."""
    return Ring() if device.type == "cuda" else None
