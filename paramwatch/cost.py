"""Which share of a run's time watching took, as the closing report says it."""

from __future__ import annotations

from paramwatch.batch import Batch, BatchSink
from paramwatch.record import Record


class Cost(BatchSink):
    """A sink that sums up `overhead_us`: the time that the training thread spent on watching, on a GPU the time that its stream lost.

    The run's time is from where its first step was entered to where its last one was, all between the steps included; what the last step
    itself took counts on neither side. It is a least share: where steps are short, the background thread makes the training thread wait
    for the interpreter as well, and nobody can measure that from inside.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._last = 0.0
        self._spent_us = self._latest_us = 0.0

    def write(self, record: Record) -> None:
        """Take a record."""
        self._add(record.time, bool(record.stepped.any()), record.steps.get("overhead_us") or 0.0)

    def write_batch(self, batch: Batch) -> None:
        """Take the records of a batch."""
        *before, last = [spent or 0.0 for spent in batch.known("overhead_us")]
        self._add(batch.time[0], bool(batch.stepped.any()), sum(before))
        self._add(batch.time[-1], bool(batch.stepped.any()), last)

    def close(self) -> None:
        """Nothing is held open."""

    @property
    def share(self) -> float | None:
        """Between 0 and 1; None before the second step, and where the clock was set back."""
        if self._first is None or self._last <= self._first:
            return None
        return self._spent_us / 1e6 / (self._last - self._first)

    def _add(self, time: float, stepped: bool, spent_us: float) -> None:
        if stepped:
            self._first = time if self._first is None else self._first
            self._last = time
            self._spent_us += self._latest_us
            self._latest_us = 0.0
        self._latest_us += spent_us
