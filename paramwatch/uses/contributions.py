"""What each use adds to the gradient of one row, gathered during a backward pass within a budget of memory, and multiplied.

Autograd itself holds two contributions and their sum when it adds, so two cost nothing. Of more uses all are kept within the budget
(`full`), else their running sum (`stream`), else nothing but their norms (`norms`). Those of several backward passes of one step are added
up, which takes keeping them until the step; where there is no room for that, the last pass counts. Until a step has shown how many passes
there are, the first one is multiplied and kept as well: what it delivered is then the gradient itself, and no copy of it is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from paramwatch.uses.gram import add, dense, diagonal, flat, gram, order_of, own, side_by_side, square, workspace
from paramwatch.uses.reading import Sums
from paramwatch.uses.sites import Site, forward_order, names_of

Mode = Literal["full", "stream", "norms"]


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
    order: tuple[int, ...] | None = None
    """Of dimensions, in which the elements of vectors are taken."""
    eps: float = 0.0


@dataclass
class _Held:
    """Contributions of all backward passes of a step so far, by name of the use."""

    grads: dict[str, Tensor]
    order: dict[str, tuple[int, int, int, int]]
    total: Tensor | None
    """What was delivered; None where that has become the gradient of the parameter,"""
    mark: tuple[int, int]
    """at this address and of this version: it is still so."""
    passes: set[int]
    eps: float
    size: int

    def goes_on_from(self, so_far: Tensor | None) -> bool:
        """Whether what was delivered is known, if the parameter has this gradient."""
        if self.total is not None:
            return True
        return so_far is not None and so_far.layout is torch.strided and self.mark == (so_far.data_ptr(), so_far._version)


@dataclass(frozen=True)
class _Pass:
    """What one backward pass, or a recomputed segment of it, has contributed, in the order of the forward pass."""

    names: list[str]
    sites: list[Site]
    grads: list[Tensor]
    total: Tensor
    origin: int
    eps: float


class Contributions:
    """Gathers what the uses of one row contribute in one step.

    Args:
        size: Elements of the row, and bytes of each.
        budget: Shared by the rows of a device.
        always: Whether a single use is worth telling, as of a row with several names, or where it holds several.
    """

    def __init__(self, size: tuple[int, int], budget: Budget, always: bool) -> None:
        self.expected = 0
        """How many contributions the next backward pass brings,"""
        self.copied = 0
        """and of how many autograd itself holds something else: a cast or computed parameter's gradient."""
        self._before = (0, 0)
        self._numel, self._size = size[0], size[0] * size[1]
        self._budget = budget
        self.always = always
        self.recomputed = False
        """Whether other uses may come in runs of the engine that recompute a part of the forward pass."""
        self.seen = False
        """Whether a use has contributed in this step."""
        self._arrived: dict[int, _Arrived] = {}
        self._held: _Held | None = None
        self._done: Sums | None = None
        self._passes: set[int] = set()
        self._evaluated = False
        self._versions: tuple[int, ...] = ()
        """Those that the gradient of the parameter may have if nobody but autograd has changed it since."""

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
            arrived = self._arrived[task] = self._begin(*self._coming())
        arrived.sites.append(site)
        arrived.eps = max(arrived.eps, eps)
        if arrived.mode == "full":
            arrived.grads.append(grad)
            return
        if arrived.order is None:
            arrived.order = order_of(grad) if grad.layout is torch.strided else tuple(range(grad.ndim))
        x = flat(grad, arrived.order)
        arrived.squares.append(square(x))
        if arrived.mode != "stream":
            return
        if arrived.summed is None:
            # the first one may be the engine's own
            arrived.summed = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        else:
            add(arrived.summed, x)

    def deliver(self, task: int, total: Tensor, so_far: Tensor | None, whole: bool, keep: bool | None, apart: bool = False) -> None:
        """What autograd delivers to the parameter: the contributions of this run are complete.

        Args:
            task: Which run of the engine this is.
            total: The gradient, about to be accumulated.
            so_far: What was accumulated so far.
            whole: Whether `so_far` tells, as it does where the parameter does not stand for a sharded one.
            keep: Whether more is to come in this step; None where nobody knows.
            apart: Whether autograd will make a copy of what it delivers.
        """
        arrived = self._arrived.pop(task, None)
        self._before, self.expected, self.copied = self._coming(), 0, 0
        changed = whole and so_far is not None and bool(self._passes) and so_far._version not in self._versions
        # zeroed before the step, and not set to None; on other devices asking would mean to wait, and a closure is taken to do so
        asked = changed and so_far is not None and so_far.is_cpu and so_far.layout is torch.strided
        zeroed = not so_far.any() if asked and so_far is not None else changed and self._evaluated
        afresh = whole and so_far is None
        if afresh or zeroed:
            self.forget()
        unsure = changed and not zeroed and so_far is not None and not so_far.is_cpu
        self._versions = (0, total._version) if so_far is None else (so_far._version + 1,)
        self.seen |= arrived is not None
        recomputed = self.recomputed or (arrived is not None and any(site.kind == "recompute" for site in arrived.sites))
        if arrived is None or (len(arrived.sites) < 2 and not (self.always or recomputed or self._held)):
            if arrived is not None:
                self._budget.give_back(arrived.size)
            return
        # the segments of a checkpointed pass are runs of their own
        origin = next((site.origin for site in arrived.sites if site.kind == "recompute"), task)
        earlier = self._passes - {origin}
        self._passes.add(origin)
        order = sorted(range(len(arrived.sites)), key=lambda i: forward_order(arrived.sites[i]))
        sites = [arrived.sites[i] for i in order]
        names = names_of(sites)
        self._budget.give_back(arrived.size)
        kept = False
        if arrived.mode == "full":
            grads = [arrived.grads[i] for i in order]
            first = self._held is None
            if not unsure and (keep is not False or recomputed or not first):
                pass_ = _Pass(names, sites, grads, total, origin, arrived.eps)
                kept = self._hold(pass_, so_far if whole else None, copy=not afresh or apart or recomputed or keep is True)
            if kept and (keep or recomputed or not first):
                self._done = None
                return
            *vectors, whole_one = side_by_side([*map(dense, grads), dense(total)])
            found = gram(vectors, whole_one)
        else:
            found = diagonal([arrived.squares[i] for i in order], flat(total, arrived.order), arrived.summed)
        if not kept:
            self._drop()
        mode = f"{arrived.mode}, last segment" if recomputed else f"{arrived.mode}, last backward" if earlier else arrived.mode
        self._done = Sums(names, mode, 1, arrived.eps, found)

    def sums(self, more: bool = False) -> Sums | None:
        """What was found in this step so far; None if nothing was. What was kept for it is let go, unless there may be more."""
        held = self._held
        if held is not None and self._done is None:
            names = sorted(held.grads, key=held.order.__getitem__)
            assert held.total is not None
            *grads, total = side_by_side([*(held.grads[name] for name in names), held.total])
            self._done = Sums(names, "full", len(held.passes), held.eps, gram(grads, total))
        if not more:
            self._drop()
        return self._done

    def evaluated(self) -> None:
        """A closure has just computed the gradient; if it does so again that is added, or begins anew where it was zeroed in between."""
        self._evaluated = True

    def left(self, task: int) -> None:
        """A run of the engine is over: what has come in it and was not delivered went to the caller of `torch.autograd.grad`."""
        arrived = self._arrived.pop(task, None)
        if arrived is not None:
            self._budget.give_back(arrived.size)
            self._before, self.expected, self.copied = self._coming(), 0, 0

    def reset(self) -> None:
        """Begin another step."""
        self.forget()
        for arrived in self._arrived.values():
            self._budget.give_back(arrived.size)
        self._arrived.clear()
        self.expected = self.copied = 0

    def _coming(self) -> tuple[int, int]:
        """Of a graph that is gone through again nothing new is known."""
        return (self.expected, self.copied) if self.expected else self._before

    def _begin(self, expected: int, copied: int) -> _Arrived:
        needed = min(max(expected - 2, 0) + copied, expected) * self._size
        if needed:
            needed += workspace(expected, self._numel)
        if self._budget.take(needed):
            return _Arrived("full", needed)
        # the sum is at least in single precision
        needed = max(self._size, 4 * self._numel)
        return _Arrived("stream", needed) if self._budget.take(needed) else _Arrived("norms", 0)

    def _hold(self, pass_: _Pass, so_far: Tensor | None, copy: bool) -> bool:
        """Keep contributions until the step, added to those that are kept; False where that cannot be done.

        Args:
            pass_: What came.
            so_far: The gradient of the parameter before that.
            copy: Whether what was delivered is copied, if it is the first.
        """
        held, total = self._held, pass_.total
        copy = copy or type(total) is not Tensor or total.layout is not torch.strided
        new = [name for name in pass_.names if held is None or name not in held.grads]
        totals = copy if held is None else held.total is None
        size = (len(new) + totals) * self._size
        if (held is None and self._done is not None) or (held is not None and not held.goes_on_from(so_far)) or not self._budget.take(size):
            return False
        mine = dict(zip(pass_.names, [own(grad, total) for grad in pass_.grads], strict=True))
        order = dict(zip(pass_.names, map(forward_order, pass_.sites), strict=True))
        if held is None:
            mark = (0, 0) if copy else (total.data_ptr(), total._version)
            self._held = _Held(mine, order, dense(total).clone() if copy else None, mark, {pass_.origin}, pass_.eps, size)
            return True
        for name, grad in mine.items():
            # out of place: two uses may have been given one tensor
            held.grads[name] = held.grads[name] + grad.to(total.dtype) if name in held.grads else grad
        before = so_far if held.total is None else held.total
        assert before is not None
        held.total = dense(total) + before.detach()
        held.passes.add(pass_.origin)
        held.order = order | held.order
        held.eps, held.size = max(held.eps, pass_.eps), held.size + size
        return True

    def forget(self) -> None:
        """Drop what was delivered; what is on its way stays."""
        self._drop()
        self._done, self._passes, self.seen, self._evaluated = None, set(), False, False

    def _drop(self) -> None:
        if self._held is not None:
            self._budget.give_back(self._held.size)
        self._held = None
