"""What in freshly initialised parameters would stop learning, or make it slow to begin.

Behind `summary`: reads the numbers of all rows and the modules that use them, and says what it found in words. `scale` tells what is ten
times off, `branches` which zeros may be meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from paramwatch.branches import Branches
from paramwatch.drawn import Numbers
from paramwatch.rows import Place, is_plain
from paramwatch.scale import Far, Sizes, Weight, far_off
from paramwatch.standards import Usual, default_of, is_embedding, is_known, is_norm_scale, kind_of, type_name, usual_of
from paramwatch.standins import StandIn, stand_ins


class Read(NamedTuple):
    """What is known of one parameter tensor."""

    places: Sequence[Place]
    tensor: torch.Tensor
    shape: tuple[int, ...]
    numbers: Numbers | None
    """None where some are not finite."""
    nonfinite: int
    """How many are not."""
    may_repeat: bool | None = None
    """As `Rows.may_repeat`."""


class Hazard(NamedTuple):
    """What there is to say of a row; "" if nothing."""

    warning: str = ""
    note: str = ""
    """What may be meant: it depends on how the model uses it, and that is not seen."""


_NO_HAZARD = Hazard()


def hazards(module: nn.Module, rows: Sequence[Read]) -> list[Hazard]:
    """What to say of each row of a model that has values to look at."""
    return _Hazards(module, rows).found()


class _Hazards:
    def __init__(self, module: nn.Module, rows: Sequence[Read]) -> None:
        of = stand_ins(module)
        self._rows = rows
        self._stand_ins = [[of(place, row.shape) for place in row.places] for row in rows]
        known = [(stand_ins[0], row, x) for stand_ins, row in zip(self._stand_ins, rows, strict=True) if (x := row.numbers) is not None]
        zeros = frozenset(id(row.tensor) for _, row, x in known if x.low == x.high == 0)
        filled = ((stand_in, row.tensor.requires_grad) for stand_in, row, _ in known if id(row.tensor) not in zeros)
        self._branches = Branches(module, filled, zeros)
        self._sizes = Sizes(_weight(stand_in, x) for stand_in, row, x in known if len(row.shape) > 1)

    def found(self) -> list[Hazard]:
        return [self._of(row, stand_ins) for row, stand_ins in zip(self._rows, self._stand_ins, strict=True)]

    def _of(self, row: Read, stand_ins: Sequence[StandIn]) -> Hazard:
        x = row.numbers
        if x is None:
            return Hazard(f"NaN or infinite elements ({row.nonfinite:,}): every output that they reach is so, too")
        # what is not trained cannot stop learning, and of biases and scales nothing is usual
        if not row.tensor.requires_grad or (x.low < x.high and max([len(each.shape) for each in stand_ins]) < 2):
            return _NO_HAZARD
        usual = [_usual(each) for each in stand_ins]
        tables = [i for i, each in enumerate(stand_ins) if is_embedding(each.holder) and each.key == "weight"]
        weights = [i for i, found in enumerate(usual) if found and i not in tables]
        # an embedding that is also a head is judged as a head
        first = (weights or tables or [0])[0]
        used = stand_ins[first]
        if x.low == x.high == 0:
            return self._of_zeros(used)
        stuck = _constant(used) if x.low == x.high else _repeated(used, row)
        if (far := self._far(used, usual[first], x)) is None:
            return Hazard(stuck)
        fault = f"{stuck}; " if stuck else ""
        if used.part == "direction":
            return Hazard(f"{fault}its size is {far.said}: only its direction counts, and the larger it is, the slower that turns")
        place = row.places[first if weights else 0]
        size = "its size" if place is row.places[0] else f"{place.name} as a weight of {type_name(place.holder)}"
        said = f"{size} is {far.said}: signals {'blow up' if far.above else 'fade'}"
        if weights and tables and not self._far(stand_ins[tables[0]], usual[tables[0]], x):
            # T5 divides the outputs of a head that has its embedding's weight
            return Hazard(stuck, f"{said}, unless the model scales them")
        return Hazard(f"{fault}{said}")

    def _far(self, used: StandIn, usual: Usual | None, x: Numbers) -> Far | None:
        return None if usual is None else far_off(_weight(used, x), usual, self._sizes)

    def _of_zeros(self, zero: StandIn) -> Hazard:
        if zero.part == "direction":
            return Hazard("all zeros: it is divided by its own length, which is NaN")
        if is_embedding(zero.holder):
            return Hazard(_NO_VECTORS if zero.key == "weight" else "")
        if not (_usual(zero) or is_norm_scale(zero.holder, zero.key)) or self._branches.add_to_frozen(zero):
            return Hazard()
        if self._branches.start_as_nothing(zero):
            return Hazard(note=_NOTHING)
        return Hazard(_NO_GRADIENT)


_NO_GRADIENT = "all zeros: at the first step no gradient passes through to the layers before it"
_NO_VECTORS = "all zeros: what is looked up is nothing, and the weights that only this is multiplied by get no gradient at the first step"
_NOTHING = "all zeros, the bias, too: it starts as nothing, as is meant of a branch that is added to something else, or of a head"
_ALIKE = (
    "(symmetry is not broken) and stay alike unless something else tells them apart,"
    " such as their bias, outgoing weights, dropout or, in the last layer, their targets"
)


def _constant(used: StandIn) -> str:
    if is_embedding(used.holder):
        return "constant: all vectors that are looked up are the same" if used.key == "weight" and min(used.shape) > 1 else ""
    if len(used.shape) < 2 or used.part == "length" or _units(used) < 2:
        return ""
    if used.part == "direction":
        return f"constant: the weights of all units have the same direction {_ALIKE}"
    if _usual(used):
        return f"constant: all units have the same weights {_ALIKE}"
    # whoever writes a layer calls its weight what he likes
    of_units = len(used.shape) == 2 and used.shape[1] > 1 and not is_known(used.holder)
    return f"constant: all units have the same weights {_ALIKE}, if inputs are multiplied by it" if of_units else ""


def _repeated(used: StandIn, row: Read) -> str:
    """Of a layer of PyTorch: whether more than half of the units have the same weights, not all zero, as what is pruned has."""
    units, w = row.shape[0], row.tensor.detach()
    if row.may_repeat is False or used.part != "whole" or not (_usual(used) and is_known(used.holder) and is_plain(row.tensor)):
        return ""
    # another group of a convolution sees other inputs, and a transposed one has its units second
    if units < 2 or _units(used) != units or issubclass(kind_of(used.holder), _ConvTransposeNd):
        return ""
    some = w[sorted({0, units // 2, units - 1})].flatten(1)
    if not bool((some == some.roll(1, 0)).all(1).any()):
        return ""
    most = max(int((w.flatten(1) == one).all(1).sum()) if bool(one.any()) else 0 for one in some)
    if 2 * most <= units:
        return ""
    which = "all" if most == units else f"{most:,} of {units:,}"
    if is_embedding(used.holder):
        return f"{which} vectors that are looked up are the same"
    return f"{which} units have the same weights {_ALIKE}"


def _usual(used: StandIn) -> Usual | None:
    default = default_of(used.holder, used.key, used.shape)
    return usual_of(kind_of(used.holder), used.key, used.shape, default)  # type: ignore[arg-type]  # a class has a hash


def _weight(used: StandIn, x: Numbers) -> Weight:
    size = math.sqrt(x.square(0.0))
    if not 0 < size < math.inf:  # its square is no number: the largest element tells the size as well
        size = x.reach(0.0)
    if used.part == "length":
        # one length for all the elements of a unit
        size *= math.sqrt(x.extent / math.prod(used.shape))
    return Weight(used.shape, size, x.n)


def _units(used: StandIn) -> int:
    """How many units see the same inputs: those of one group. A transposed convolution has its outputs second."""
    kind, groups = kind_of(used.holder), getattr(used.holder, "groups", None)
    if issubclass(kind, _ConvNd) and groups is None:  # traced, which loses them: there may be as many as outputs
        return 1
    if issubclass(kind, _ConvTransposeNd):
        return used.shape[1]
    return used.shape[0] // groups if isinstance(groups, int) and groups > 0 else used.shape[0]
