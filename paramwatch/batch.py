"""A batch: records that are alike, as arrays, for the sinks of our own that take many at once.

What a batch holds is what its records hold, one after the other: a sink that takes it does with it what it would do with these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from paramwatch.columns import NON_FINITE, Array
from paramwatch.record import Changes, Inventory, Record


@dataclass(frozen=True)
class Batch:
    """Some steps of one inventory, in order, in which the same rows were stepped. Arrays are shaped [n, ...], n steps."""

    inventory: Inventory
    step: Sequence[int]
    time: Sequence[float]
    steps: Sequence[Mapping[str, Any]]
    values: Mapping[str, Array]
    """Part -> [n, kinds, rows], as in `Record.values`."""
    stepped: Array
    """bool [rows]: one for all steps."""
    lr: Array
    grad_state: Array
    changes: Sequence[Changes]

    @classmethod
    def of(cls, record: Record) -> Batch:
        """A single record."""
        return cls(
            record.inventory,
            (record.step,),
            (record.time,),
            (record.steps,),
            {part: array[None] for part, array in record.values.items()},
            record.stepped,
            record.lr[None],
            record.grad_state[None],
            (record.changes,),
        )

    @cached_property
    def finite(self) -> bool:
        """Whether everything that was measured is finite."""
        # counts are never negative, and numpy finds the largest twice as fast as any that is not zero
        return not any(self.values[part].max(initial=0) for part in NON_FINITE)

    def __len__(self) -> int:
        return len(self.step)

    def at(self, which: Sequence[int]) -> Batch:
        """The steps at these positions, which are in order."""
        if len(which) == len(self):
            return self

        def chosen(each: Sequence[Any]) -> list[Any]:
            return [each[i] for i in which]

        return replace(
            self,
            step=chosen(self.step),
            time=chosen(self.time),
            steps=chosen(self.steps),
            values={part: array[which] for part, array in self.values.items()},
            lr=self.lr[which],
            grad_state=self.grad_state[which],
            changes=chosen(self.changes),
        )

    def record(self, i: int) -> Record:
        """One of the records; its arrays are views."""
        return Record(
            self.step[i],
            self.time[i],
            self.inventory,
            self.steps[i],
            {part: array[i] for part, array in self.values.items()},
            self.stepped,
            self.lr[i],
            self.grad_state[i],
            changes=self.changes[i],
        )

    def __iter__(self) -> Iterator[Record]:
        return map(self.record, range(len(self)))


class BatchSink(ABC):
    """A sink of our own, which the worker gives many records at once where it can."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take one record."""

    @abstractmethod
    def write_batch(self, batch: Batch) -> None:
        """Take the records of a batch, of later steps than those before, whose inventory the last record had already."""

    @abstractmethod
    def close(self) -> None:
        """Called once, after the last record."""
