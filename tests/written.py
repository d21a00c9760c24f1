"""Runs on disk, written cheaply: no model, no torch, as many rows and steps as a test wants, the same numbers each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from records import inventory

from paramwatch.columns import ABSENT, PARTS
from paramwatch.loading import load
from paramwatch.record import GRAD_STATES, Finding, Inventory, Record
from paramwatch.run import Run
from paramwatch.store import DiskFolder, Store

HOSTILE = (
    *(
        "<script>alert(1)</script>.w",
        '"><img src=x onerror=alert(1)>.w',
        "</title></svg></style><b>bold",
        "&lt;&amp;",
        "' onload='alert(1)",
    ),
    *("\x1b[2J\x1b]0;gone\x07\x9b31m.w", "a\nb\r\nc.w", "../../etc/passwd", "‮evil‬.w", "\u200b\x00", "caf\u0301e.重み"),
    *("=HYPERLINK(A1)", "+1", "-1", "@SUM(A1)", "\ttab", "\rreturn", 'quote"s,and;commas', "*", "[a-z]", " ", "."),
)
"""Names that something along the way may take for more than names."""


def record_of(
    step: int, inv: Inventory, *, spoilt: Sequence[int] = (), states: Mapping[int, str] | None = None, skipped: bool = False
) -> Record:
    """A record of noise that falls with the step.

    Args:
        step: Its number.
        inv: The rows.
        spoilt: Rows with one NaN element each in parameter, gradient and update.
        states: What became of the gradient of some rows; the others have used it.
        skipped: By a GradScaler.
    """
    rng, kinds, rows = np.random.default_rng(step), len(inv.kinds), len(inv.rows)
    values = {part: np.zeros((kinds, rows), PARTS[part].dtype) for _, part in inv.layout}
    values["count"][:] = [row.numel for row in inv.rows]
    size = np.exp(np.sin(np.arange(rows)) - step / 300)
    scales = np.ones((kinds, rows)) * [[1.0], *[[0.01]] * (kinds - 1)]
    scales[inv.kinds.index("update")] *= np.exp(np.cos(np.arange(rows)))
    for part in ("mean", "std", "rms", "min", "max"):
        values[part][:] = rng.uniform(0.8, 1.2, (kinds, rows)) * size * scales
    values["nan"][:, list(spoilt)] = 1
    state = np.zeros(rows, np.int8)
    for row, name in (states or {}).items():
        state[row] = GRAD_STATES.index(name)
        values["count"][1:, row] = ABSENT
    steps = {"skipped": skipped, "update_mode": "exact", "overhead_us": 30.0}
    return Record(step, 1_700_000_000.0 + step, inv, steps, values, np.ones(rows, bool), np.full(rows, 0.1), state)


def write(
    path: Path,
    names: Sequence[str] = ("0.weight", "0.bias", "2.weight", "4.weight", "6.weight", "6.bias"),
    steps: Sequence[int] = range(40),
    *,
    tied: Mapping[str, Sequence[str]] | None = None,
    spoilt: Callable[[int], Sequence[int]] = lambda step: (),
    states: Mapping[int, str] | None = None,
    skipped: Sequence[int] = (),
    findings: Sequence[Finding] = (),
    model: str = "Net",
) -> Run:
    """Write a run below a path, and open it."""
    inv = inventory(*names, tied=tied, model=model)
    store = Store(DiskFolder(path / "paramwatch"), max_bytes=10**9)
    for step in steps:
        store.write(record_of(step, inv, spoilt=spoilt(step), states=states, skipped=step in skipped))
    store.find(findings)
    store.close()
    return load(path)
