"""Rows of different lengths, one after another in one array: what reads elements is dear for one row at a time and cheap for many.

Below `formulas` and `sidebyside`. Every row has one element at least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from paramwatch.columns import Array


class Ragged:
    """Rows of elements.

    Args:
        flat: All elements, row after row.
        lengths: Elements of each row.
    """

    __slots__ = ("ends", "flat", "lengths", "starts")

    def __init__(self, flat: Array, lengths: Array) -> None:
        self.flat, self.lengths = flat, lengths
        self.ends = lengths.cumsum()
        self.starts = self.ends - lengths

    @classmethod
    def of(cls, rows: Sequence[Array]) -> Ragged:
        """Of rows that are at hand one by one."""
        return cls(rows[0] if len(rows) == 1 else np.concatenate(rows), np.array([len(row) for row in rows]))

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self) -> list[Array]:
        """Each row, where it lies."""
        return [self.flat[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]

    def blocks(self) -> Iterator[Array]:
        """Neighbours of one length side by side [row, element], where they lie."""
        start = 0
        for length, alike in groupby(self.lengths.tolist()):
            end = start + length * len(list(alike))
            yield self.flat[start:end].reshape(-1, length)
            start = end

    def like(self, flat: Array) -> Ragged:
        """Other elements in rows of the same lengths."""
        found = object.__new__(Ragged)
        found.flat, found.lengths, found.starts, found.ends = flat, self.lengths, self.starts, self.ends
        return found

    def each(self, column: Array) -> Array:
        """The number of each row beside every element of it."""
        return column.astype(self.flat.dtype, copy=False).repeat(self.lengths)

    def places(self) -> Array:
        """Where in its row every element is, from 0, in the dtype of the elements."""
        longest = np.arange(int(self.lengths.max())).astype(self.flat.dtype)
        return np.concatenate([longest[:length] for length in self.lengths.tolist()])

    def extremes(self) -> tuple[Array, Array]:
        """The first element of each row, and the last."""
        return self.flat[self.starts], self.flat[self.ends - 1]

    def means(self, values: Array) -> Array:
        """The mean of such values, one for every element, in each row."""
        found: Array = np.add.reduceat(values, self.starts) / self.lengths
        return found

    def counts(self, where: Array) -> Array:
        """How many elements of each row are marked."""
        # NumPy adds small integers several times as fast as truth values
        found: Array = np.add.reduceat(where.view(np.uint8), self.starts, dtype=np.uint32).astype(np.int64)
        return found

    def sorted(self) -> Ragged:
        """The elements of each row in ascending order."""
        found = self.like(self.flat.copy())
        for block in found.blocks():
            block.sort(axis=1)
        return found

    def only(self, which: Array) -> Ragged:
        """The rows that are marked."""
        return self if which.all() else Ragged(self.flat.compress(which.repeat(self.lengths)), self.lengths[which])

    def where(self, marked: Array) -> Ragged:
        """The elements that are marked; of every row there must be one."""
        return self if marked.all() else Ragged(self.flat.compress(marked), self.counts(marked))

    def within(self, first: Array, last: Array) -> Ragged:
        """Each row without so many of its first elements, and of its last."""
        left = self.lengths - first - last
        if (left == self.lengths).all():
            return self
        begins, ends = (self.starts + first).tolist(), (self.ends - last).tolist()
        # of rows that are not short, cheaper than a mask
        return Ragged(np.concatenate([self.flat[begin:end] for begin, end in zip(begins, ends, strict=True)]), left)

    def every(self, stride: int) -> Ragged:
        """The first element of each row and every so many after it."""
        few = Ragged(self.flat[:0], -(-self.lengths // stride))
        at = np.arange(0, stride * int(few.ends[-1]), stride) + (self.starts - stride * few.starts).repeat(few.lengths)
        return few.like(self.flat.take(at))
