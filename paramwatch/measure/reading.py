"""Numbers on their way from their devices to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array

Numbers: TypeAlias = tuple[Sequence[int], Array | Tensor]
"""Positions along the first axis, and what belongs there."""


class Reading:
    """Numbers on their way to the host. Nobody waits for them on the training thread.

    Args:
        numbers: Arrays or tensors of equal trailing shape, by the positions they fill, in ascending order.
        shape: Shape of the whole.
    """

    __slots__ = ("_events", "_hosts", "_shape")

    def __init__(self, numbers: Sequence[Numbers], shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._events: list[torch.cuda.Event] = []
        self._hosts: list[Numbers] = []
        for positions, found in numbers:
            if isinstance(found, Tensor) and found.is_cuda:
                # a non-blocking copy to the host lands in pinned memory; the event says when it is there
                self._hosts.append((positions, found.to("cpu", non_blocking=True)))
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(found.device))
                self._events.append(event)
            else:
                self._hosts.append((positions, found.cpu() if isinstance(found, Tensor) else found))

    @property
    def ready(self) -> bool:
        """Whether `numpy` may be called."""
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        """Block until `ready`: for flush and close only."""
        for event in self._events:
            event.synchronize()

    def numpy(self) -> Array:
        """float64, NaN where no tensor was given. Not to be written to."""
        if len(self._hosts) == 1 and len(self._hosts[0][0]) == self._shape[0]:
            return np.asarray(self._hosts[0][1])
        out = np.full(self._shape, np.nan)
        for positions, found in self._hosts:
            out[positions] = np.asarray(found)
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
