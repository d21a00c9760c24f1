"""Arms a step for splitting and takes its parts: when hooks are put where, what they gather, and that nothing of them stays.

From arming, which is when the step before has ended, until the rows in question have stepped there are two global module hooks, which
leave no trace on any module, and hooks on nodes of the autograd graph (`armed`). Off these steps there is nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from paramwatch.guard import Guard, logger
from paramwatch.inventory import LiveInventory
from paramwatch.ranks import is_one_of_several
from paramwatch.storage import is_there
from paramwatch.uses.armed import Armed
from paramwatch.uses.gram import alone, flat
from paramwatch.uses.obstacles import obstacle_to_splitting
from paramwatch.uses.reading import SplitReading, Sums
from paramwatch.uses.watched import Watched, WatchedRow, check_uses_of


class Splits:
    """Splits gradients by use.

    Args:
        live: The rows.
        module: Gives the model, None once it is gone.
        uses: Each N-th of the measured steps of each optimizer is split, the first one included.
        every: Each N-th step of each optimizer is measured.
        uses_of: Glob patterns over names of rows; `tied` stands for all that have several.

    Raises:
        ParamWatchError: No row fits them.
    """

    def __init__(self, live: LiveInventory, module: Callable[[], nn.Module | None], uses: int, every: int, uses_of: Sequence[str]) -> None:
        self.guard = Guard("Gradients are not split by use any more; recording and training go on.", self._switch_off)
        self._live, self._module = live, module
        self._period, self._uses_of = uses * every, uses_of
        self._said: set[str] = set()
        self._off = False
        # whether a step has several backward passes: one that was split had, or none had
        self._several: bool | None = None
        self._armed: Armed | None = None
        if hint := check_uses_of(live.current, live.sight.waits, uses_of):
            self._say(f"uses={uses}, but {hint}")

    # ---- the step, as the recorder tells it ----------------------------------------------------

    def due(self, steps: int) -> bool:
        """Whether the next step of an optimizer is split that has made so many."""
        return steps % self._period == 0

    def arm(self, number: int, names: Collection[str] | None = None) -> None:
        """Gather from now on what uses contribute to the gradients of these rows, by default of all, for their next step.

        Args:
            number: Of the next step.
            names: Of rows.
        """
        with self.guard.contain("preparing to split gradients by use"):
            self.disarm()
            module = self._module()
            if module is None or self._off:
                return
            if obstacle := obstacle_to_splitting(module):
                self._say(obstacle)
            watched = Watched(self._live, module, self._uses_of, number, names)
            if watched.any_open:
                self._armed = Armed(self._module, self._live, watched, self._several, bool(obstacle), self.guard, self._say)
                self._armed.install()

    def used(self, names: Collection[str], evaluation: bool, awaited: bool = False) -> SplitReading | None:
        """The gradients of these rows are complete, as far as is known; the last call before the end of the step is right.

        Args:
            names: Of the rows.
            evaluation: Whether a closure has just computed them, and may do so again.
            awaited: Whether a closure may still add to them.
        """
        if self._armed is None or self._off:
            return None
        found: list[tuple[str, Sums]] = []
        with self.guard.contain("multiplying the contributions of uses"), torch.no_grad():
            for row in self._armed.watched.still_open(names):
                if self._armed.watched.was_swapped(row):
                    row.found.forget()
                grad = row.tensor.grad
                if grad is not None and not is_there(grad):  # nothing can be said of what became of it
                    grad = None
                sums = row.found.sums(grad, awaited or evaluation) or self._unseen(row)
                if sums is not None:
                    row.passes = row.found.backwards
                    mode = f"{sums.mode} (this rank)" if is_one_of_several() else sums.mode
                    found.append((row.name, replace(sums, mode=mode)))
        return SplitReading(found) if found else None

    def ended(self, names: Collection[str], number: int, again: bool) -> None:
        """A step is over.

        Args:
            names: The rows that stepped.
            number: Of the step.
            again: Whether their next step is split.
        """
        if self._armed is None:
            if again:
                self.arm(number + 1, names)
            return
        watched = self._armed.watched
        stepped = watched.still_open(names)
        if passes := [row.passes for row in stepped if row.passes]:
            self._several = self._armed.several = bool(self._several) or max(passes) > 1
        watched.stepped(names, again)
        if self._off or not watched.waits(self._live.current, number - watched.number):
            # what was frozen so far is not among those that were watched
            still = {row.name for row in watched.rows.values() if row.open}.union(names if again else ())
            if still:
                self.arm(number + 1, still)
            else:
                self.disarm()

    def disarm(self) -> None:
        """Take everything away."""
        if self._armed is not None:
            self._armed.remove()
            self._armed = None

    def root(self, loss: Tensor) -> None:
        """Look for uses between the outputs of the model and the loss as well."""
        if self._armed is not None and loss.grad_fn is not None:
            self._armed.root(loss)

    # ---- pieces ------------------------------------------------------------------------------------

    def _switch_off(self) -> None:
        """After a failure of ours, possibly inside a hook, where torch may be walking the hooks: they go at the next step."""
        self._off = True
        if self._armed is not None:
            self._armed.over = True

    def _unseen(self, row: WatchedRow) -> Sums | None:
        """Of a row with a gradient in which no use has a part."""
        grad = row.tensor.grad
        if row.found.seen or grad is None or self._armed is None:
            return None
        return Sums([], "off" if self._armed.blind else "none", 0, 0.0, alone(flat(grad)))

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("paramwatch: %s", what)
