"""The splits of some rows on their way to the host, and what they are once they are there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paramwatch.measure import Reading
from paramwatch.record import Split


@dataclass
class Sums:
    """What was found of one row."""

    names: list[str]
    """Of its uses, in the order of the forward pass."""
    mode: str
    backwards: int
    eps: float
    """Of the type in which the contributions were added."""
    products: Tensor
    """`gram` of the contributions, still on its device."""


class SplitReading:
    """Nobody waits for it on the training thread."""

    def __init__(self, rows: Sequence[tuple[str, Sums]]) -> None:
        self.reading = _reading([sums.products for _, sums in rows])
        # the tensors themselves are not kept
        self._rows = [(name, sums.names, sums.mode, sums.backwards, sums.eps) for name, sums in rows]

    def splits(self, grad_norm: Callable[[str], float]) -> dict[str, Split]:
        """The splits by row, once the reading is there.

        Args:
            grad_norm: Gives the norm of a row's gradient as the optimizer used it.
        """
        numbers, start, found = self.reading.numpy(), 0, {}
        for row, names, mode, backwards, eps in self._rows:
            k = len(names)
            size = (k + 2) ** 2
            products = np.array(numbers[start : start + size], dtype=np.float64).reshape(k + 2, k + 2)
            start += size
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                norms = np.sqrt(np.diagonal(products))
                # a gradient that was set to zero and not touched needs no use
                if not k and norms[0] == 0:
                    continue
                rounding = float(eps * math.sqrt(k * backwards) * norms[:k].sum())
                unit = float(grad_norm(row) / norms[k])
            found[row] = Split(tuple(names), mode, backwards, products, rounding, unit)
        return found


def _reading(products: Sequence[Tensor]) -> Reading:
    """All of them as one vector; what is on one device travels together."""
    sizes = [x.numel() for x in products]
    ends = list(itertools.accumulate(sizes))
    of_device: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for x, size, end in zip(products, sizes, ends, strict=True):
        positions, parts = of_device.setdefault(x.device, ([], []))
        positions += range(end - size, end)
        parts.append(x.reshape(-1))
    return Reading([(positions, torch.cat(parts)) for positions, parts in of_device.values()], (ends[-1],))
