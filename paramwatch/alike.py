"""The form of a round: what is the same in rounds that are alike, and how many of one form become a batch at once.

What a form does for many rounds `assemble` does for one; `batching` finds which rounds are of one form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from paramwatch.assemble import FOUND_INF, SCALE, described, hold, idle_states, nothing, rows_of
from paramwatch.batch import Batch
from paramwatch.columns import Array
from paramwatch.measure import Reading
from paramwatch.outside import Outside
from paramwatch.plan import ENTERED, LEFT, MOVED, USED, Folded
from paramwatch.record import GRAD_STATES, UNCHANGED, Changes, Inventory
from paramwatch.rounds import Measured, OptimizerStep, PlainRound, Round

Handed: TypeAlias = tuple[Round, str]
"""A round, and how its updates were measured."""

_COUNTED = frozenset({"backwards"})
"""What a round may know of its step that others of its form do not."""
_USED, _ZERO, _NONE, _FROZEN = (GRAD_STATES.index(state) for state in ("used", "zero", "none", "frozen"))


class Form:
    """What rounds that are alike have in common."""

    def __init__(self, done: Round) -> None:
        self.inventory = done.inventory
        self.steps = [_form_of(step, done.inventory, i) for i, step in enumerate(done.optimizer_steps)]
        self._stepped = np.zeros(len(done.inventory.rows), dtype=bool)
        for step in self.steps:
            self._stepped[step.here] = True
        held = [np.arange(len(self._stepped))[step.here] for step in self.steps]
        # where two optimizers step one row, the later one has the last word, and this is not told here
        self._apart = sum(map(len, held)) == self._stepped.sum()
        self._idle = idle_states(done.inventory)
        self._keys, self._has_device = done.steps.keys() - _COUNTED, done.device_us is not None
        # of the last streak that is of this form
        self._common: tuple[object, object] = None, None

    def fits(self, done: Round) -> bool:
        """Whether a round is of this form."""
        if not isinstance(done, PlainRound):
            return self._fits(done)
        # what rounds have in common says it of all of them
        common, grads = self._common
        if done.common is common and done.folded.grads is grads:
            return True
        if fits := self._fits(done):
            self._common = done.common, done.folded.grads
        return fits

    def _fits(self, done: Round) -> bool:
        if done.inventory is not self.inventory or done.others or done.apart or done.lost:
            return False
        if done.steps.keys() - _COUNTED != self._keys or (done.device_us is not None) is not self._has_device:
            return False
        steps = done.optimizer_steps
        if not self._apart or not 0 < len(steps) == len(self.steps):
            return False
        for form, step in zip(self.steps, steps, strict=True):  # noqa: SIM110  # a generator takes longer
            if not form.fits(step):
                return False
        return True

    def batch(self, rounds: Sequence[Handed]) -> Batch:
        """Put rounds of this form together."""
        n, inventory = len(rounds), self.inventory
        values = nothing(n, inventory)
        lr = np.full((n, len(inventory.rows)), np.nan)
        state = np.repeat(self._idle[None], n, axis=0)
        skipped = np.array([done.skipped for done, _ in rounds])
        scale = np.full(n, np.nan)
        changes = [UNCHANGED] * n
        found: dict[int, dict[str, int]] = {}
        closed = [done for done, _ in rounds]
        for form in self.steps:
            read = form.read(values, closed)
            if read.amp is not None:
                skipped |= read.amp[:, FOUND_INF] > 0
                scale = np.where(np.isnan(read.amp[:, SCALE]), scale, read.amp[:, SCALE])
            lr[:, form.here], state[:, form.here] = read.rates, read.states
            for which, rows in _changed(form, closed, read).items():
                found[which] = {**found.get(which, {}), **rows}
                changes[which] = Changes(outside=found[which])
        scales = [None if one != one else one for one in scale.tolist()]
        whole = described(rounds, skipped.tolist(), scales)
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
        plain = measured.kind == self.kind and measured.histograms is None and measured.factors is None
        return plain and (measured.names is self.names or measured.names == self.names)


class _Read(NamedTuple):
    """What was read of one optimizer's steps; of rows, those `here`."""

    entered: Array
    """The rows as the steps found them,"""
    left: Array | None
    """and as they left them, where somebody asks."""
    rates: Array
    states: Array
    """What became of the gradients."""
    amp: Array | None = None
    """As in `OptimizerStep.amp`, [n, 2]."""


