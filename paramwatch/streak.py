"""Steps in a row of one optimizer in which only numbers are new: each is a round by itself, and nothing else happens in between.

For a small model even what `plan` measures is little beside what is said of a step: who is inside it, which round it belongs to, what
became of it. In a streak that is the same every time, so it is said of many steps at once: when the block of readings is full, when the
background thread asks, and when `recorder` ends the streak, which it does before anything else happens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from paramwatch.clock import Clock, Started
from paramwatch.gradients import is_plain
from paramwatch.numbering import Rounds
from paramwatch.optimizers import params_of
from paramwatch.outside import Claims
from paramwatch.plan import Folded
from paramwatch.rounds import Common, OptimizerStep, PlainRound, Round


class Streak:
    """Stands for each of its steps while it is in progress.

    Args:
        last: The round before the first, of one step, which went the quick way.
        optimizer: Of that step.
        until: The number of the first step that is not like the others.
        rounds: Numbers the steps.
        clock: Of the host alone.
    """

    has_gradients = True
    step: OptimizerStep | None = None
    """The one that was in progress when the streak was ended."""

    def __init__(self, last: Round, optimizer: Optimizer, until: int, rounds: Rounds, clock: Clock) -> None:
        (step,) = last.optimizer_steps
        assert step.folded is not None
        self._plan = step.folded.plan
        self._common = Common(self._plan, step.raw_is_used, last.changed)
        self._until, self._rounds, self._known, self._clock = until, rounds, rounds.known(optimizer), clock
        self._done: deque[Round] = deque()
        self._folded: Folded | None = None
        self._optimizers: list[Optimizer] = []
        self._tensors: Sequence[Tensor] = ()
        self._number, self._time, self._ns = last.step, last.time, 0

    def enter(self, optimizer: Optimizer, started: Started) -> bool:
        """Measure a step as it is entered, with its gradients; False if it is not like the others.

        Args:
            optimizer: About to step.
            started: When this began.
        """
        plan, number = self._plan, self._rounds.step + 1
        if self._folded is not None or number >= self._until or plan.optimizer() is not optimizer or not is_plain(optimizer):
            return False
        params = params_of(optimizer)
        tensors = plan.tensors_of(params, tuple(map(id, params)), number)
        if tensors is None or (folded := plan.enter(tensors, True)) is None or folded.grads is None:
            return False
        self._number, self._time, self._folded = number, time.time(), folded
        self._optimizers, self._tensors = [optimizer], tensors
        self._ns = self._clock.since(started)
        return True

    def leave(self) -> bool:
        """Measure what the step did; False if that has to be done in another way."""
        started, folded = self._clock.start(), self._folded
        if folded is None or not folded.end(self._optimizers[0], self._tensors):
            return False
        self._rounds.again(self._known)
        self._folded, self._optimizers, self._tensors = None, [], ()
        self._done.append(PlainRound(self._common, self._number, self._time, folded, (self._ns + self._clock.since(started)) / 1000))
        return True

    @property
    def is_long(self) -> bool:
        """Whether it is time to give away what is done."""
        return not self._plan.slots

    def give(self, publish: Callable[[Round], None]) -> None:
        """Publish what is done."""
        # one by one: the collector may come by, and close the Watch
        while self._done:
            publish(self._done.popleft())

    def end(self) -> OptimizerStep | None:
        """Give away the step in progress, if there is one."""
        if self._folded is not None:
            self.step = OptimizerStep(self._number, True, False, self._optimizers, self._plan.inventory)
            self.step.names, self.step.folded, self.step.time = self._plan.names, self._folded, self._time
            self.step.tensors = self._tensors
            self._folded, self._optimizers, self._tensors = None, [], ()
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
        self._now: Streak | None = None

    def follow(self, last: Round, optimizer: Optimizer, until: int) -> None:
        """Begin one after this round if its step was such as are in one; otherwise as in `Streak`."""
        folded = last.optimizer_steps[0].folded
        alone = len(last.optimizer_steps) == 1 and not last.others and self._claims.none
        if alone and folded is not None and folded.on_way is None and self._clock.on_host:
            self._now = Streak(last, optimizer, until, self._rounds, self._clock)

    def enter(self, optimizer: Optimizer, started: Started) -> Streak | None:
        """Begin a step of it; None if it is none."""
        return self._now if self._now is not None and self._now.enter(optimizer, started) else None

    def leave(self, token: Token) -> bool:
        """End one; False if it goes on in another way."""
        streak = self._now
        if streak is not token or streak is None or not streak.leave():
            return False
        if streak.is_long:
            self.give()
        return True

    def give(self) -> None:
        """Publish all steps that are over."""
        if self._now is not None:
            self._now.give(self._publish)

    def end(self) -> None:
        """Something else happens. A step in progress goes on as any other."""
        self.give()
        streak, self._now = self._now, None
        if streak is not None and (step := streak.end()) is not None:
            self._claims.enter(step, step.names)

    def step_of(self, token: Token) -> OptimizerStep:
        """A step to which something else happens."""
        if not isinstance(token, Streak):
            return token
        self.end()
        assert token.step is not None
        return token.step
