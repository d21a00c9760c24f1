"""Whether a weight is ten times off in size: against what PyTorch, Xavier and Kaiming give its layer, and against the rest of its model.

Behind `hazards`. A size is the root mean square of the elements.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from paramwatch.standards import Usual, fans, stds_of_layers

FAR = 10.0
"""A weight this many times larger or smaller than usual is called out."""

APART = 1.5
"""Measured by another scheme than PyTorch's it must also be this many times beyond all of them: of extreme shapes they differ."""

_FEW = 4
"""Of fewer elements the size says little: a tenth comes by chance in more than one case of 10,000."""

_EVERYWHERE = (0.05, 0.02, 0.01)
"""What GPT, BERT, ViT and ConvNeXt (0.02) and older networks give layers of every shape: judged by PyTorch's default alone."""

_HEAD = 8
"""Sizes of attention heads are not below."""

_DEEP = 6
"""Projections of three layers: with fewer, the root is as small as what chance does."""

_SAME = 0.1
"""Share by which sizes in one model may differ that are meant to be equal: those of small matrices are uncertain."""


class Weight(NamedTuple):
    """A weight of a model, as far as its size goes."""

    shape: tuple[int, ...]
    size: float
    n: int
    """Elements that it was measured on."""

    def is_near(self, size: float, times: float = 1.0) -> bool:
        """Whether its size may be that, but for chance."""
        return abs(self.size / size - 1) <= times * self.error

    @property
    def error(self) -> float:
        """Four standard errors of normal numbers, and what rounding leaves, as a share."""
        return 4 / math.sqrt(2 * self.n) + 0.005


class Sizes:
    """The sizes of all weights of a model: some are right only beside those of others."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self._of_shape: dict[tuple[int, ...], list[float]] = {}
        for weight in weights:
            self._of_shape.setdefault(weight.shape, []).append(weight.size)
        for sizes in self._of_shape.values():
            sizes.sort()
        self._sorted = sorted(size for sizes in self._of_shape.values() for size in sizes)

    def meant(self, weight: Weight) -> float:
        """The size to judge a weight by.

        The N projections into the residual stream of a deep model share one size, sqrt(N) times less than that of other weights (GPT-2):
        they are judged by those. The queries of T5 begin as its keys, with 1 / sqrt(fan_in), divided by the root of the size of a head.
        """
        alike = self._near(weight.size)
        if alike >= _DEEP and self._near(others := weight.size * math.sqrt(alike)):
            return others
        found = fans(weight.shape)
        keys = 1 / math.sqrt(found[0]) if found else 0.0
        alike_in_shape, error = self._of_shape.get(weight.shape, []), weight.error
        if bisect_right(alike_in_shape, keys * (1 + error)) == bisect_left(alike_in_shape, keys * (1 - error)):
            return weight.size
        heads = (size for size in range(_HEAD, weight.shape[0]) if weight.shape[0] % size == 0)
        return keys if any(weight.is_near(keys / math.sqrt(head)) for head in heads) else weight.size

    def _near(self, size: float) -> int:
        return bisect_right(self._sorted, size * (1 + _SAME)) - bisect_left(self._sorted, size * (1 - _SAME))


class Far(NamedTuple):
    """How a weight is far off."""

    said: str
    above: bool


def far_off(weight: Weight, usual: Usual, sizes: Sizes) -> Far | None:
    """How far a weight is off, None if it is not."""
    if weight.n < _FEW or (far := _compared(weight, usual)) is None:
        return None
    return far if (meant := sizes.meant(weight)) == weight.size else _compared(weight._replace(size=meant), usual)


def _compared(weight: Weight, usual: Usual) -> Far | None:
    size, (own, low, high, widest) = weight.size, usual
    if size > FAR * own:
        far = Far(f"{_factor(size / own)} times above PyTorch's default (rms {size:.3g}, that {own:.3g})", True)
    elif size > FAR * low > 0 and size > APART * high:
        far = Far(f"{_factor(size / low)} times above orthogonal (rms {size:.3g}, that {low:.3g}; PyTorch's default {own:.3g})", True)
    elif low and size < own / FAR and not any(std >= own / FAR and weight.is_near(std) for std in _EVERYWHERE):
        far = Far(f"{_factor(own / size)} times below PyTorch's default (rms {size:.3g}, that {own:.3g})", False)
    elif size < high / FAR and size < low / APART and not any(map(weight.is_near, _EVERYWHERE)):
        far = Far(f"{_factor(high / size)} times below {widest} (rms {size:.3g}, that {high:.3g}; PyTorch's default {own:.3g})", False)
    else:
        return None
    return None if low and _has_name(weight, far.above) else far


def _has_name(weight: Weight, above: bool) -> bool:
    """Whether it has the size that Xavier, Kaiming or an orthogonal matrix have in its shape; by its outputs it may only be smaller."""
    found = fans(weight.shape)
    return found is not None and any(map(weight.is_near, [*stds_of_layers(weight.shape, above), 1 / math.sqrt(max(found))]))


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"
