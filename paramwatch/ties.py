"""Tie groups: which names share one tensor, and which parameters share memory without being tied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from paramwatch.guard import ParamWatchError
from paramwatch.memory import bytes_of, overlaps
from paramwatch.record import TieGroup
from paramwatch.rows import Place, is_lazy, places


def tie_groups(module: nn.Module) -> tuple[TieGroup, ...]:
    """The tie groups of a module, in model order.

    A group of kind `parameter` is one tensor reached by several names: one module at two places, or two modules that hold one
    `nn.Parameter`. A group of kind `storage` is separate parameters on overlapping memory, which looks like tying and is not: their
    gradients are not summed, and every optimizer update hits the same memory.

    Raises:
        ParamWatchError: Something else than a module was given.
    """
    if not isinstance(module, nn.Module):
        raise ParamWatchError(f"tie_groups takes an nn.Module, not {type(module).__name__}")
    return find_ties(places(module))


def find_ties(found: Sequence[Place]) -> tuple[TieGroup, ...]:
    """`tie_groups` for places already looked up."""
    named: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for place in found:
        tensor = place.tensor
        if tensor is not None:
            named.setdefault(id(tensor), []).append(place.name)
            tensors[id(tensor)] = tensor
    first = [(names[0], tensors[key]) for key, names in named.items()]
    one_tensor = [_one_tensor(names, tensors[key]) for key, names in named.items() if len(names) > 1]
    one_memory = [
        TieGroup(tuple(first[i][0] for i in shared.at), "storage", shared.numel, shared.saved)
        for shared in overlaps(tensor for _, tensor in first)
    ]
    return (*one_tensor, *one_memory)


def _one_tensor(names: Sequence[str], tensor: torch.Tensor) -> TieGroup:
    return TieGroup(tuple(names), "parameter", 0 if is_lazy(tensor) else tensor.numel(), bytes_of(tensor) * (len(names) - 1))
