"""Rounds that are alike, put together into a batch: for many at once what `assemble` does for one, and it is the specification.

Alike are rounds in which the same optimizers stepped the same rows of one inventory, and the same was measured of them; nearly all rounds
of most runs are. Then what differs are numbers alone, and they are put into arrays for all rounds at once: for a small model the cost of a
record is the number of operations, not of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from paramwatch.assemble import FOUND_INF, SCALE, described, idle_states, rows_of
from paramwatch.batch import Batch
from paramwatch.block import null_of
from paramwatch.columns import PARTS, Array
from paramwatch.measure import Reading
from paramwatch.outside import Outside
from paramwatch.record import GRAD_STATES, Changes, Inventory
from paramwatch.rounds import Measured, OptimizerStep, Round

Handed: TypeAlias = tuple[Round, str]
"""A round, and how its updates were measured."""

MOST = 256
"""Rounds in a batch."""
MOST_BYTES = 4_000_000
"""Of readings in a batch, as many as a processor's caches hold: more at once would be no quicker."""

_FORMS = 8
_UNCHANGED = Changes()
_INTEGERS = slice(0, sum(part.integer for part in PARTS.values()))
"""Where they are among all parts; the count is the first."""
_USED, _ZERO, _NONE, _FROZEN = (GRAD_STATES.index(state) for state in ("used", "zero", "none", "frozen"))


