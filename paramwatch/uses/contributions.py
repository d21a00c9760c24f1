"""What each use adds to the gradient of one row, gathered during a backward pass within a budget of memory, and multiplied.

Autograd itself holds two contributions and their sum when it adds, so two cost nothing. Of more uses all are kept within the budget
(`full`), else their running sum (`stream`), else nothing but their norms (`norms`). Those of several backward passes of one step are added
up, which takes keeping them until the step; where there is no room for that, the last pass counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from paramwatch.uses.gram import diagonal, flat, gram, square
from paramwatch.uses.reading import Sums

Mode = Literal["full", "stream", "norms"]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a use was found."""

    kind: Literal["call", "recompute", "loss"]
    turn: int
    """Which outermost call it was, in the order in which they were made; of recomputed segments, in that of the backward pass."""
    outer: str
    """What was called there."""
    place: int
    """Among the uses of the row in that call, in the order of the forward pass."""
    label: str
    origin: int = -1
    """The run of the engine that recomputes it."""


@dataclass
class Budget:
    """Bytes that may be kept beyond what autograd keeps itself, on one device."""

    most: int
    taken: int = 0

    def take(self, size: int) -> bool:
        """Whether there was room."""
        if size and self.taken + size > self.most:
            return False
        self.taken += size
        return True

    def give_back(self, size: int) -> None:
        self.taken -= size


@dataclass
class _Arrived:
    """Contributions of one backward pass, the last use first."""

    mode: Mode
    size: int
    sites: list[Site] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    summed: Tensor | None = None
    eps: float = 0.0


@dataclass
class _Held:
    """Contributions of all backward passes of a step so far, by name of the use."""

    grads: dict[str, Tensor]
    order: dict[str, tuple[int, int, int]]
    total: Tensor
    passes: set[int]
    eps: float
    size: int


