"""Zeros that may be meant: a branch that is added to something else, or a head, that starts as nothing.

Behind `hazards`. The model is not run, so that this is read from shapes, from the order of layers, and from what is zero beside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from paramwatch.rows import held_under, is_lazy
from paramwatch.standards import ZEROS, default_of, is_embedding, kind_of
from paramwatch.standins import StandIn


class Branches:
    """What leads around the zeros of a model, or into them.

    Args:
        module: The model.
        filled: Its parameters that are not all zeros, and whether each is trained.
        zeros: Ids of those that are all zeros.
    """

    def __init__(self, module: nn.Module, filled: Iterable[tuple[StandIn, bool]], zeros: frozenset[int]) -> None:
        self._module, self._filled, self._zeros = module, [*filled], zeros

    def add_to_frozen(self, zero: StandIn) -> bool:
        """Whether it is the second factor of a low-rank addition to a weight that is not trained (LoRA): that one passes gradients on."""
        outputs, rank = zero.shape[0], math.prod(zero.shape[1:2])
        firsts = (inputs for inputs in self._inputs.get(rank, ()) if rank < min(inputs, outputs))
        return any({(outputs, inputs), (inputs, outputs)} & self._frozen for inputs in firsts)

    def start_as_nothing(self, zero: StandIn) -> bool:
        """Whether its layer is zero altogether, bias included, while something gives it inputs and nothing follows it where it stands."""
        bias = held_under(zero.holder, "bias")
        if bias is None or id(bias) not in self._zeros:
            return False
        # where PyTorch makes a bias zero anyway that shows no intention, but batch norms are what ends the branches of residual networks
        meant = default_of(zero.holder, "bias", bias.shape) is not ZEROS or issubclass(kind_of(zero.holder), _BatchNorm)
        inputs, outputs = _ends(zero)
        return meant and inputs in self._outputs and not self._is_followed(zero.holder, outputs)

    @cached_property
    def _inputs(self) -> dict[int, set[int]]:
        """Of the trained matrices of each number of rows."""
        found: dict[int, set[int]] = {}
        for stand_in, trainable in self._filled:
            if trainable and len(stand_in.shape) > 1:
                found.setdefault(stand_in.shape[0], set()).add(stand_in.shape[1])
        return found

    @cached_property
    def _frozen(self) -> set[tuple[int, ...]]:
        return {stand_in.shape[:2] for stand_in, trainable in self._filled if not trainable}

    @cached_property
    def _outputs(self) -> set[int]:
        return {_ends(stand_in)[1] for stand_in, _ in self._filled if len(stand_in.shape) > 1}

    @cached_property
    def _parents(self) -> dict[int, nn.Module]:
        return {id(child): parent for parent in self._module.modules() for child in parent._modules.values()}

    def _is_followed(self, layer: nn.Module, outputs: int) -> bool:
        """Whether a later layer beside it takes as many inputs as it gives; zeros side by side are no chain unless they are called one."""
        parent = self._parents.get(id(layer))
        beside = [] if parent is None else [child for child in parent._modules.values() if child is not None]
        after = beside[[id(child) for child in beside].index(id(layer)) + 1 :] if beside else []
        held = [(child, weight) for child in after if (weight := held_under(child, "weight")) is not None and not is_lazy(weight)]
        if not isinstance(parent, nn.Sequential):
            held = [(child, weight) for child, weight in held if id(weight) not in self._zeros]
        return any(weight.dim() > 1 and _ends(StandIn(child, "weight", weight.shape))[0] == outputs for child, weight in held)


def _ends(weight: StandIn) -> tuple[int, int]:
    """How many inputs and outputs a layer with that weight has; the scale of a norm has as many of each."""
    kind, shape = kind_of(weight.holder), weight.shape
    if len(shape) < 2:
        return math.prod(shape), math.prod(shape)
    if is_embedding(weight.holder):
        return shape[0], shape[1]
    groups = getattr(weight.holder, "groups", 1) if issubclass(kind, _ConvNd) else 1
    if issubclass(kind, _ConvTransposeNd):
        return shape[0], shape[1] * groups
    return shape[1] * groups, shape[0]
