"""Numbers on their way from their devices to the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure.ring import Ring, Slot

Numbers: TypeAlias = tuple[Sequence[int], Array | Tensor]
"""Positions along the first axis, and what belongs there."""


class Reading:
    """Numbers on their way to the host. Nobody waits for them on the training thread.

    Args:
        numbers: Arrays or tensors of equal trailing shape, by the positions they fill, in ascending order.
        shape: Shape of the whole.
    """

    __slots__ = ("_hosts", "_shape", "_under_way")

    def __init__(self, numbers: Sequence[Numbers], shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._hosts: list[tuple[Sequence[int], Array]] = []
        self._under_way: list[tuple[Sequence[int], Slot]] = []
        for positions, found in numbers:
            if not isinstance(found, Tensor):
                self._hosts.append((positions, found))
            elif (ring := ring_of(found.device)) is None:
                self._hosts.append((positions, found.cpu().numpy()))
            elif (slot := ring.send(found.contiguous())) is not None:
                self._under_way.append((positions, slot))

    @property
    def ready(self) -> bool:
        """Whether `numpy` may be called: by any thread, while only the training thread may ask for this."""
        while self._under_way:
            positions, slot = self._under_way[-1]
            if not slot.ready:
                return False
            # into memory of its own: the background thread may come to it late, and slots are few
            self._hosts.append((positions, slot.numpy().copy()))
            self._under_way.pop()
            slot.release()
        return True

    def wait(self) -> None:
        """Block until `ready`: for flush and close only."""
        for _, slot in self._under_way:
            slot.wait()
        if not self.ready:
            raise RuntimeError("a copy was waited for and has not arrived")

    def numpy(self) -> Array:
        """float64, or int64 for counts; NaN where no tensor was given, or what was measured was dropped. Not to be written to."""
        if len(self._hosts) == 1 and len(self._hosts[0][0]) == self._shape[0]:
            return self._hosts[0][1]
        out = np.full(self._shape, np.nan)
        for positions, found in self._hosts:
            out[positions] = found
        return out


def read_scalars(values: Sequence[Tensor | float | None]) -> Reading:
    """Numbers, some of which may still be on a device, as one reading [n]."""
    plain = np.array([np.nan if value is None or isinstance(value, Tensor) else value for value in values], dtype=np.float64)
    tensors = [(i, value.detach().to(torch.float64).reshape(())) for i, value in enumerate(values) if isinstance(value, Tensor)]
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
