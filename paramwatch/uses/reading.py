"""The splits of some rows on their way to the host, and what they are once they are there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from paramwatch.agreement import is_explained
from paramwatch.columns import Array
from paramwatch.measure import Reading
from paramwatch.record import Split

LEFT, CHANGED, LATER, LAST, PART = "left over", "changed between", "changed later", "last backward", "not all of it"
"""What the mode says of a gradient that was there before the first pass, that was changed between two or after the last one (by more than
a factor), of which only the last pass counts, and of which the uses are a part where nothing but their norms was kept."""


@dataclass
class Sums:
    """What was found of one row."""

    names: list[str]
    """Of its uses, in the order of the forward pass."""
    mode: str
    backwards: float | Tensor
    """Over how many passes; float64 [] on its device where that is only known there."""
    eps: float
    """Of the type in which the contributions were added."""
    products: Tensor
    """`gram` of the contributions, still on its device."""
    single: bool = False
    """Whether it is a single use, told only where it is not all of the gradient."""
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    """What the mode says as well unless the number, float64 [] on its device, is 0."""


class SplitReading:
    """Nobody waits for it on the training thread."""

    def __init__(self, rows: Sequence[tuple[str, Sums]]) -> None:
        # the tensors themselves are not kept
        self._rows = [(name, sums.names, sums.mode, sums.eps, sums.single, list(sums.notes)) for name, sums in rows]
        self._backwards = [None if isinstance(sums.backwards, Tensor) else sums.backwards for _, sums in rows]
        self.reading = _reading([x for _, sums in rows for x in _tensors_of(sums)])

    def splits(self, grad_norm: Callable[[str], float]) -> dict[str, Split]:
        """The splits by row, once the reading is there.

        Args:
            grad_norm: Gives the norm of a row's gradient as the optimizer used it.
        """
        numbers, found = iter(self.reading.numpy().tolist()), {}
        for (row, names, mode, eps, single, labels), known in zip(self._rows, self._backwards, strict=True):
            k = len(names)
            products = np.array(list(itertools.islice(numbers, (k + 2) ** 2))).reshape(k + 2, k + 2)
            backwards = next(numbers) if known is None else known
            # NaN is not 0
            mode = ", ".join([mode, *(label for label in labels if next(numbers) != 0)])
            if known is None:
                names, products = _without_zeroed(names, products)
            split = _split(row, names, mode, backwards, eps, products, grad_norm)
            if split is not None and not (single and is_explained(split)):
                found[row] = split
        return found


def _split(
    row: str, names: Sequence[str], mode: str, backwards: float, eps: float, products: Array, grad_norm: Callable[[str], float]
) -> Split | None:
    k = len(names)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.sqrt(np.diagonal(products))
        # a gradient that was set to zero and not touched needs no use
        if not k and norms[0] == 0:
            return None
        rounding = float(eps * math.sqrt(k * backwards) * norms[:k].sum())
        unit = float(grad_norm(row) / norms[k])
    return Split(tuple(names), mode, int(backwards), products, rounding, unit)


def _without_zeroed(names: Sequence[str], products: Array) -> tuple[list[str], Array]:
    """Without the uses of passes after which the gradient was set to zero."""
    kept = [i for i in range(len(names)) if products[i, i] != 0]
    both = [*kept, len(names), len(names) + 1]
    return [names[i] for i in kept], products[np.ix_(both, both)]


def _tensors_of(sums: Sums) -> Iterable[Tensor]:
    """What travels, in order."""
    backwards = [sums.backwards] if isinstance(sums.backwards, Tensor) else []
    return [sums.products, *backwards, *sums.notes.values()]


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
