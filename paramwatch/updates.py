"""What a step changed: the old values that are kept when it is entered, and how they are compared with the new ones at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from paramwatch.guard import logger
from paramwatch.inventory import LiveInventory
from paramwatch.measure import Kept, measure, measure_end, measure_sampled_update, read_scalars, sample
from paramwatch.measure.histograms import update_histograms
from paramwatch.measure.room import may_copy, ran_out
from paramwatch.optimizers import learning_rates, moves_between_steps, states
from paramwatch.rounds import Measured, OptimizerStep

UpdateMode: TypeAlias = Literal["auto", "exact", "sampled", "off"]


class Updates:
    """How updates are measured.

    Args:
        mode: `auto` until the first step shows how much memory there is.
        live: The rows.
        each: Whether every step of every optimizer is measured.
        full: Measure the optimizer's state as well.
    """

    def __init__(self, mode: UpdateMode, live: LiveInventory, each: bool, full: bool) -> None:
        self.mode = mode
        self._live = live
        self._each, self._full = each, full

    def keep(self, tensors: Sequence[Tensor], number: int) -> Kept | list[Tensor] | None:
        """What the update of these tensors, in this step, is measured against; a `Kept` is filled as they are measured."""
        if self.mode == "auto":
            self.mode = "exact" if may_copy(self._live.tensors(number)) else "sampled"
        if self.mode == "exact":
            try:
                return Kept(tensors, filled=False)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                logger.warning("no memory is left for a copy of the parameters: updates are estimated from samples from now on")
                self.mode = "sampled"
        return [sample(tensor) for tensor in tensors] if self.mode == "sampled" else None

    def end(self, step: OptimizerStep) -> None:
        """Measure what a step did, with which learning rates, and what it left."""
        after, names, start = step.tensors, step.names, 0
        for before in step.before:
            these = slice(start, start := start + len(before))
            if isinstance(before, Kept):
                reading, left = measure_end(after[these], before, step.grads and step.grads[these], step.scale)
                step.left = [*step.left, Measured("param", names[these], left)]
                binned = update_histograms(after[these], before.copies) if step.binned else None
            else:
                reading, binned = measure_sampled_update(after[these], before), None
            step.ended = [*step.ended, Measured("update", names[these], reading, binned)]
        if not step.before:  # a step that was skipped
            step.left = [measured for measured in step.entered if measured.kind == "param"]
        if not all(map(self.tells, step.optimizers)):
            step.left = []
        if self._full:
            for kind in ("exp_avg", "exp_avg_sq"):
                step.ended = [*step.ended, Measured(kind, names, measure(states(step.optimizers, after, kind)))]
        step.rates = read_scalars(learning_rates(step.optimizers, after))

    def tells(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether what a step leaves tells if its rows were changed before the next one.

        Not where a row steps unmeasured in between, or where its optimizer moves it.
        """
        return self.mode == "exact" and self._each and not moves_between_steps(optimizer)
