"""What in a freshly initialised parameter would stop learning, or make it slow to begin.

Behind `summary`: reads the numbers of one row and the modules that use it, and says what it found in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from paramwatch.drawn import Law, Numbers
from paramwatch.rows import Place
from paramwatch.standards import is_known, is_norm_scale, kind_of, scale_range, scales, type_name

FAR = 10.0
"""A weight this many times larger or smaller than PyTorch would make it is called out, ..."""

APART = 3.0
"""... if it is this many times larger or smaller than Xavier and Kaiming would make it, too: they differ in extreme shapes."""


def hazards(found: Sequence[Place], shape: tuple[int, ...], trainable: bool, x: Numbers | None, nonfinite: int, default: Law | None) -> str:
    """What to warn of, "" if nothing.

    Args:
        found: All places of the row.
        shape: Of its tensor.
        trainable: What is not trained cannot stop learning; only non-finite elements count then.
        x: Its numbers, None where some are not finite.
        nonfinite: How many are not.
        default: What PyTorch gives the first place.
    """
    if x is None:
        return f"NaN or infinite elements ({nonfinite:,}): every output that they reach is so, too"
    if not trainable:
        return ""
    place, bounds = found[0], scales(kind_of(found[0].holder), found[0].key, shape, default)  # type: ignore[arg-type]  # as in `standards`
    for other in found[1:]:
        # an embedding that is also a head is judged as a head
        if bounds is None or bounds[0] == 0:
            of_other = scale_range(other.holder, other.key, shape)
            place, bounds = (other, of_other) if of_other else (place, bounds)
    if x.low == x.high == 0:
        fades = (bounds is not None and bounds[0] > 0) or any(is_norm_scale(place.holder, place.key) for place in found)
        return "all zeros: at the first step no gradient passes through to the layers before it" if fades else ""
    if bounds is None:
        # whoever writes a layer calls its weight what he likes; zeros are where many a thing begins that is added
        of_units = x.low == x.high and len(shape) == 2 and min(shape) > 1 and not is_known(place.holder)
        return f"{_CONSTANT}, if inputs are multiplied by it" if of_units else ""
    stuck = _CONSTANT if x.low == x.high and bounds[0] > 0 and _units(place, shape) > 1 else ""
    far = _scale("its size" if place is found[0] else f"{place.name} as a weight of {type_name(place.holder)}", x, *bounds)
    if far and place is not found[0]:
        # T5 divides the outputs of a head that has its embedding's weight; the model is not run, so that this is not seen
        far += ", unless the model scales them"
    return f"{stuck}; {far}" if stuck and far else stuck or far


_CONSTANT = (
    "constant: all units have the same weights (symmetry is not broken) and stay alike unless something else tells them apart,"
    " such as their bias, outgoing weights, dropout or, in the last layer, their targets"
)


def _scale(of: str, x: Numbers, least: float, usual: float, most: float) -> str:
    size = math.sqrt(x.square(0.0))
    if not 0 < size < math.inf:  # its square is no number: the largest element tells the size as well
        size = x.reach(0.0)
    # of fewer than four elements the size says little: a tenth comes by chance in more than one case of 10,000
    if x.n < 4 or min(usual / FAR, least / APART) <= size <= max(FAR * usual, APART * most):
        return ""
    beside = f"; with Xavier and Kaiming fan_in {least:.3g} to {most:.3g}" if least else ""
    standard = f"PyTorch's default (rms {size:.3g}, that {usual:.3g}{beside})"
    if size > usual:
        return f"{of} is {_factor(size / usual)} times above {standard}: signals blow up"
    return f"{of} is {_factor(usual / size)} times below {standard}: signals fade"


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
