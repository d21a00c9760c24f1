"""Whether a row was changed between its steps: what a step leaves is compared with what the next one finds.

`Claims` works on the training thread and says of which rows nothing can be known; `Outside` compares, on the background thread. Compared
are parts, not elements: counts and extremes bit for bit, and what is summed to 1e-12 of the root mean square, since elements that have come
to lie in another order are summed in another order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import numpy as np

from paramwatch.columns import PARTS, SPECIALS, Array
from paramwatch.record import Inventory, Row
from paramwatch.rounds import Measured, OptimizerStep

_COUNT, _RMS = (list(PARTS).index(part) for part in ("count", "rms"))
_ORDERLESS = [i for i, part in enumerate(PARTS) if part in (*SPECIALS, "zero", "min", "max")]
_SUMMED = [i for i, part in enumerate(PARTS) if part in ("mean", "std", "rms")]
_ROUNDING = 1e-12


class Claims:
    """Which rows are inside a step, and which may have been changed by one that was left by an exception or is not recorded."""

    def __init__(self) -> None:
        self._running: list[tuple[weakref.ref[OptimizerStep], Sequence[str]]] = []
        self._doubtful: set[str] = set()

    def enter(self, step: OptimizerStep, names: Sequence[str]) -> None:
        """A step begins to hold these rows. Of those that another one holds as well (in another thread) it tells nothing."""
        unsure: set[str] = set()
        if self._running:
            for ref, claimed in self._running:
                other = ref()
                if other is None:
                    self._doubtful.update(claimed)
                elif other is not step:
                    unsure.update(set(names).intersection(claimed))
            self._running = [claim for claim in self._running if claim[0]() is not None]
        self._running.append((weakref.ref(step), names))
        if self._doubtful:
            unsure |= self._doubtful.intersection(names)
            self._doubtful.difference_update(names)
        if unsure:
            step.unsure = unsure.union(step.unsure)

    def leave(self, step: OptimizerStep) -> None:
        """It was recorded to its end."""
        if len(self._running) == 1 and self._running[0][0]() is step:
            self._running = []
        else:
            self._running = [claim for claim in self._running if claim[0]() is not step]

    @property
    def none(self) -> bool:
        """Whether nobody is inside a step, and nobody has to fear that someone was."""
        return not self._running and not self._doubtful

    def doubt(self, names: Iterable[str]) -> None:
        """These rows may have been stepped by someone who is not recorded."""
        self._doubtful.update(names)


class Outside:
    """What the last step of each row left. Of a row that changed its shape, dtype or device meanwhile, nothing is said."""

    def __init__(self) -> None:
        self._inventory: Inventory | None = None
        self._left = np.empty((0, len(PARTS)))
        self._since = np.empty(0, dtype=np.int64)
        self._shared = np.empty(0, dtype=bool)

    def changed(self, step: OptimizerStep, number: int) -> dict[str, int]:
        """The rows that this step found changed, each with the step that had left it; to be called once for each step, in order."""
        self._follow(step.inventory)
        step = step.unfolded()
        names = [name for measured in step.entered if measured.kind == "param" for name in measured.names]
        position = step.inventory.position
        which = [i for i, name in enumerate(names) if name in position]
        rows = np.array([position[names[i]] for i in which], dtype=np.intp)
        sure = np.array([names[i] not in step.unsure for i in which], dtype=bool)
        entered, left, since = _numbers(step.entered)[which], self._left[rows], self._since[rows]
        known = ~np.isnan(entered[:, _COUNT]) & ~np.isnan(left[:, _COUNT])
        found = np.flatnonzero(_differ(entered, left) & known & sure & ~self._shared[rows])
        self._left[rows], self._since[rows] = np.nan, number
        if step.left:
            self._left[rows[sure]] = _numbers(step.left)[which][sure]
        return {names[which[i]]: int(since[i]) for i in found}

    def unchanged(self, inventory: Inventory, rows: Array | slice, entered: Array, left: Array | None, number: int) -> bool:
        """Whether several steps in a row found all as it had been left, to the last bit; then none of them need be asked for by itself.

        Args:
            inventory: Of all of them.
            rows: What each of them held, of nothing unsure.
            entered: [steps, rows, parts], what they found.
            left: The same of what they left; None where nobody knows.
            number: That of the last one.
        """
        self._follow(inventory)
        before, alone = self._left[rows], ~self._shared[rows]
        differ = _bits_differ(entered[0], before)
        # nearly always nothing does, which is quick to see
        if differ.any() and (differ.any(-1) & alone & ~np.isnan(before[:, _COUNT])).any():
            return False
        if left is not None and (differ := _bits_differ(entered[1:], left[:-1])).any() and (differ.any(-1) & alone).any():
            return False
        self._left[rows], self._since[rows] = np.nan if left is None else left[-1], number
        return True

    def _follow(self, inventory: Inventory) -> None:
        if inventory is self._inventory:
            return
        before, self._inventory = self._inventory, inventory
        old_left, old_since = self._left, self._since
        self._left = np.full((len(inventory.rows), len(PARTS)), np.nan)
        self._since = np.zeros(len(inventory.rows), dtype=np.int64)
        # a row that shares memory with another is changed by the steps of that one
        sharing = {name for tie in inventory.ties if tie.kind == "storage" for name in tie.names}
        self._shared = np.array([row.name in sharing for row in inventory.rows], dtype=bool)
        for i, row in enumerate(inventory.rows):
            at = -1 if before is None else before.position.get(row.name, -1)
            if before is not None and at >= 0 and _form(before.rows[at]) == _form(row):
                self._left[i], self._since[i] = old_left[at], old_since[at]


def _bits_differ(entered: Array, left: Array) -> Array:
    """Which numbers."""
    differ: Array = entered.view(np.int64) != left.view(np.int64)
    return differ


def _differ(entered: Array, left: Array) -> Array:
    """Which rows: bool [rows]. A part of which nothing is known on both sides is equal."""
    nothing = np.isnan(entered) & np.isnan(left)
    exact = (entered == left) | nothing
    with np.errstate(invalid="ignore"):
        near = np.abs(entered - left) <= _ROUNDING * left[:, [_RMS]]
    same: Array = exact[:, _ORDERLESS].all(axis=1) & (exact | near)[:, _SUMMED].all(axis=1)
    return ~same


def _form(row: Row) -> tuple[object, ...]:
    return row.shape, row.dtype, row.device


def _numbers(measured: Iterable[Measured]) -> Array:
    """float64 [rows, parts] of the parameters among what was measured."""
    return np.concatenate([np.empty((0, len(PARTS))), *(each.reading.numpy() for each in measured if each.kind == "param")])
