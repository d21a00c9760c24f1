"""Contributions of several backward passes of one step, added up use by use until the step, and the gradient that they are parts of.

Beside `contributions`, which gathers those of one pass. Where the gradient was multiplied in between (`between`) so is what came before:
the parts stay parts of what the optimizer uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paramwatch.uses.between import NONE, Change, Digest, Number, change_of, digest_with, multiple_of, times
from paramwatch.uses.gram import Order, dense, gram, own, side_by_side
from paramwatch.uses.reading import Sums
from paramwatch.uses.sites import Site, forward_order


@dataclass(frozen=True)
class Pass:
    """What one backward pass, or a recomputed segment of it, has contributed, in the order of the forward pass."""

    names: list[str]
    sites: list[Site]
    grads: list[Tensor]
    total: Tensor
    origin: int
    eps: float

    def own(self) -> dict[str, Tensor]:
        """The contributions, in memory of their own where autograd goes on with it."""
        return dict(zip(self.names, [own(grad, self.total) for grad in self.grads], strict=True))

    def order(self) -> dict[str, tuple[int, int, int, int]]:
        """Of the uses."""
        return dict(zip(self.names, map(forward_order, self.sites), strict=True))


@dataclass
class Held:
    """Contributions of all backward passes of a step so far, by name of the use."""

    grads: dict[str, Tensor]
    order: dict[str, tuple[int, int, int, int]]
    total: Tensor | None
    """The gradient after the last pass; None where that is the gradient of the parameter itself."""
    passes: set[int]
    eps: float
    size: int
    """Bytes that were taken from the budget."""
    counted: Number = 1.0
    """Passes since the gradient was zero."""

    def changed(self, now: Tensor, known: bool, was: Digest | None, order: Order) -> Change:
        """What has become of the gradient since the last pass.

        Args:
            now: The gradient.
            known: Whether its version is the one that autograd has left; what is written to `.data` or through numpy has none.
            was: What was kept of it if that is no copy.
            order: Of the sample in that.
        """
        if known and not now.is_cpu:
            return NONE
        if self.total is not None:
            change = change_of(self.total, now)
        else:
            change = NONE if was is None else multiple_of(was, digest_with([*self.grads.values()], now, order))
        # of NaN nothing can be told
        return NONE if known and change.rest != change.rest else change

    def new(self, names: list[str]) -> int:
        """How many of these uses are not among those that are held."""
        return sum(name not in self.grads for name in names)

    def multiply(self, factor: Number) -> None:
        """The gradient was multiplied with this."""
        if isinstance(factor, Tensor) or factor != 1:
            self.grads = {name: times(grad, factor) for name, grad in self.grads.items()}
        if isinstance(factor, Tensor):
            self.counted = torch.where(factor == 0, 0.0, self.counted)

    def add(self, pass_: Pass, before: Tensor) -> None:
        """Add another pass.

        Args:
            pass_: What came.
            before: The gradient to which autograd adds it.
        """
        for name, grad in pass_.own().items():
            # out of place: two uses may have been given one tensor
            self.grads[name] = self.grads[name] + grad.to(pass_.total.dtype) if name in self.grads else grad
        self.add_total(pass_.total, before)
        self.counted = self.counted + (pass_.origin not in self.passes)
        self.passes.add(pass_.origin)
        self.order = pass_.order() | self.order
        self.eps = max(self.eps, pass_.eps)

    def add_total(self, total: Tensor, before: Tensor) -> None:
        """Add what was delivered, and found in no use."""
        self.total = dense(total) + dense(before)

    def sums(self) -> Sums:
        """What is said of them."""
        names = sorted(self.grads, key=self.order.__getitem__)
        assert self.total is not None
        *grads, total = side_by_side([*(self.grads[name] for name in names), self.total])
        return Sums(names, "full", self.counted, self.eps, gram(grads, total))
