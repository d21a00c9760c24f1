"""Rules: read each record, say what a user would want to be told."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from paramwatch.record import Finding, Record

_CALLED = {"param": "parameter", "grad": "gradient"}


class FirstNonFinite:
    """Names the row that held the first non-finite value, once per run, and how many rows followed in the same step.

    A parameter comes before a gradient (it was there when the step was entered), then the order of the model. A step that a `GradScaler`
    skipped does not count: an infinity there is how the scaler finds its scale.
    """

    def __init__(self) -> None:
        self._said = False

    def __call__(self, record: Record) -> Iterator[Finding]:
        if self._said or record.steps.get("skipped"):
            return
        bad = {kind: self._non_finite(record, kind) for kind in _CALLED}
        spoilt = np.flatnonzero(np.any([counts > 0 for counts in bad.values()], axis=0))
        if not len(spoilt):
            return
        self._said = True
        kind = next(kind for kind in _CALLED if bad[kind].any())
        row = int(np.flatnonzero(bad[kind])[0])
        name = record.inventory.rows[row].name
        axis = record.inventory.kinds.index(kind)
        nan, count = int(record.values["nan"][axis, row]), int(record.values["count"][axis, row])
        others = len(spoilt) - 1
        followed = "no other row" if not others else "1 other row" if others == 1 else f"{others} other rows"
        infinite = int(bad[kind][row]) - nan
        message = (
            f"first non-finite value: {_CALLED[kind]} of {name!r} has {nan} NaN and {infinite} infinite of {count} elements "
            f"({followed} in the same step)"
        )
        yield Finding(record.step, "first_nonfinite", name, message)

    @staticmethod
    def _non_finite(record: Record, kind: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        axis = record.inventory.kinds.index(kind)
        total: np.ndarray[tuple[int], np.dtype[np.int64]] = sum(record.values[part][axis] for part in ("nan", "posinf", "neginf"))
        return np.where(record.values["count"][axis] >= 0, total, 0)


class SharedStorage:
    """Says once of each group of parameters that share memory without being tied what will go wrong."""

    def __init__(self) -> None:
        self._said: set[tuple[str, ...]] = set()

    def __call__(self, record: Record) -> Iterator[Finding]:
        for tie in record.inventory.ties:
            if tie.kind == "storage" and tie.names not in self._said:
                self._said.add(tie.names)
                yield Finding(record.step, "shared_storage", tie.names[0], str(tie))
