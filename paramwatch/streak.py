"""Steps in a row of one optimizer in which only numbers are new: each is a round by itself, and nothing else happens in between.

For a small model even what `plan` measures is little beside what is said of a step: who is inside it, which round it belongs to, what
became of it. In a streak that is the same every time, so it is said of many steps at once: when the block of readings is full, when the
background thread asks, and when `recorder` ends the streak, which it does before anything else happens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from paramwatch.clock import Clock
from paramwatch.gradients import is_plain
from paramwatch.numbering import Rounds
from paramwatch.optimizers import params_of
from paramwatch.outside import Claims
from paramwatch.plan import LEFT, MOVED, Folded, Slot, address_of, grad_of, rates_of
from paramwatch.rounds import Common, OptimizerStep, PlainRound, Round


class Streak:
    """Stands for each of its steps while it is in progress.

    Args:
        last: The round before the first, of one step, which went the quick way.
        optimizer: Of that step.
        until: The number of the first step that is not like the others.
        rounds: Numbers the steps.
        clock: Of the host alone.
        publish: Takes rounds.
    """

    has_gradients = True
    step: OptimizerStep | None = None
    """The one that was in progress when the streak was ended."""

    def __init__(
        self, last: Round, optimizer: Optimizer, until: int, rounds: Rounds, clock: Clock, publish: Callable[[Round], None]
    ) -> None:
        (step,) = last.optimizer_steps
        assert step.folded is not None
        assert step.folded.grads is not None
        self._plan, self._grads = plan, grads = step.folded.plan, step.folded.grads
        self._common = Common(plan, step.raw_is_used, last.changed)
        self._until, self._rounds, self._known, self._clock, self._publish = until, rounds, rounds.known(optimizer), clock, publish
        self._ids, self._is_there = [*plan.ids], plan.is_there
        self._room = plan.rooms.pop()
        self._both, self._moved, self._left = self._room.both(grads), MOVED * plan.kind, LEFT * plan.kind
        self._done: deque[tuple[int, float, Slot, list[float], int]] = deque()
        self._slot: Slot | None = None
        """Of the step in progress, if there is one; what follows is of that, too."""
        self._optimizer: Optimizer | None = None
        self._tensors: Sequence[Tensor] = ()
        self._addresses: list[int] = []
        self._number, self._time, self._ns = last.step, last.time, 0

    def enter(self, optimizer: Optimizer) -> bool:
        """Measure a step as it is entered, with its gradients; False if it is not like the others.

        Here is all that has to be looked at to know that only numbers are new: who steps, what it holds, what the model holds, and the form
        of parameters and gradients. The rows are read anew on the general way alone, and that ends a streak.
        """
        started, plan, number = perf_counter_ns(), self._plan, self._rounds.step + 1
        if self._slot is not None or number >= self._until or plan.optimizer() is not optimizer or not is_plain(optimizer):
            return False
        params = params_of(optimizer)
        if [*map(id, params)] != self._ids or not self._is_there():
            return False
        tensors, forms, known = plan.chosen(params), plan.forms, self._grads
        if not (forms.at_a_glance(*tensors) or forms.hold(tensors)):
            return False
        grads = [*map(grad_of, tensors)]
        if not ((known.all and known.at_a_glance(*grads)) or known.fit(grads)):
            return False
        addresses, used = plan.found.of(tensors), known.addresses(grads)
        if addresses is None or used is None:
            return False
        self._slot = slot = plan.slot()
        self._addresses = addresses
        self._both.read([*addresses, *used], slot[2])
        self._number, self._time, self._optimizer, self._tensors = number, time.time(), optimizer, tensors
        self._ns = perf_counter_ns() - started
        return True

    def leave(self) -> bool:
        """Measure what the step did; False if that has to be done in another way."""
        started, plan, slot, optimizer, tensors = perf_counter_ns(), self._plan, self._slot, self._optimizer, self._tensors
        if slot is None or optimizer is None or (rates := rates_of(optimizer)) is None:
            return False
        if plan.exact:
            if [*map(address_of, tensors)] != self._addresses or not (plan.forms.at_a_glance(*tensors) or plan.forms.hold(tensors)):
                return False
            self._room.after.read(self._addresses, slot[2] + self._moved, slot[2] + self._left)
        self._rounds.again(self._known)
        self._slot, self._optimizer, self._tensors = None, None, ()
        self._done.append((self._number, self._time, slot, rates, self._ns + perf_counter_ns() - started))
        if not plan.slots:
            self.give()
        return True

    def give(self) -> None:
        """Publish what is done."""
        # one by one: the collector may come by, and close the Watch
        while self._done:
            number, entered, slot, rates, ns = self._done.popleft()
            folded = Folded(self._plan, slot, None, self._grads, rates)
            self._publish(PlainRound(self._common, number, entered, folded, ns / 1000))

    def end(self) -> OptimizerStep | None:
        """It is over: give away the step in progress, if there is one."""
        if self._slot is None or self._optimizer is None:
            self._plan.rooms.append(self._room)
            return None
        self._room.addresses = self._addresses
        self.step = OptimizerStep(self._number, True, False, [self._optimizer], self._plan.inventory)
        self.step.names, self.step.tensors, self.step.time = self._plan.names, self._tensors, self._time
        self.step.folded = Folded(self._plan, self._slot, self._room, self._grads)
        self._slot, self._optimizer, self._tensors = None, None, ()
        self._clock.count(self._ns)
        return self.step


Token: TypeAlias = OptimizerStep | Streak
"""What stands for a step in progress."""


class Streaks:
    """The streak of now, if there is one. Whoever calls holds the lock of the training threads.

    Args:
        rounds: Numbers the steps.
        claims: Who is inside a step.
        clock: What watching takes.
        publish: Takes rounds, in the order of the steps.
    """

    def __init__(self, rounds: Rounds, claims: Claims, clock: Clock, publish: Callable[[Round], None]) -> None:
        self._rounds, self._claims, self._clock, self._publish = rounds, claims, clock, publish
        self.now: Streak | None = None

    def follow(self, last: Round, optimizer: Optimizer, until: int) -> None:
        """Begin one after this round if its step was such as are in one; otherwise as in `Streak`."""
        folded = last.optimizer_steps[0].folded
        alone = len(last.optimizer_steps) == 1 and not last.others and self._claims.none
        # the model may have been read again when the step ended
        if alone and folded is not None and folded.on_way is None and folded.plan.is_of_now and self._clock.on_host:
            self.now = Streak(last, optimizer, until, self._rounds, self._clock, self._publish)

    def give(self) -> None:
        """Publish all steps that are over."""
        if self.now is not None:
            self.now.give()

    def end(self) -> None:
        """Something else happens. A step in progress goes on as any other."""
        self.give()
        streak, self.now = self.now, None
        if streak is not None and (step := streak.end()) is not None:
            self._claims.enter(step, step.names)

    def step_of(self, token: Token) -> OptimizerStep:
        """A step to which something else happens."""
        if not isinstance(token, Streak):
            return token
        self.end()
        assert token.step is not None
        return token.step
