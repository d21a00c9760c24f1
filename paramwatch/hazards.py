"""What in a freshly initialised parameter would stop learning, or make it slow to begin.

Behind `summary`: reads the numbers of one row and the modules that use it, and says what it found in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from paramwatch.laws import Numbers
from paramwatch.rows import Place
from paramwatch.standards import is_norm_scale, kind_of, scale_range, type_name

FAR = 10.0
"""A weight this many times larger or smaller than Xavier, Kaiming and PyTorch would make it is called out."""


def hazards(found: Sequence[Place], shape: tuple[int, ...], trainable: bool, x: Numbers | None, nonfinite: int) -> str:
    """What to warn of, "" if nothing.

    Args:
        found: All places of the row.
        shape: Of its tensor.
        trainable: What is not trained cannot stop learning; only non-finite elements count then.
        x: Its numbers, None where some are not finite.
        nonfinite: How many are not.
    """
    if x is None:
        return f"NaN or infinite elements ({nonfinite:,}): every output that they reach is so, too"
    return "; ".join(_of_weight(found, shape, x)) if trainable else ""


def _of_weight(found: Sequence[Place], shape: tuple[int, ...], x: Numbers) -> Iterator[str]:
    ranges = [(place, bounds) for place in found if (bounds := scale_range(place.holder, place.key, shape))]
    zero = x.low == x.high == 0
    if zero and (ranges or any(is_norm_scale(place.holder, place.key) for place in found)):
        yield "all zeros: at the first step no gradient passes through to the layers before it"
        return
    if not ranges:
        return
    place, (least, most) = ranges[0]
    if x.low == x.high and _units(place, shape) > 1:
        yield (
            "constant: all units have the same weights (symmetry is not broken) and stay alike unless something else tells them apart,"
            " such as their bias, outgoing weights, dropout or, in the last layer, their targets"
        )
    size = math.sqrt(x.square(0.0))
    if not 0 < size < math.inf:  # its square is no number: the largest element tells the size as well
        size = x.reach(0.0)
    # of fewer than four elements the size says little: a tenth comes by chance in more than one case of 10,000
    if x.n < 4:
        return
    of = "its size" if place is found[0] else f"{place.name} as a weight of {type_name(place.holder)}"
    usual = f"Xavier and Kaiming fan_in and PyTorch's default (rms {size:.3g}, theirs {least:.3g} to {most:.3g})"
    if size > FAR * most:
        yield f"{of} is {_factor(size / most)} times above {usual}: signals blow up"
    elif size < least / FAR:
        yield f"{of} is {_factor(least / size)} times below {usual}: signals fade"


def _units(place: Place, shape: tuple[int, ...]) -> int:
    """How many units see the same inputs: those of one group. A transposed convolution has its outputs second."""
    kind, groups = kind_of(place.holder), getattr(place.holder, "groups", None)
    if issubclass(kind, _ConvNd) and groups is None:  # traced, which loses them: there may be as many as outputs
        return 1
    if issubclass(kind, _ConvTransposeNd):
        return shape[1]
    return shape[0] // groups if isinstance(groups, int) and groups > 0 else shape[0]


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"
