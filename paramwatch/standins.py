"""What a parameter stands for: itself or, where a layer computes its weight from it (pruning, weight and spectral normalisation), that.

Between `rows` and `hazards`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from paramwatch.rows import Place, held_under, is_lazy

Part: TypeAlias = Literal["whole", "direction", "length"]
"""Of what it stands for: all of it, what is divided by its own length, or the factor that then gives the length."""


class StandIn(NamedTuple):
    """A parameter of a layer, as the layer uses it."""

    holder: nn.Module
    key: str
    shape: tuple[int, ...]
    part: Part = "whole"


def stand_ins(module: nn.Module) -> Callable[[Place, tuple[int, ...]], StandIn]:
    """Tells for the places of a model, and the shapes there, what they stand for."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    for owner in module.modules():
        lists = owner._modules["parametrizations"] if "parametrizations" in owner._modules else None  # noqa: SIM401  # scripted: no get
        if isinstance(lists, nn.ModuleDict):
            owners |= {id(held): (owner, key) for key, held in lists.items()}

    def of(place: Place, shape: tuple[int, ...]) -> StandIn:
        holder, key = place.holder, place.key
        if isinstance(holder, ParametrizationList):
            return _parametrized(holder, key, shape, *owners.get(id(holder), (holder, key)))
        return _hooked(holder, key, shape)

    return of


def _parametrized(held: ParametrizationList, key: str, shape: tuple[int, ...], owner: nn.Module, of: str) -> StandIn:
    kind = type(held[0]) if len(held) == 1 else None
    if kind is _WeightNorm and key == "original0":
        return StandIn(owner, of, _shape_of(held, "original1") or shape, "length")
    # what else computes a weight may make anything of it
    return StandIn(owner, of, shape, "direction") if kind in (_WeightNorm, _SpectralNorm) else StandIn(held, key, shape)


def _hooked(holder: nn.Module, key: str, shape: tuple[int, ...]) -> StandIn:
    """The older functions, which name what they keep after the weight."""
    of, _, last = key.rpartition("_")
    if last == "orig" and f"{of}_mask" in holder._buffers:
        return StandIn(holder, of, shape)
    if last == "orig" and f"{of}_u" in holder._buffers:
        return StandIn(holder, of, shape, "direction")
    if last == "v" and f"{of}_g" in holder._parameters:
        return StandIn(holder, of, shape, "direction")
    whole = _shape_of(holder, f"{of}_v") if last == "g" else None
    return StandIn(holder, of, whole, "length") if whole else StandIn(holder, key, shape)


def _shape_of(holder: nn.Module, key: str) -> tuple[int, ...] | None:
    tensor = held_under(holder, key)
    return None if tensor is None or is_lazy(tensor) else tuple(tensor.shape)
