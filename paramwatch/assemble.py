"""From a closed round, whose readings have arrived, to a frozen `Record`. Runs on the background thread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paramwatch.bins import BINS
from paramwatch.block import null_of
from paramwatch.columns import ABSENT, PARTS, STATISTICS, Array, getter
from paramwatch.record import GRAD_STATES, Changes, Inventory, Record, Split
from paramwatch.rounds import Measured, OptimizerStep, Round

SCALE, FOUND_INF = 0, 1
"""Where they are in `OptimizerStep.amp`."""

_COUNT = list(PARTS).index("count")
_INTEGERS = slice(0, sum(part.integer for part in PARTS.values()))
"""Where they are among all parts; the count is the first."""


def assemble(done: Round, update_mode: str) -> Record:
    """Put the readings of a round into arrays [kinds, rows]; what was measured later overrides what was measured before."""
    inventory = done.inventory
    kinds = inventory.kinds
    wide = np.full((len(PARTS), len(kinds), len(inventory.rows)), np.nan)
    stepped = np.zeros(len(inventory.rows), dtype=bool)
    lr = np.full(len(inventory.rows), np.nan)
    state = idle_states(inventory)
    skipped, scale = done.skipped, None
    outside: dict[str, int] = {}
    histograms: dict[str, Array] = {}
    for measured in done.others:
        _fill(wide, histograms, measured, inventory)
    for folded in done.optimizer_steps:
        step = folded.unfolded()
        amp = step.amp.numpy() if step.amp is not None else np.full(2, np.nan)
        inf_found = amp[FOUND_INF] > 0
        skipped = skipped or bool(inf_found)
        scale = scale if np.isnan(amp[SCALE]) else float(amp[SCALE])
        for measured in step.measured:
            if not (inf_found and measured.kind == "update"):
                _fill(wide, histograms, measured, inventory)
        kept, here = rows_of(step.names, inventory)
        stepped[here] = True
        lr[here] = step.rates.numpy()[kept] if step.rates is not None else np.nan
        outside |= done.changed(step, done.step)
        state[here] = _states(step, inventory, kept, here, wide[:, kinds.index("grad")])
    changes = Changes(tuple(done.apart), tuple(done.lost), outside)
    steps = {key: value for key, (value,) in described([(done, update_mode)], [skipped], [scale]).items()}
    values = _held(wide)
    return Record(done.step, done.time, inventory, steps, values, stepped, lr, state, histograms, _uses(done, values), changes)


def described(rounds: Sequence[tuple[Round, str]], skipped: Sequence[bool], scales: Sequence[float | None]) -> dict[str, list[Any]]:
    """What is known of the steps of some rounds as a whole: key -> a value for each.

    Args:
        rounds: With how the updates of each were measured. Of all the same keys are known, except that one may have counted no backwards.
        skipped: Whether the step was.
        scales: That of a `GradScaler`.
    """
    hosts, devices = [done.host_us for done, _ in rounds], [done.device_us for done, _ in rounds]
    return {
        "skipped": [*skipped],
        "amp_scale": [*scales],
        "evaluations": [done.evaluations or None for done, _ in rounds],
        "backwards": [done.steps.get("backwards") for done, _ in rounds],
        "update_mode": [mode for _, mode in rounds],
        **({"overhead_us": hosts} if devices[0] is None else {"overhead_us": devices, "overhead_host_us": hosts}),
        **{key: [done.steps[key] for done, _ in rounds] for key in rounds[0][0].steps if key != "backwards"},
    }


def _uses(done: Round, values: Mapping[str, Array]) -> dict[str, Split]:
    norms = STATISTICS["grad_norm"].compute(getter(values, done.inventory.kinds), False)

    def grad_norm(row: str) -> float:
        return float(norms[done.inventory.position[row]]) if row in done.inventory.position else math.nan

    found: dict[str, Split] = {}
    for step in done.optimizer_steps:
        for uses in step.uses:
            found |= uses.splits(grad_norm)
    return found


def _fill(wide: Array, histograms: dict[str, Array], measured: Measured, inventory: Inventory) -> None:
    known, rows = rows_of(measured.names, inventory)
    if measured.kind in inventory.kinds:
        wide[:, inventory.kinds.index(measured.kind), rows] = measured.numpy()[known].T
    if measured.histograms is not None:
        counts = measured.histograms.numpy()
        counted = ~np.isnan(counts[known, 0])
        if counted.any():
            all_rows = histograms.setdefault(measured.kind, np.full((len(inventory.rows), BINS), ABSENT, np.int64))
            # most often all of them, which need no copy
            all_rows[rows[counted]] = counts if counted.all() and len(known) == len(counts) else counts[known[counted]]


def rows_of(names: Sequence[str], inventory: Inventory) -> tuple[Array, Array]:
    """Which of these names are rows, and which rows."""
    found = np.array([inventory.position.get(name, -1) for name in names], dtype=np.intp)
    known = np.flatnonzero(found >= 0)
    return known, found[known]


def idle_states(inventory: Inventory) -> Array:
    """The gradient states of a round in which nobody stepped."""
    frozen, unowned = GRAD_STATES.index("frozen"), GRAD_STATES.index("unowned")
    idle = [ABSENT if row.owned else (unowned if row.trainable else frozen) for row in inventory.rows]
    return np.array(idle, dtype=np.int8)


def _states(step: OptimizerStep, inventory: Inventory, kept: Array, here: Array, grad: Array) -> Array:
    count, zero = (grad[list(PARTS).index(part)][here] for part in ("count", "zero"))
    had, required = np.zeros(len(step.names), dtype=bool), np.array([row.trainable for row in inventory.rows])[here]
    # an optimizer inside the step may have brought rows after the gradients were measured
    seen = kept < len(step.had_grad)
    had[: len(step.had_grad)] = step.had_grad
    required[seen] = np.array(step.required_grad, dtype=bool)[kept[seen]]
    used, nothing, none, frozen = (GRAD_STATES.index(state) for state in ("used", "zero", "none", "frozen"))
    with_gradient = np.where((zero == count) & (count > 0), nothing, used)
    return np.where(had[kept], with_gradient, np.where(required, none, frozen)).astype(np.int8)


def _held(wide: Array) -> dict[str, Array]:
    """float64 as measured -> parts as they are kept."""
    absent, held = np.isnan(wide[_COUNT]), {}
    with np.errstate(over="ignore", under="ignore"):
        for (name, part), column in zip(PARTS.items(), wide, strict=True):
            lost = absent | np.isnan(column) if part.integer else absent
            held[name] = np.where(lost, null_of(name), column).astype(part.dtype)
    return held


def nothing(n: int, inventory: Inventory) -> dict[str, Array]:
    """Parts as they are kept, where nothing is measured."""
    shape = n, len(inventory.kinds), len(inventory.rows)
    return {name: np.full(shape, null_of(name), part.dtype) for name, part in PARTS.items()}


def hold(values: Mapping[str, Array], wide: Array, axis: int | slice, here: Array | slice) -> None:
    """float64 as measured, [n, rows, parts] (of several kinds [n, kinds, rows, parts]) -> parts as they are kept."""
    unknown = np.isnan(wide[..., _INTEGERS])
    absent = unknown[..., 0] if unknown.any() else None
    with np.errstate(over="ignore", under="ignore"):
        for i, (name, part) in enumerate(PARTS.items()):
            column = wide[..., i]
            if absent is not None:
                lost = unknown[..., i] | absent if part.integer else absent
                column = np.where(lost, null_of(name), column)
            values[name][:, axis, here] = column
