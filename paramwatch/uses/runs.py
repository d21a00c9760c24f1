"""The runs of autograd's engine, and which segment each of them recomputes of what was checkpointed with `use_reentrant=True`.

Such a segment is recomputed within a run, and what it contributes is computed in a further one, inside the first. Segments within segments
take this further down. All of it is one backward pass: that of the outermost run.
"""

from __future__ import annotations

from collections import Counter


class Runs:
    """Those of one step."""

    def __init__(self) -> None:
        self._around: dict[int, int] = {}
        """Of runs that go on, the innermost last: the outermost one around each."""
        self._segments = Counter[int]()
        """How many each outermost run has recomputed, those within others as well."""
        self._latest: dict[int, int] = {}
        """The segment that each run has recomputed last."""
        self._come = set[tuple[int, int]]()
        """Segments, by outermost run, of which a contribution has come."""

    def begin(self, task: int) -> bool:
        """Something happens in a run; whether that is the first time."""
        if task in self._around:
            return False
        self._around[task] = next(reversed(self._around.values()), task)
        return True

    def end(self, task: int) -> bool:
        """Whether none goes on any more."""
        self._around.pop(task, None)
        if not self._around:
            self._segments.clear()
            self._latest.clear()
            self._come.clear()
        return not self._around

    def none_goes_on(self) -> None:
        """Those that an exception has left have not said so."""
        self._around.clear()

    def segment(self, task: int) -> tuple[int, int]:
        """The outermost run around one that recomputes something, and the number of the segment in that.

        What a segment contributes comes before the next one is recomputed.
        """
        root = self._around.get(task, task)
        number = self._latest.get(task)
        if number is None or (root, number) in self._come:
            number = self._latest[task] = self._segments[root]
            self._segments[root] += 1
        return root, number

    def came(self, root: int, number: int) -> None:
        """A contribution of a segment has come."""
        self._come.add((root, number))
