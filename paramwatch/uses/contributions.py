"""What each use adds to the gradient of one row in one step, over all of its backward passes.

Those of several passes are added up (`held`), which takes keeping them until the step; where there is no room for that, the last pass
counts. Until a step has shown how many passes there are, the first one is multiplied and kept as well: what it delivered is then the
gradient itself, and no copy of it is made. What was there before the first pass, or came to the gradient between two of them, is in it and
in no contribution: it is unattributed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paramwatch.ranks import is_one_of_several
from paramwatch.uses.arriving import Arriving, Budget, begin
from paramwatch.uses.between import NONE, Change, Mark, Number, change_of, change_of_sample, digest_of, is_zero, mark_of, sample_of, times
from paramwatch.uses.gram import dense, flat, order_of, square
from paramwatch.uses.held import Held, Pass
from paramwatch.uses.reading import CHANGED, LAST, LATER, LEFT, PART, Sums
from paramwatch.uses.sites import Site, names_of


class Contributions:
    """Gathers what the uses of one row contribute in one step.

    Args:
        tensor: The row.
        budget: Shared by the rows of a device.
        always: Whether a single use is worth telling, as of a row with several names, or where it holds several.
    """

    def __init__(self, tensor: Tensor, budget: Budget, always: bool) -> None:
        self.expected = 0
        """How many contributions the next backward pass brings,"""
        self.copied = 0
        """and of how many autograd itself holds something else: a cast or computed parameter's gradient."""
        self.narrows = 0
        """How many of them are added before they are cast: where that is all of them `narrow` is called with their sum."""
        self._before = (0, 0)
        self._numel, self._order, self._size = tensor.numel(), order_of(tensor), tensor.numel() * tensor.element_size()
        self._budget = budget
        self.always = always
        self.recomputed = False
        """Whether other uses may come in runs of the engine that recompute a part of the forward pass."""
        self._arrived: dict[int, Arriving] = {}
        self._mark: Mark = None
        """How the gradient of the parameter is known if nobody but autograd has changed it since."""
        self._held: Held | None = None
        self._reduced = self._unsettled = False
        """Whether the gradient becomes another one when the run is over, as where ranks are averaged, and whether that is still to come."""
        self.forget()

    def forget(self) -> None:
        """Drop what was delivered; what is on its way stays."""
        self._drop()
        self._done: Sums | None = None
        self._sample: Tensor | None = None
        """Elements of the gradient after the pass that was multiplied, or after the last one where it is reduced."""
        self.seen = False
        """Whether a use has contributed in this step."""
        self._passes: set[int] = set()
        self._unseen = 0
        self._notes: dict[str, Tensor] = {}

    @property
    def backwards(self) -> int:
        """Backward passes in this step, those in which no use was seen as well."""
        return len(self._passes) + self._unseen

    def take(self, task: int, site: Site, grad: Tensor, eps: float, lent: bool = False) -> None:
        """A contribution: the tensor itself, which autograd is about to add.

        Args:
            task: Which run of the engine this is.
            site: Of the use.
            grad: In the form of the parameter.
            eps: Of the type in which it will be added.
            lent: Whether its memory is that of others as well, who may change it: then it is copied.
        """
        arrived = self._arrived.get(task)
        if arrived is None:
            expected, copied = self._coming()
            arrived = self._arrived[task] = begin(self._budget, expected, copied * (expected != self.narrows), self._numel, self._size)
        if lent and arrived.mode == "full":
            if self._budget.take(self._size):
                arrived.size += self._size
                grad = grad.clone()
            else:
                arrived.let_go()
        arrived.take(site, grad, eps)

    def narrow(self, task: int, total: Tensor, so_far: Tensor | None, keep: bool | None) -> None:
        """All contributions of a run have been added, and their sum is about to be cast: what need not be kept is let go.

        Args:
            task: Which run of the engine this is.
            total: Their sum.
            so_far: What was accumulated so far.
            keep: As for `deliver`.
        """
        arrived = self._arrived.get(task)
        if arrived is None or arrived.mode != "full" or not len(arrived.sites) == self.narrows == self._coming()[0]:
            return
        size = self.narrows * self._size
        if self._held is not None or self.recomputed or (keep is not False and self._budget.has_room(size)):
            return
        arrived.narrow(total, None if self._passes else self._left(so_far))

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
        now = so_far if whole else None
        known = now is not None and self._mark is not None and self._mark == mark_of(now, 0)
        self._reduced = not whole or is_one_of_several()
        factor = self._go_on(so_far, known) if whole or self._sample is not None else 1.0
        if self._reduced:
            self._unsettled, self._sample = True, None
        self._mark = None if apart or not whole else mark_of(total, 0) if now is None else mark_of(now, 1)
        if arrived is not None:
            self.seen = True
            self._budget.give_back(arrived.size)
        recomputed = self.recomputed or (arrived is not None and arrived.recomputed_by is not None)
        single = arrived is not None and len(arrived.sites) < 2 and not (self.always or recomputed or self._held)
        if arrived is None or (single and arrived.is_all(total)):
            self._add_unseen(total, now, factor)
            return
        arrived.sort()
        # the segments of a checkpointed pass are runs of their own
        origin = task if arrived.recomputed_by is None else arrived.recomputed_by
        earlier = self._passes - {origin}
        left = None if self._passes else self._left(so_far)
        left = left if whole else None  # a shard is no part of what was delivered
        self._passes.add(origin)
        pass_ = Pass(names_of(arrived.sites), arrived.sites, arrived.grads, total, origin, arrived.eps)
        held, kept = self._held, False
        if arrived.grads and (keep is not False or recomputed or held is not None):
            kept = self._hold(pass_, now, left, factor, apart or recomputed or keep is True)
            if kept and (keep or recomputed or held is not None):
                self._done = None
                return
        if not kept:
            self._drop()
        mode = arrived.mode + (", last segment" if recomputed else f", {LAST}" if earlier and (now is None or now.is_cpu) else "")
        if earlier:
            # on a device it may have been zeroed since
            self._notes = {LAST: square(flat(now))} if now is not None and not now.is_cpu and not recomputed else {}
        if arrived.mode == "norms":
            self._notes[PART] = arrived.missing(total)
        self._sample = None if self._reduced else sample_of(total, now, self._order)
        self._done = Sums(pass_.names, mode, 1 + (left is not None) * self._unseen, arrived.eps, arrived.multiplied(total, left))

    def sums(self, used: Tensor | None = None, more: bool = False) -> Sums | None:
        """What was found in this step so far; None if nothing was. What was kept for it is let go, unless there may be more.

        Args:
            used: The gradient as it is now, after the last pass.
            more: Whether there may be more.
        """
        if self._held is not None and self._done is None:
            self._done = self._held.sums()
            assert self._held.total is not None
            if not self._reduced:
                self._sample = sample_of(self._held.total, None, self._order)
        if not more:
            self._drop()
        if self._done is not None:
            single = len(self._done.names) == 1 and not (self.always or self.recomputed)
            self._done = replace(self._done, single=single, notes=self._notes | self._changed_later(used))
        return self._done

    def settled(self, gradient: Tensor | None) -> None:
        """No run of the engine goes on: ranks are averaged, and what is sharded is where it belongs."""
        if self._unsettled:
            self._unsettled, self._sample = False, None if gradient is None else sample_of(gradient, None, self._order)

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

    # ---- pieces ------------------------------------------------------------------------------------

    def _coming(self) -> tuple[int, int]:
        """Of a graph that is gone through again nothing new is known."""
        return (self.expected, self.copied) if self.expected else self._before

    def _go_on(self, now: Tensor | None, known: bool) -> Number:
        """What the gradient was multiplied with since the last pass; where it is none, or zero, what came before is forgotten."""
        if now is None:
            self.forget()
        if now is None or not self._passes:
            return 1.0
        change = self._change(now, known)
        if isinstance(change.factor, float) and change.factor == 0:
            self.forget()
            return 1.0
        if isinstance(change.rest, Tensor) or change.rest != 0:
            self._notes[CHANGED] = self._notes.get(CHANGED, 0) + torch.as_tensor(change.rest, dtype=torch.float64)
        return change.factor

    def _change(self, now: Tensor, known: bool) -> Change:
        held = self._held
        if self._reduced and self._sample is not None:
            return change_of_sample(self._sample, sample_of(now, None, self._order), square(flat(now)))
        if held is None or self._reduced:
            return Change(0.0, 0.0) if now.is_cpu and is_zero(now) else NONE
        # of the first pass no copy is kept, but it was multiplied
        done, sample = self._done, self._sample
        kept = None if held.total is not None or done is None or sample is None else digest_of(done.products, sample)
        return held.changed(now, known, kept, self._order)

    def _changed_later(self, used: Tensor | None) -> dict[str, Tensor]:
        """What became of the gradient after the last pass, if anything did but for a factor."""
        if used is None or self._sample is None:
            return {}
        # also where its version is the same: what is written to `.data` or through numpy has none
        rest = change_of(self._sample, sample_of(used, None, self._order)).rest
        # of NaN nothing can be told
        return {LATER: torch.as_tensor(rest, dtype=torch.float64).nan_to_num()}

    def _left(self, now: Tensor | None) -> Tensor | None:
        """What was there before the first pass, if that is not zero or nobody knows without waiting."""
        if now is None or (now.is_cpu and is_zero(now)):
            return None
        if not self._unseen:
            self._notes[LEFT] = square(flat(now))
        return now

    def _hold(self, pass_: Pass, now: Tensor | None, left: Tensor | None, factor: Number, copy: bool) -> bool:
        """Keep contributions until the step, added to those that are kept; False where that cannot be done.

        Args:
            pass_: What came.
            now: The gradient of the parameter before that.
            left: What of it was there before the first pass.
            factor: What it was multiplied with since the last pass.
            copy: Whether what was delivered is copied, if it is the first.
        """
        held, total = self._held, pass_.total
        if held is None:
            copy = copy or self._reduced or left is not None or type(total) is not Tensor or total.layout is not torch.strided
            size = (len(pass_.names) + copy) * self._size
            if self._done is not None or not self._budget.take(size):
                return False
            whole = None if not copy else dense(total).clone() if left is None else dense(total) + dense(left)
            self._held = Held(pass_.own(), pass_.order(), whole, {pass_.origin}, pass_.eps, size, 1 + (left is not None) * self._unseen)
            return True
        before = self._sum_before(held, now, factor)
        size = (held.new(pass_.names) + (held.total is None)) * self._size
        if before is None or not self._budget.take(size):
            return False
        held.multiply(factor)
        held.add(pass_, before)
        held.size += size
        return True

    def _sum_before(self, held: Held, now: Tensor | None, factor: Number) -> Tensor | None:
        """The gradient to which autograd adds; None where nobody knows. Where ranks are averaged that of this one."""
        return times(held.total, factor) if held.total is not None and self._reduced else now

    def _add_unseen(self, total: Tensor, now: Tensor | None, factor: Number) -> None:
        """A backward pass in which no use was seen is a part of the gradient all the same."""
        self._unseen += 1
        held = self._held
        before = None if held is None else self._sum_before(held, now, factor)
        if held is not None and before is not None and self._budget.take(size := (held.total is None) * self._size):
            held.multiply(factor)
            held.add_total(total, before)
            held.counted = held.counted + 1
            held.size += size
            self._done = None
        elif self._done is not None:
            self._done = replace(self._done, mode=f"{self._done.mode}, without a backward")

    def _drop(self) -> None:
        if self._held is not None:
            self._budget.give_back(self._held.size)
        self._held = None
