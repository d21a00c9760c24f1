"""From a step in progress to a record: takes the rows when a step is entered, measures at the right moments, closes rounds.

Everything here runs on the training thread, inside torch's hooks, and waits for nothing. What it measured is put together into a `Record`
by `assemble`, on the background thread, when the readings have arrived.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from paramwatch.clock import Clock
from paramwatch.deviceplan import DevicePlan
from paramwatch.gradients import is_plain, see_gradients, take_raw
from paramwatch.guard import Guard
from paramwatch.inventory import LiveInventory
from paramwatch.measure import Kept, captured, measure, prepare, read_scalars
from paramwatch.measure.capture import capturing
from paramwatch.measure.histograms import histograms
from paramwatch.numbering import Rounds
from paramwatch.opened import OpenRound
from paramwatch.optimizers import params_of, trains
from paramwatch.others import Others
from paramwatch.outside import Claims
from paramwatch.plan import Plan, Plans
from paramwatch.raw import RawGradients
from paramwatch.rounds import Measured, OptimizerStep, Round
from paramwatch.streak import Streak, Streaks, Token
from paramwatch.updates import UpdateMode, Updates
from paramwatch.uses.splits import Splits

_NO_AMP = read_scalars([None, None])


class Recorder:
    """The watcher of one model: a `steps.Watcher` that hands a `Round` to `publish` whenever one is closed.

    Args:
        live: The rows.
        guard: Contains our failures.
        publish: Takes a closed round, on the training thread.
        first_step: Number of the first step.
        every: Measure each N-th step of each optimizer.
        update: How the update is measured.
        full: Measure the update's direction and the optimizer's state as well.
        raw: Record gradients before clipping: those that `before_clipping` is told of, elsewhere the used ones.
        histograms: Make histograms at each N-th measured step of each optimizer; 0 for never.
        splits: Splits gradients by use.
    """

    plans = True
    """Without it every step goes the general way."""

    def __init__(
        self,
        live: LiveInventory,
        guard: Guard,
        publish: Callable[[Round], None],
        *,
        first_step: int = 0,
        every: int = 1,
        update: UpdateMode = "auto",
        full: bool = False,
        raw: bool = False,
        histograms: int = 0,
        splits: Splits | None = None,
    ) -> None:
        self.guard = guard
        # an optimizer may step in another thread (inside backward, on a GPU's autograd thread)
        self.lock = threading.RLock()
        self.foreign_steps = self.steps_entered = self.steps_seen = 0
        self.context, self.backwards = dict[str, Any](), 0
        self.raw, self.splits = raw, splits
        self.amp_scale: Tensor | None = None
        # asked at each step: whether it is none of the run's (a search for a learning rate)
        self.idle: Callable[[], bool] = bool
        self._live = live
        self._rounds = Rounds(first_step, live.holds, live.named)
        self._plans = Plans(live, (Plan, DevicePlan))
        self.updates = Updates(update, live, each=every == 1, full=full)
        self._every, self._full, self._histograms = every, full, histograms
        self._raw = RawGradients(live.named)
        self._others = Others(live, first_step)
        self._open = OpenRound(live, self._others, publish)
        self._claims, self._clock = Claims(), Clock(live)
        self.streaks = Streaks(self._rounds, self._claims, self._clock, publish)
        prepare(live.glance, histograms > 0)

    @property
    def next_step(self) -> int:
        """The number a resumed run goes on at."""
        return self._rounds.step + (1 if self.steps_seen else 0)

    # ---- a step, as `steps` tells it ---------------------------------------------------------

    def begin(self, optimizer: Optimizer, at_once: bool = False) -> Token | None:
        """Take the rows of this optimizer and their old values; `at_once` its gradients too, if that is quick."""
        started = self._clock.start()
        idle = captured() or self.idle()
        with self.lock:
            # no name is given to the streak: a step of it that was left by an exception must be gone when it is over
            if at_once and not idle and self.streaks.now is not None and self.streaks.now.enter(optimizer):
                return self.streaks.now
            if idle:
                self.streaks.end()
                self._claims.doubt(row.name for row in self._live.current.rows)
                return None
            if (step := self._enter(optimizer, at_once=at_once)) is None:
                self.foreign_steps += trains(optimizer)
                if self._live.changed.lost:
                    # nothing of ours may ever step again: there may be no other record to say it with
                    self._open.at(self._rounds.step, time.time(), self.context)
                    self.close_round()
                return None
            if step.wanted:
                if step.number >= self._others.due:
                    self._others.look(step.number, step.binned)
                if self.splits is not None and step.has_gradients:
                    step.split(step.names, self.splits.used(step.names, evaluation=False))
            self.steps_entered += 1
            self._clock.stop(started)
            return step

    def begin_inside(self, token: Token, optimizer: Optimizer) -> None:
        """Add what only the inner optimizer holds."""
        if captured():
            return
        with self.lock, torch.no_grad():
            step = self.streaks.step_of(token)
            step.unfold()
            held = self._live.held_by(params_of(optimizer), step.number)
            step.optimizers.append(optimizer)
            if more := {name: tensor for name, tensor in held.items() if name not in step.names}:
                self._add_rows(step, more)

    def gradients(self, token: Token, optimizer: Optimizer, evaluation: bool, awaited: bool = False) -> None:
        """Measure gradients; the last time wins, and `awaited` says that there may be another."""
        with self.lock:
            step = self.streaks.step_of(token)
        if evaluation:
            step.evaluations += 1
        if step.wanted and not _is_captured(step):
            started = self._clock.start()
            # another thread may be clipping
            with self.lock:
                names = see_gradients(step, optimizer, self._raw, self._full, evaluation)
            if self.splits is not None:
                step.split(names, self.splits.used(names, evaluation, awaited))
            self._clock.stop(started)

    def end(self, token: Token) -> None:
        """Measure the update, count the step, close what is complete."""
        with self.lock:
            alone = not (self.backwards or self.context or self.amp_scale is not None)
            if alone and isinstance(token, Streak) and token is self.streaks.now and token.leave():
                self.steps_seen += 1
                return
            step = self.streaks.step_of(token)
            # entered before the capture began (`watch.step` around it): counted, and not measured
            step.wanted = step.wanted and not _is_captured(step)
            # a closure that was never called, and whose gradients were there already
            if step.wanted and not step.has_gradients:
                self.gradients(step, step.optimizers[0], evaluation=False)
            self._count(step)

    # ---- beside the steps --------------------------------------------------------------------

    def before_clipping(self, tell: Callable[[RawGradients], object]) -> None:
        """For who knows what becomes of gradients before their step, and tells of it."""
        with self.guard.contain("measuring gradients before clipping"), self.lock, torch.no_grad():
            started = self._clock.start()
            self.streaks.end()
            if not captured():
                tell(self._raw)
            self._clock.stop(started)

    def skipped(self, optimizer: Optimizer, scale: Tensor | None = None) -> None:
        """Record a step that was to be made and was not, as by a `GradScaler` that met an infinity; gradients may still carry a scale."""
        with self.lock, torch.no_grad():
            started = self._clock.start()
            if (step := self._enter(optimizer, snapshot=False)) is not None:
                self._clock.stop(started)
                step.carried = scale
                self.gradients(step, optimizer, evaluation=False)
                self._count(step, skipped=True)

    def close_round(self) -> None:
        """Publish what was measured of the open round, if anything; the rest of it will be added to the same step."""
        with self.lock:
            self.streaks.give()
            self._open.close()

    def finish(self) -> None:
        """Close the open round and measure the rows that no optimizer steps one last time."""
        with self.lock, torch.no_grad():
            self.streaks.end()
            if self.steps_seen:
                changed = self._live.changed
                apart = list(changed.apart)
                # what is queued into a graph that is captured would be done at each replay
                if not capturing():
                    self._others.measure(self._rounds.step)
                # what is done to a model after its last step harms no training
                changed.apart = apart
                if self._others.measured or changed.apart or changed.lost:
                    self._open.at(self._rounds.step, time.time(), self.context)
            self.close_round()
            self._plans.forget()

    # ---- pieces --------------------------------------------------------------------------------

    def _enter(self, optimizer: Optimizer, snapshot: bool = True, at_once: bool = False) -> OptimizerStep | None:
        params, plan = params_of(optimizer), self._plans.of(optimizer)
        ids = tuple(map(id, params))
        if plan is None and self._plans.strangers.know(optimizer, ids):
            return None
        self.streaks.end()
        number, made = self._rounds.due(optimizer, ids)
        measured, beside = divmod(made, self._every)
        binned = not beside and self._histograms > 0 and measured % self._histograms == 0
        if plan is not None and snapshot and not binned and (tensors := plan.tensors_of(params, ids, number)) is not None:
            step = OptimizerStep(number, not beside, False, [optimizer], plan.inventory)
            step.names, step.tensors = plan.names, tensors
            # gradients that may have been clipped, or are scaled, are looked at more closely
            plain = at_once and not self._raw and is_plain(optimizer)
            step.folded = plan.enter(tensors, plain) if step.wanted else None
            if step.folded is not None or not step.wanted:
                self._claims.enter(step, plan.names)
                return step
        with torch.no_grad():
            rows = self._live.held_by(params, number)
            self._clock.look()
            self._live.changed.look(optimizer, params, rows, self._live.current, number)
            if not rows:
                self._plans.strangers.add(optimizer, ids)
                return None
            step = OptimizerStep(number, not beside, binned, [optimizer], self._live.current)
            self._add_rows(step, rows, snapshot)
            if self.plans and not self._full and self.updates.mode in ("exact", "off"):
                self._plans.make(optimizer, rows, self.updates.mode == "exact", self.updates.tells(optimizer))
            else:
                self._plans.forget()
        return step

    def _count(self, step: OptimizerStep, skipped: bool = False) -> None:
        started = self._clock.start()
        self._claims.leave(step)
        number = self._rounds.take(step.optimizers[0], None if step.folded is None else step.folded.plan.held, step.optimizers[1:])
        self.steps_seen += 1
        self._open.close(but=number)
        self._raw.stepped(step.names, step.tensors)
        if step.wanted:
            self._measure_end(step)
            opened = self._open.at(number, step.time, self.context)
            complete = opened.add(step, skipped, self.backwards)
            self._clock.stop(started, opened.spent)
            if complete:
                self._open.close()
                if self._every == 1 and not (self._histograms or self.splits or self.context or self.backwards or self._raw):
                    self.streaks.follow(opened, step.optimizers[0], self._others.due)
        if self.splits is not None:
            self.splits.ended(step.names, number, again=self.splits.due(self._rounds.steps_of(step.optimizers[0])))
        self.backwards = 0
        step.tensors, step.before, step.grads, step.optimizers = (), (), None, []

    def _add_rows(self, step: OptimizerStep, rows: Mapping[str, Tensor], snapshot: bool = True) -> None:
        names, chosen = list(rows), list(rows.values())
        step.names, step.tensors = [*step.names, *names], [*step.tensors, *chosen]
        self._claims.enter(step, names)
        if not step.wanted:
            return
        kept = self.updates.keep(chosen, step.number) if snapshot else None
        if kept is not None:
            step.before = [*step.before, kept]
        reading = measure(chosen, kept=kept if isinstance(kept, Kept) else None)
        step.entered = [*step.entered, Measured("param", names, reading, histograms(chosen) if step.binned else None)]

    def _measure_end(self, step: OptimizerStep) -> None:
        folded = step.folded
        scale, self.amp_scale = self.amp_scale if step.scale is None else step.scale, None
        step.amp = None if scale is None and step.found_inf is None else read_scalars([scale, step.found_inf])
        if folded is not None and not step.raw and (step.amp is None or folded.scales) and folded.end(step.optimizers[0], step.tensors):
            step.raw_is_used = self.raw
            return
        step.amp = step.amp or _NO_AMP
        step.unfold()
        take_raw(step, self.raw)
        with torch.no_grad():
            self.updates.end(step)


def _is_captured(step: OptimizerStep) -> bool:
    """Whether what is measured of a step now would become a part of a CUDA graph."""
    return (step.folded is None or step.folded.on_device) and captured()
