"""What an optimizer holds: tensors, their learning rates, what it keeps of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """All tensors an optimizer holds."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return list(groups[0]["params"])
    return [param for group in groups for param in group["params"]]


def trains(optimizer: Optimizer) -> bool:
    """Whether any of its tensors is trained: Lightning has one that holds nothing where a module has configured none."""
    return any(param.requires_grad for param in params_of(optimizer))


def learning_rates(optimizers: Sequence[Optimizer], tensors: Sequence[Tensor]) -> list[Tensor | float | None]:
    """The rate of each tensor, of the innermost optimizer that holds it: a float, or a tensor that may be on a device."""
    rates: dict[int, Any] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rates.update(dict.fromkeys(map(id, group["params"]), group.get("lr")))
    found = [rates.get(id(tensor)) for tensor in tensors]
    return [rate if isinstance(rate, int | float | Tensor) else None for rate in found]


def groups_of(optimizer: Optimizer, tensors: Sequence[Tensor]) -> list[int]:
    """In which of an optimizer's groups each of these is, all of which it holds."""
    group_of: dict[int, int] = {}
    for i, group in enumerate(optimizer.param_groups):
        group_of.update(dict.fromkeys(map(id, group["params"]), i))
    return [group_of[id(tensor)] for tensor in tensors]


def states(optimizers: Sequence[Optimizer], tensors: Sequence[Tensor], key: str) -> list[Tensor | None]:
    """What the innermost optimizer that has it keeps of each tensor under this key."""
    found: list[Tensor | None] = []
    for tensor in tensors:
        kept = [getattr(optimizer, "state", {}).get(tensor, {}).get(key) for optimizer in reversed(optimizers)]
        found.append(next((state for state in kept if isinstance(state, Tensor)), None))
    return found


def moves_between_steps(optimizer: Optimizer) -> bool:
    """Whether it moves its tensors on `eval()`, and back but for rounding on `train()`, as schedule-free ones do."""
    both = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    return both or hasattr(optimizer, "train_mode") or any("train_mode" in group for group in optimizer.param_groups)
