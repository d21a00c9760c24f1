"""From a closed round, whose readings have arrived, to a frozen `Record`. Runs on the background thread."""

from __future__ import annotations

from typing import Any

import numpy as np

from paramwatch.columns import ABSENT, PARTS, Array, kinds_of
from paramwatch.record import GRAD_STATES, Inventory, Record
from paramwatch.rounds import Measured, OptimizerStep, Round

_SCALE, _FOUND_INF = 0, 1


def assemble(done: Round, update_mode: str) -> Record:
    """Put the readings of a round into arrays [kinds, rows]; what was measured later overrides what was measured before."""
    inventory = done.inventory
    position = {row.name: i for i, row in enumerate(inventory.rows)}
    kinds = kinds_of(inventory.layout)
    wide = np.full((len(PARTS), len(kinds), len(position)), np.nan)
    stepped = np.zeros(len(position), dtype=bool)
    lr = np.full(len(position), np.nan)
    state = _idle_states(inventory)
    skipped, scale = done.skipped, None
    for measured in done.others:
        _fill(wide, measured, kinds, position)
    for step in done.optimizer_steps:
        amp = step.amp.numpy() if step.amp is not None else np.full(2, np.nan)
        inf_found = amp[_FOUND_INF] > 0
        skipped = skipped or bool(inf_found)
        scale = scale if np.isnan(amp[_SCALE]) else float(amp[_SCALE])
        for measured in step.measured:
            if not (inf_found and measured.kind == "update"):
                _fill(wide, measured, kinds, position)
        rows = [position.get(name, -1) for name in step.names]
        rates = step.rates.numpy() if step.rates is not None else np.full(len(rows), np.nan)
        kept = [i for i, row in enumerate(rows) if row >= 0]
        here = [rows[i] for i in kept]
        stepped[here] = True
        lr[here] = rates[kept]
        state[here] = _states(step, inventory, here, kept, wide[:, kinds.index("grad")])
    evaluations = [step.evaluations for step in done.optimizer_steps if step.evaluations]
    steps: dict[str, Any] = {
        "skipped": skipped,
        "amp_scale": scale,
        "evaluations": sum(evaluations) if evaluations else None,
        "backwards": None,
        "update_mode": update_mode,
        "overhead_us": done.overhead_ns / 1000,
        **done.steps,
    }
    return Record(done.step, done.time, inventory, steps, _held(wide), stepped, lr, state)


def _fill(wide: Array, measured: Measured, kinds: tuple[str, ...], position: dict[str, int]) -> None:
    if measured.kind not in kinds:
        return
    numbers = measured.reading.numpy()
    known = [i for i, name in enumerate(measured.names) if name in position]
    wide[:, kinds.index(measured.kind), [position[measured.names[i]] for i in known]] = numbers[known].T


def _idle_states(inventory: Inventory) -> Array:
    """The gradient states of a round in which nobody stepped."""
    frozen, unowned = GRAD_STATES.index("frozen"), GRAD_STATES.index("unowned")
    idle = [ABSENT if row.owned else (unowned if row.trainable else frozen) for row in inventory.rows]
    return np.array(idle, dtype=np.int8)


def _states(step: OptimizerStep, inventory: Inventory, here: list[int], kept: list[int], grad: Array) -> list[int]:
    count, zero = grad[list(PARTS).index("count")], grad[list(PARTS).index("zero")]
    # an optimizer inside the step may have brought rows after the gradients were measured
    had = [*step.had_grad, *([False] * len(step.names))]
    required = dict(enumerate(step.required_grad))
    found = []
    for row, i in zip(here, kept, strict=True):
        if not had[i]:
            found.append(GRAD_STATES.index("none" if required.get(i, inventory.rows[row].trainable) else "frozen"))
        else:
            found.append(GRAD_STATES.index("zero" if zero[row] == count[row] and count[row] > 0 else "used"))
    return found


def _held(wide: Array) -> dict[str, Array]:
    """float64 as measured -> parts as they are kept: whole numbers as int64, the rest as float32."""
    held: dict[str, Array] = {}
    absent = np.isnan(wide[list(PARTS).index("count")])
    with np.errstate(over="ignore", under="ignore"):
        for i, (name, part) in enumerate(PARTS.items()):
            if part.integer:
                filled = np.where(np.isnan(wide[i]), ABSENT if name == "count" else 0, wide[i])
                held[name] = np.where(absent, ABSENT if name == "count" else 0, filled).astype(np.int64)
            else:
                held[name] = np.where(absent, np.nan, wide[i]).astype(np.float32)
    return held
