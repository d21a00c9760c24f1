"""A batch: records that are alike, as arrays, for the sinks of our own that take many at once.

What a batch holds is what its records hold, one after the other: a sink that takes it does with it what it would do with these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from paramwatch.columns import NON_FINITE, Array
from paramwatch.record import Changes, Inventory, Record


@dataclass(frozen=True)
class Batch:
    """Some steps of one inventory, in order, in which the same rows were stepped. Arrays are shaped [n, ...], n steps."""

    inventory: Inventory
    step: Sequence[int]
    time: Sequence[float]
    steps: Mapping[str, Sequence[Any]]
    """Key -> n values: the keys of `Record.steps`, which all of them have."""
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
            {key: (value,) for key, value in record.steps.items()},
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

    def described(self, i: int) -> dict[str, Any]:
        """What is known of one of the steps as a whole: `Record.steps`."""
        return {key: column[i] for key, column in self.steps.items()}

    def known(self, key: str) -> Sequence[Any]:
        """What is known of each step, by a key of `Record.steps`; None where nothing is."""
        return self.steps.get(key) or [None] * len(self)

    def __len__(self) -> int:
        return len(self.step)

    def at(self, which: Sequence[int]) -> Batch:
        """The steps at these positions, which are in order."""
        if len(which) == len(self):
            return self

        # numpy would make one of the list for each array
        index = np.array(which, np.intp)

        def chosen(each: Sequence[Any]) -> list[Any]:
            return [each[i] for i in which]

        return replace(
            self,
            step=chosen(self.step),
            time=chosen(self.time),
            steps={key: chosen(column) for key, column in self.steps.items()},
            values={part: array[index] for part, array in self.values.items()},
            lr=self.lr[index],
            grad_state=self.grad_state[index],
            changes=chosen(self.changes),
        )

    def record(self, i: int) -> Record:
        """One of the records; its arrays are views."""
        return Record(
            self.step[i],
            self.time[i],
            self.inventory,
            self.described(i),
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