class Contributions:
    """Gathers what the uses of one row contribute in one step.

    Args:
        size: Bytes of the row.
        budget: Shared by the rows of a device.
        always: Whether a single use is worth telling, as of a row with several names, or where it holds several.
    """

    def __init__(self, size: int, budget: Budget, always: bool) -> None:
        self.expected = 0
        self._expected_before = 0
        self._size = size
        self._budget = budget
        self.always = always
        self.seen = False
        """Whether a use has contributed in this step."""
        self._arrived: dict[int, _Arrived] = {}
        self._held: _Held | None = None
        self._done: Sums | None = None
        self._passes: set[int] = set()

    @property
    def backwards(self) -> int:
        """Backward passes seen in this step."""
        return len(self._passes)

    def take(self, task: int, site: Site, grad: Tensor, eps: float) -> None:
        """A contribution: the tensor itself, which autograd is about to add.

        Args:
            task: Which run of the engine this is.
            site: Of the use.
            grad: In the form of the parameter.
            eps: Of the type in which it will be added.
        """
        arrived = self._arrived.get(task)
        if arrived is None:
            arrived = self._arrived[task] = self._begin(self.expected or self._expected_before)
        arrived.sites.append(site)
        arrived.eps = max(arrived.eps, eps)
        if arrived.mode == "full":
            arrived.grads.append(grad)
            return
        x = flat(grad)
        arrived.squares.append(square(x))
        if arrived.mode == "stream":
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            # the first one may be the engine's own
            arrived.summed = wide.clone() if arrived.summed is None else arrived.summed.add_(wide)

    def deliver(self, task: int, total: Tensor, afresh: bool, keep: bool) -> None:
        """What autograd delivers to the parameter: the contributions of this run are complete.

        Args:
            task: Which run of the engine this is.
            total: The gradient, about to be accumulated.
            afresh: Whether nothing was accumulated so far.
            keep: Whether more is to come in this step.
        """
        arrived = self._arrived.pop(task, None)
        self._expected_before, self.expected = self.expected or self._expected_before, 0
        if afresh:
            self.forget()
        self.seen |= arrived is not None
        recomputed = arrived is not None and any(site.kind == "recompute" for site in arrived.sites)
        if arrived is None or (len(arrived.sites) < 2 and not (self.always or recomputed or self._held)):
            if arrived is not None:
                self._budget.give_back(arrived.size)
            return
        # the segments of a checkpointed pass are runs of their own
        origin = next((site.origin for site in arrived.sites if site.kind == "recompute"), task)
        earlier = self._passes - {origin}
        self._passes.add(origin)
        order = sorted(range(len(arrived.sites)), key=lambda i: _forward(arrived.sites[i]))
        names = _names([arrived.sites[i] for i in order])
        self._budget.give_back(arrived.size)
        if arrived.mode == "full":
            grads = [arrived.grads[i] for i in order]
            if (keep or recomputed or self._held is not None) and self._hold(
                names, [arrived.sites[i] for i in order], grads, total, origin, arrived.eps
            ):
                return
            found = gram([flat(grad) for grad in grads], flat(total))
        else:
            found = diagonal([arrived.squares[i] for i in order], flat(total), arrived.summed)
        self._drop()
        mode = f"{arrived.mode}, last segment" if recomputed else f"{arrived.mode}, last backward" if earlier else arrived.mode
        self._done = Sums(names, mode, 1, arrived.eps, found)

    def sums(self) -> Sums | None:
        """What was found in this step so far; None if nothing was."""
        held = self._held
        if held is None:
            return self._done
        names = sorted(held.grads, key=held.order.__getitem__)
        grads = [flat(held.grads[name]) for name in names]
        return Sums(names, "full", len(held.passes), held.eps, gram(grads, flat(held.total)))

    def reset(self) -> None:
        """Begin another step."""
        self.forget()
        for arrived in self._arrived.values():
            self._budget.give_back(arrived.size)
        self._arrived.clear()
        self.expected = 0

    def _begin(self, expected: int) -> _Arrived:
        needed = max(expected - 2, 0) * self._size
        if self._budget.take(needed):
            return _Arrived("full", needed)
        if self._budget.take(self._size):
            return _Arrived("stream", self._size)
        return _Arrived("norms", 0)

    def _hold(self, names: Sequence[str], sites: Sequence[Site], grads: Sequence[Tensor], total: Tensor, origin: int, eps: float) -> bool:
        """Keep contributions until the step, added to those that are kept; False where there is no room."""
        held = self._held
        new = [name for name in names if held is None or name not in held.grads]
        size = (len(new) + (held is None)) * self._size
        if (held is None and self._done is not None) or not self._budget.take(size):
            return False
        mine = [_own(grad, total) for grad in grads]
        order = dict(zip(names, map(_forward, sites), strict=True))
        if held is None:
            self._held = _Held(dict(zip(names, mine, strict=True)), order, _dense(total).clone(), {origin}, eps, size)
            return True
        for name, grad in zip(names, mine, strict=True):
            # out of place: two uses may have been given one tensor
            held.grads[name] = held.grads[name] + grad if name in held.grads else grad
        held.total = held.total + _dense(total)
        held.passes.add(origin)
        held.order = order | held.order
        held.eps, held.size = max(held.eps, eps), held.size + size
        return True

    def forget(self) -> None:
        """Drop what was delivered; what is on its way stays."""
        self._drop()
        self._done, self._passes, self.seen = None, set(), False

    def _drop(self) -> None:
        if self._held is not None:
            self._budget.give_back(self._held.size)
        self._held = None


def _own(grad: Tensor, total: Tensor) -> Tensor:
    """The contribution, in memory of its own where autograd goes on with it: what it delivers may become `param.grad`."""
    if type(grad) is not Tensor or type(total) is not Tensor or grad.layout is not torch.strided or total.layout is not torch.strided:
        return _dense(grad).clone()
    same = grad.untyped_storage().data_ptr() == total.untyped_storage().data_ptr()
    return grad.clone() if same else grad


def _dense(grad: Tensor) -> Tensor:
    return grad.detach() if grad.layout is torch.strided else grad.detach().to_dense()


def _forward(site: Site) -> tuple[int, int, int]:
    """Sorts sites in the order of the forward pass; segments are recomputed in the reverse order."""
    if site.kind == "recompute":
        return 1, -site.turn, site.place
    return 0 if site.kind == "call" else 2, site.turn, site.place


def _names(sites: Sequence[Site]) -> list[str]:
    """The names of uses. Calls of one module are numbered within a backward pass, so that further micro-batches have the same names."""
    turns: dict[str, list[int]] = {}
    for site in sites:
        if site.kind == "call" and site.turn not in turns.setdefault(site.outer, []):
            turns[site.outer].append(site.turn)
    found, taken = [], Counter[str]()
    for site in sites:
        name = site.label
        if site.kind == "recompute":
            name = f"recompute{site.turn}:{name}"
        elif site.kind == "call" and len(turns[site.outer]) > 1:
            turn = turns[site.outer].index(site.turn)
            name = f"{name}@{turn}" if name == site.outer else f"call{turn}:{name}"
        taken[name] += 1
        found.append(name if taken[name] == 1 else f"{name}#{taken[name] - 1}")
    return found