class Batching:
    """Finds what can be put together. It is shown every round, in order."""

    def __init__(self) -> None:
        self._inventory: Inventory | None = None
        self._last = -1
        self._forms: list[_Form] = []

    def alike(self, rounds: Sequence[Handed]) -> int:
        """How many of these, from the first on, make a batch; 0 if the first one does not, and has to be assembled by itself.

        The first round of an inventory never does, nor do the further parts of a step that came in several. To be asked once for each.
        """
        first = rounds[0][0]
        known, last = first.inventory is self._inventory, self._last
        self._inventory, self._last = first.inventory, first.step
        if not known or first.step <= last:
            return 0
        form = self._form(first)
        if form is None:
            return 0
        n, most = 1, max(1, min(MOST, MOST_BYTES // (round_bytes(first.inventory) or 1)))
        for done, _ in rounds[1:most]:
            if done.step <= self._last or not form.fits(done):
                break
            self._last = done.step
            n += 1
        return n

    def batch(self, rounds: Sequence[Handed]) -> Batch:
        """Put together what is alike."""
        return self._forms[0].batch(rounds)

    def _form(self, done: Round) -> _Form | None:
        """The form of a round, which becomes the first in the list."""
        for i, form in enumerate(self._forms):
            if form.fits(done):
                if i:
                    self._forms.insert(0, self._forms.pop(i))
                return form
        form = _Form(done)
        if not form.fits(done):
            return None
        self._forms = [form, *(other for other in self._forms if other.inventory is done.inventory)][:_FORMS]
        return form


def round_bytes(inventory: Inventory) -> int:
    """About what the readings of a round take."""
    return 8 * len(PARTS) * len(inventory.kinds) * len(inventory.rows)


class _Form:
    """What rounds that are alike have in common."""

    def __init__(self, done: Round) -> None:
        self.inventory = done.inventory
        self.steps = [_StepForm(step, done.inventory) for step in done.optimizer_steps]
        self._stepped = np.zeros(len(done.inventory.rows), dtype=bool)
        for step in self.steps:
            self._stepped[step.here] = True
        held = [np.arange(len(self._stepped))[step.here] for step in self.steps]
        # where two optimizers step one row, the later one has the last word, and this is not told here
        self._apart = sum(map(len, held)) == self._stepped.sum()
        self._idle = idle_states(done.inventory)

    def fits(self, done: Round) -> bool:
        """Whether a round is of this form."""
        if done.inventory is not self.inventory or done.others or done.apart or done.lost:
            return False
        steps = done.optimizer_steps
        return self._apart and 0 < len(steps) == len(self.steps) and all(map(_StepForm.fits, self.steps, steps))

    def batch(self, rounds: Sequence[Handed]) -> Batch:
        """Put rounds of this form together."""
        n, inventory = len(rounds), self.inventory
        values = _nothing(n, inventory)
        lr = np.full((n, len(inventory.rows)), np.nan)
        state = np.repeat(self._idle[None], n, axis=0)
        skipped = np.array([done.skipped for done, _ in rounds])
        scale = np.full(n, np.nan)
        changes = [_UNCHANGED] * n
        found: list[dict[str, int]] = [{} for _ in rounds]
        for i, form in enumerate(self.steps):
            steps = [done.optimizer_steps[i] for done, _ in rounds]
            amp = _stacked([step.amp for step in steps if step.amp])
            inf_found = amp[:, FOUND_INF] > 0
            skipped |= inf_found
            scale = np.where(np.isnan(amp[:, SCALE]), scale, amp[:, SCALE])
            entered = form.fill(values, steps, inf_found)
            lr[:, form.here] = _stacked([step.rates for step in steps if step.rates])[:, form.kept]
            state[:, form.here] = form.states(steps, values)
            for which, rows in form.changed([done for done, _ in rounds], steps, entered).items():
                found[which] |= rows
                changes[which] = Changes(outside=found[which])
        scales = [None if one != one else one for one in scale.tolist()]
        steps_of = zip(rounds, skipped.tolist(), scales, strict=True)
        whole = [described(done, mode, was_skipped, scale_of) for (done, mode), was_skipped, scale_of in steps_of]
        numbers, times = [done.step for done, _ in rounds], [done.time for done, _ in rounds]
        return Batch(inventory, numbers, times, whole, values, self._stepped, lr, state, changes)


@dataclass(frozen=True)
class _Piece:
    """One kind of some rows."""

    kind: str
    names: Sequence[str]
    axis: int | None
    """Where the kind is, None if it is not recorded."""
    kept: Array | slice
    """Which of these names are rows,"""
    here: Array | slice
    """and which rows."""

    @classmethod
    def of(cls, measured: Measured, inventory: Inventory) -> _Piece:
        axis = inventory.kinds.index(measured.kind) if measured.kind in inventory.kinds else None
        return cls(measured.kind, measured.names, axis, *_places(measured.names, inventory))

    def fits(self, measured: Measured) -> bool:
        return measured.kind == self.kind and measured.histograms is None and (measured.names is self.names or measured.names == self.names)


class _StepForm:
    """What the steps of one optimizer have in common."""

    def __init__(self, step: OptimizerStep, inventory: Inventory) -> None:
        self._inventory = inventory
        self._names = step.names
        self.kept, self.here = _places(step.names, inventory)
        self._pieces = [_Piece.of(measured, inventory) for measured in step.measured]
        self._left = bool(step.left)
        params = [i for i, measured in enumerate(step.entered) if measured.kind == "param"]
        self._param = params[0] if len(params) == 1 else None

    def fits(self, step: OptimizerStep) -> bool:
        if step.inventory is not self._inventory or step.unsure or step.rates is None or step.amp is None or self._param is None:
            return False
        measured, names = step.measured, self._names
        if len(measured) != len(self._pieces) or not (step.names is names or step.names == names):
            return False
        if not all(map(_Piece.fits, self._pieces, measured)):
            return False
        if not len(step.had_grad) == len(step.required_grad) == len(names):
            return False
        left = step.left
        entered = self._pieces[self._param]
        return entered.fits(left[0]) if self._left and len(left) == 1 else not left and not self._left

    def fill(self, values: Mapping[str, Array], steps: Sequence[OptimizerStep], inf_found: Array) -> Array:
        """Put into arrays what was measured, the later over the earlier; gives the parameters as they were entered."""
        measured = [step.measured for step in steps]
        entered = np.empty(0)
        for i, piece in enumerate(self._pieces):
            if piece.axis is None:
                continue
            wide = _stacked([each[i].reading for each in measured])
            if i == self._param:
                entered = wide
            if piece.kind == "update" and inf_found.any():
                wide = np.where(inf_found[:, None, None], np.nan, wide)
            _hold(values, wide[:, piece.kept], piece.axis, piece.here)
        return entered

    def states(self, steps: Sequence[OptimizerStep], values: Mapping[str, Array]) -> Array:
        """What became of the gradients of the rows that stepped."""
        axis = self._inventory.kinds.index("grad")
        count, zero = (values[part][:, axis, self.here] for part in ("count", "zero"))
        with_gradient: Array = np.where((zero == count) & (count > 0), _ZERO, _USED)
        had = _flags([step.had_grad for step in steps])
        if had.all():
            return with_gradient
        required = _flags([step.required_grad for step in steps])
        states: Array = np.where(had[:, self.kept], with_gradient, np.where(required[:, self.kept], _NONE, _FROZEN))
        return states

    def changed(self, rounds: Sequence[Round], steps: Sequence[OptimizerStep], entered: Array) -> dict[int, Mapping[str, int]]:
        """What `Round.changed` says of each of the rounds in which it says something."""
        outside = getattr(rounds[0].changed, "__self__", None)
        params = self._pieces[self._param or 0]
        left = _stacked([step.left[0].reading for step in steps])[:, params.kept] if self._left else None
        at = self._inventory, params.here
        if isinstance(outside, Outside) and outside.unchanged(*at, entered[:, params.kept], left, rounds[-1].step):
            return {}
        asked = ((i, done.changed(step, done.step)) for i, (done, step) in enumerate(zip(rounds, steps, strict=True)))
        return {i: found for i, found in asked if found}


def _places(names: Sequence[str], inventory: Inventory) -> tuple[Array | slice, Array | slice]:
    """Which of these names are rows, and which rows: ranges where they can be, since these are views."""
    return _range(rows_of(names, inventory)[0]), _range(rows_of(names, inventory)[1])


def _range(positions: Array) -> Array | slice:
    """The same positions."""
    if len(positions) and (np.diff(positions) == 1).all():
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions


def _stacked(readings: Sequence[Reading]) -> Array:
    """float64 [n, ...]."""
    arrays = [reading.numpy() for reading in readings]
    # `np.stack` takes ten times as long for small ones
    return arrays[0][None] if len(arrays) == 1 else np.concatenate(arrays).reshape(len(arrays), *arrays[0].shape)


def _flags(lists: Sequence[Sequence[bool]]) -> Array:
    """Whether, bool [n, m], or [1, m] where all are the same."""
    first, *others = lists
    return np.array([first] if all(other == first for other in others) else lists, dtype=bool)


def _nothing(n: int, inventory: Inventory) -> dict[str, Array]:
    """Parts as they are kept, where nothing is measured."""
    shape = n, len(inventory.kinds), len(inventory.rows)
    return {name: np.full(shape, null_of(name), part.dtype) for name, part in PARTS.items()}


def _hold(values: Mapping[str, Array], wide: Array, axis: int, here: Array | slice) -> None:
    """float64 as measured, [n, rows, parts] -> parts as they are kept."""
    unknown = np.isnan(wide[..., _INTEGERS])
    absent = unknown[..., 0] if unknown.any() else None
    with np.errstate(over="ignore", under="ignore"):
        for i, (name, part) in enumerate(PARTS.items()):
            column = wide[..., i]
            if absent is not None:
                lost = unknown[..., i] | absent if part.integer else absent
                column = np.where(lost, null_of(name), column)
            values[name][:, axis, here] = column
