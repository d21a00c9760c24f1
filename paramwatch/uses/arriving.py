"""The contributions of one backward pass as they arrive, the last use first, within a budget of memory.

Autograd itself holds two contributions and their sum when it adds, so two cost nothing. Of more uses all are kept within the budget
(`full`), else their running sum (`stream`), else nothing but their norms (`norms`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from paramwatch.uses.between import sample_of
from paramwatch.uses.gram import Order, add, dense, diagonal, flat, gram, order_of, side_by_side, square, workspace
from paramwatch.uses.sites import Site, forward_order
from paramwatch.uses.ways import memory_of

Mode = Literal["full", "stream", "norms"]


@dataclass
class Budget:
    """Bytes that may be kept beyond what autograd keeps itself, on one device."""

    most: int
    taken: int = 0

    def has_room(self, size: int) -> bool:
        """Whether so much may be taken."""
        return not size or self.taken + size <= self.most

    def take(self, size: int) -> bool:
        """Whether there was room."""
        if not self.has_room(size):
            return False
        self.taken += size
        return True

    def give_back(self, size: int) -> None:
        self.taken -= size


@dataclass
class Sampled:
    """Some elements of contributions, added up, where there is no room for their whole sum."""

    total: Tensor | None = None
    norms: list[Tensor] = field(default_factory=list)
    """Of those elements of each contribution."""

    def add(self, x: Tensor) -> None:
        """A contribution, as a vector."""
        mine = sample_of(x, None).to(torch.promote_types(x.dtype, torch.float32))
        self.norms.append(mine.to(torch.float64).norm())
        self.total = mine if self.total is None else self.total + mine

    def missing(self, delivered: Tensor, eps: float) -> Tensor:
        """How far what was delivered is from the sum, beyond rounding: float64 [], 0 where nothing tells."""
        if self.total is None:
            return torch.zeros((), dtype=torch.float64, device=delivered.device)
        eps = max(eps, torch.finfo(self.total.dtype).eps)
        rounding = eps * len(self.norms) ** 0.5 * torch.stack(self.norms).sum()
        apart = (sample_of(delivered, None).to(torch.float64) - self.total).norm()
        found: Tensor = (apart - rounding).clamp(min=0).nan_to_num()
        return found


@dataclass
class Arriving:
    """What has come of a backward pass."""

    mode: Mode
    size: int
    """Bytes that were taken from the budget."""
    sites: list[Site] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    summed: Tensor | None = None
    order: Order | None = None
    """Of dimensions, in which the elements of vectors are taken."""
    eps: float = 0.0
    sampled: Sampled | None = field(default_factory=Sampled)
    """What is known of the sum where no more than norms are; None where that is nothing."""
    products: Tensor | None = None
    """Those of all of it, where it was multiplied before the sum was cast, and not kept."""

    def take(self, site: Site, grad: Tensor, eps: float) -> None:
        """A contribution."""
        if self.products is not None:
            # more than was known of: of what they were the sum is not known any more
            self.products, self.mode, self.sampled = None, "norms", None
        self.sites.append(site)
        self.eps = max(self.eps, eps)
        if self.mode == "full":
            self.grads.append(grad)
            return
        self._count(grad)

    def let_go(self) -> None:
        """Keep norms alone from now on."""
        grads, self.grads, self.mode = self.grads, [], "norms"
        for grad in grads:
            self._count(grad)

    def _count(self, grad: Tensor) -> None:
        if self.order is None:
            self.order = order_of(grad)
        x = flat(grad, self.order)
        self.squares.append(square(x))
        if self.mode != "stream":
            if self.sampled is not None:
                self.sampled.add(x)
            return
        if self.summed is None:
            # the first one may be the engine's own
            self.summed = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        else:
            add(self.summed, x)

    def sort(self) -> None:
        """In the order of the forward pass."""
        order = sorted(range(len(self.sites)), key=lambda i: forward_order(self.sites[i]))
        self.sites = [self.sites[i] for i in order]
        self.grads = [self.grads[i] for i in order if self.grads]
        self.squares = [self.squares[i] for i in order if self.squares]

    def narrow(self, total: Tensor, left: Tensor | None) -> None:
        """All has come: multiply, and let it go.

        Args:
            total: The sum.
            left: What it will be added to, if that is no contribution.
        """
        self.sort()
        found = self.multiplied(total, left)
        self.products, self.squares, self.grads = found, list(found.diagonal()[: len(self.sites)]), []

    def multiplied(self, total: Tensor, left: Tensor | None) -> Tensor:
        """The inner products, as far as they are known; arguments as above."""
        if self.products is not None:
            return self.products
        if self.mode != "full":
            flat_left = None if left is None else flat(dense(left), self.order)
            found = diagonal(self.squares, flat(total, self.order), self.summed, flat_left)
            if self.mode == "norms" and left is not None:
                # what was there before is all that is missing only where the uses are all of what was delivered
                found[-1, :] = found[:, -1] = torch.where(self.missing(total) > 0, float("nan"), found[-1])
            return found
        *vectors, last = side_by_side([*map(dense, self.grads), *([] if left is None else [dense(left)]), dense(total)])
        return gram(vectors[: len(self.grads)], last, None if left is None else vectors[-1])

    def is_all(self, total: Tensor) -> bool:
        """Whether a single contribution is what is delivered itself: what lies elsewhere may be the sum with something of no use."""
        return not self.grads or memory_of(self.grads[0]) == memory_of(total)

    def missing(self, total: Tensor) -> Tensor:
        """By how much of what is delivered, as far as a sample tells, no use accounts for it, beyond rounding; float64 []."""
        return (
            torch.ones((), dtype=torch.float64, device=total.device)
            if self.sampled is None
            else self.sampled.missing(flat(total, self.order), self.eps)
        )

    @property
    def recomputed_by(self) -> int | None:
        """The run of the engine that has recomputed the part of the forward pass in which they are; None where they were not."""
        return next((site.origin for site in self.sites if site.kind == "recompute"), None)


def begin(budget: Budget, expected: int, copied: int, numel: int, size: int) -> Arriving:
    """Choose how contributions are kept.

    Args:
        budget: What may be taken.
        expected: How many come,
        copied: and of how many autograd itself holds something else.
        numel: Elements of each,
        size: and bytes.
    """
    needed = min(max(expected - 2, 0) + copied, expected) * size
    if needed:
        needed += workspace(expected, numel)
    if budget.take(needed):
        return Arriving("full", needed)
    # the sum is at least in single precision
    needed = max(size, 4 * numel)
    return Arriving("stream", needed) if budget.take(needed) else Arriving("norms", 0)