class _StepForm:
    """What the steps of one optimizer have in common.

    Its `number` says which of the optimizers of a round it is.
    """

    def __init__(self, step: OptimizerStep, inventory: Inventory, number: int) -> None:
        self._inventory, self.number = inventory, number
        self._names = step.names
        self._kept, self.here = _places(step.names, inventory)
        self._pieces = [_Piece.of(measured, inventory) for measured in step.measured]
        self._left = bool(step.left)
        params = [i for i, measured in enumerate(step.entered) if measured.kind == "param"]
        self._param = params[0] if len(params) == 1 else None

    def fits(self, step: OptimizerStep) -> bool:
        if (
            step.folded is not None
            or step.inventory is not self._inventory
            or step.unsure
            or step.uses
            or step.rates is None
            or step.amp is None
            or self._param is None
        ):
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

    def read(self, values: Mapping[str, Array], rounds: Sequence[Round]) -> _Read:
        """Put into arrays what was measured, the later over the earlier."""
        steps = [done.optimizer_steps[self.number] for done in rounds]
        measured, amp = [step.measured for step in steps], _stacked([step.amp for step in steps if step.amp])
        entered, inf_found = np.empty(0), amp[:, FOUND_INF] > 0
        for i, piece in enumerate(self._pieces):
            if piece.axis is None:
                continue
            wide = _stacked([each[i].reading for each in measured])
            if i == self._param:
                entered = wide[:, piece.kept]
            if piece.kind == "update" and inf_found.any():
                wide = np.where(inf_found[:, None, None], np.nan, wide)
            hold(values, wide[:, piece.kept], piece.axis, piece.here)
        left = _stacked([step.left[0].reading for step in steps])[:, self._pieces[self._param or 0].kept] if self._left else None
        rates, states = _stacked([step.rates for step in steps if step.rates])[:, self._kept], self._states(steps, values)
        return _Read(entered, left, rates, states, amp)

    def _states(self, steps: Sequence[OptimizerStep], values: Mapping[str, Array]) -> Array:
        with_gradient = _with_gradient(values, self._inventory, self.here)
        had = _flags([step.had_grad for step in steps])
        if had.all():
            return with_gradient
        required = _flags([step.required_grad for step in steps])
        states: Array = np.where(had[:, self._kept], with_gradient, np.where(required[:, self._kept], _NONE, _FROZEN))
        return states


class _FoldedForm:
    """The same of steps that went the quick way: their readings lie side by side as they are."""

    def __init__(self, step: OptimizerStep, folded: Folded, inventory: Inventory, number: int) -> None:
        self._plan, self._grads, self._raw = folded.plan, folded.grads, step.raw_is_used
        self._inventory, self.number = inventory, number
        self._kept, self.here = _places(folded.plan.names, inventory)
        assert folded.grads is not None
        self._had, self._required = np.array(folded.grads.had), np.array(folded.grads.required)

    def fits(self, step: OptimizerStep) -> bool:
        folded = step.folded
        if folded is None or folded.plan is not self._plan or folded.grads is not self._grads or step.inventory is not self._inventory:
            return False
        return not (step.unsure or step.uses or step.raw or step.amp) and step.raw_is_used is self._raw

    def read(self, values: Mapping[str, Array], rounds: Sequence[Round]) -> _Read:
        each = [done.folded if isinstance(done, PlainRound) else done.optimizer_steps[self.number].folded for done in rounds]
        steps = [folded for folded in each if folded is not None]
        wide = _side_by_side(steps)[:, :, self._kept]
        # these three come first in every layout
        hold(values, wide[:, ENTERED : MOVED + 1], slice(ENTERED, MOVED + 1), self.here)
        if self._raw and "grad_raw" in self._inventory.kinds:
            hold(values, wide[:, USED], self._inventory.kinds.index("grad_raw"), self.here)
        rates: Array = np.array([folded.rates for folded in steps], dtype=np.float64)[:, self._plan.group_of[self._kept]]
        had, required = self._had[self._kept], self._required[self._kept]
        states = _with_gradient(values, self._inventory, self.here)
        states = states if had.all() else np.where(had, states, np.where(required, _NONE, _FROZEN))
        return _Read(wide[:, ENTERED], wide[:, LEFT] if self._plan.leaves else None, rates, states)


def _form_of(step: OptimizerStep, inventory: Inventory, number: int) -> _StepForm | _FoldedForm:
    if step.folded is None:
        return _StepForm(step, inventory, number)
    return _FoldedForm(step, step.folded, inventory, number)


def _side_by_side(steps: Sequence[Folded]) -> Array:
    """float64 [n, kinds, rows, parts]: no copy where they lie in one block, one after the other."""
    pieces: list[Array] = []
    start = 0
    for i in range(1, len(steps) + 1):
        first = steps[start]
        if i == len(steps) or steps[i].block is not first.block or steps[i].position != first.position + i - start:
            pieces.append(first.block[first.position : first.position + i - start])
            start = i
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _with_gradient(values: Mapping[str, Array], inventory: Inventory, here: Array | slice) -> Array:
    """What became of gradients that are there."""
    axis = inventory.kinds.index("grad")
    count, zero = (values[part][:, axis, here] for part in ("count", "zero"))
    states: Array = np.where((zero == count) & (count > 0), _ZERO, _USED)
    return states


def _changed(form: _StepForm | _FoldedForm, rounds: Sequence[Round], read: _Read) -> dict[int, Mapping[str, int]]:
    """What `Round.changed` says of each of the rounds in which it says something."""
    outside = getattr(rounds[0].changed, "__self__", None)
    if isinstance(outside, Outside) and outside.unchanged(rounds[0].inventory, form.here, read.entered, read.left, rounds[-1].step):
        return {}
    asked = ((i, done.changed(done.optimizer_steps[form.number], done.step)) for i, done in enumerate(rounds))
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
