"""What a run did not have: rows without a gradient or without an optimizer, and steps that were skipped.

A record shows what was there in one step; what never was, only the whole run can tell. It is counted by a `Tally`: record by record, among
the sinks of a `Watch`, or from the blocks of a run that is read. `repr` and the closing report say it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from paramwatch.batch import Batch, BatchSink
from paramwatch.block import Block
from paramwatch.columns import ABSENT, Array
from paramwatch.lettering import shortened
from paramwatch.record import GRAD_STATES, Inventory, Record

SHOWN = 3
"""So many rows, modules or steps are named before the rest are only counted."""

_ZERO, _NONE, _FROZEN = (GRAD_STATES.index(state) for state in ("zero", "none", "frozen"))


@dataclass(frozen=True)
class Absence:
    """What a run did not have, as far as it was counted. Rows are positions in the inventory."""

    inventory: Inventory
    frozen: tuple[int, ...]
    """Rows that are not trained: as they were at their latest step or, where they had none, as they are."""
    unowned: tuple[int, ...]
    """Trainable rows that no optimizer held when it stepped."""
    without_gradient: tuple[int, ...]
    """Rows that had no gradient in any step of theirs, and were not frozen in the latest. A gradient of zeros is one."""
    steps: int
    """How many steps were counted."""
    skipped: int
    """How many of them were skipped."""
    first_skipped: tuple[int, ...]
    """The numbers of the first of those."""

    def wrong(self, which: str) -> list[str]:
        """What a user would want to know, in words; nothing if all is well. Neither a frozen row nor a skipped step is a fault.

        Args:
            which: What the steps that were counted are called: "measured", "stored".
        """
        found = []
        if self.unowned:
            are = "is" if len(self.unowned) == 1 else "are"
            found.append(f"{counted(len(self.unowned), 'trainable row')} {are} in no optimizer that stepped ({self._named(self.unowned)})")
        if self.without_gradient:
            rows = counted(len(self.without_gradient), "row")
            found.append(f"{rows} had no gradient in any {which} step ({self._named(self.without_gradient)})")
        return found

    def skipped_steps(self) -> str:
        """The numbers of the skipped steps, as far as they are shown."""
        return _and_others(map(str, self.first_skipped), self.skipped - len(self.first_skipped))

    def _named(self, rows: Sequence[int]) -> str:
        """Rows by name; where they are many, a module whose names are all among them stands for its rows: `encoder.*`."""
        chosen, others = set(rows), set[str]()
        for name, row in self.inventory.names if len(rows) > SHOWN else ():
            prefix = name if row not in chosen else ""
            while (prefix := prefix.rpartition(".")[0]) and prefix not in others:
                others.add(prefix)
        groups: dict[str, list[str]] = {}
        for row in rows:
            name = self.inventory.rows[row].name
            groups.setdefault(_widest(name, others) if len(rows) > SHOWN else name, []).append(name)
        shown = list(groups.items())[:SHOWN]
        labels = [members[0] if len(members) == 1 else f"{prefix}.*" for prefix, members in shown]
        return _and_others(map(_printable, labels), len(rows) - sum(len(members) for _, members in shown))


def counted(n: int, what: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{n:,} {what}{'s' * (n != 1)}"


class _Seen(NamedTuple):
    """What is known of each row that was ever there, by name."""

    position: dict[str, int]
    had: Array
    """bool: it had a gradient in some step."""
    last: Array
    """int8: the state of its gradient at its latest step, `ABSENT` where it had none."""


class Tally(BatchSink):
    """A sink that counts. It can be asked from any thread and at any time, and waits for nothing: it knows of the records it was given."""

    def __init__(self) -> None:
        # replaced as a whole when there are new rows, so that another thread never sees half of it
        self._seen = _Seen({}, np.zeros(0, bool), np.zeros(0, np.int8))
        self._inventory: Inventory | None = None
        self._here = np.zeros(0, np.intp)
        self._steps = 0, -1
        self._skipped: tuple[int, tuple[int, ...], int] = 0, (), -1

    def write(self, record: Record) -> None:
        """Take a record."""
        self._count(record.inventory, record.stepped[None], record.grad_state[None])
        self._count_step(record.step, bool(record.steps.get("skipped")))

    def write_batch(self, batch: Batch) -> None:
        """Take the records of a batch."""
        self._count(batch.inventory, np.broadcast_to(batch.stepped, batch.grad_state.shape), batch.grad_state)
        for step, skipped in zip(batch.step, batch.known("skipped"), strict=True):
            if skipped:
                self._count_skipped(step)
        # none of them was counted before
        self._steps = self._steps[0] + len(batch), batch.step[-1]

    def close(self) -> None:
        """Nothing is held open."""

    def add(self, block: Block) -> None:
        """Take the steps of a block."""
        self._count(block.inventory, block.stepped, block.grad_state)
        skipped = block.steps["skipped"].to_pylist() if "skipped" in block.steps else [False] * len(block.step)
        for step, was_skipped in zip(block.step.tolist(), skipped, strict=True):
            self._count_step(step, bool(was_skipped))

    def absence(self, inventory: Inventory) -> Absence:
        """What was not there, of the rows of this inventory."""
        (position, had, last), (skipped, first, _) = self._seen, self._skipped
        frozen, unowned, without = [], [], []
        for i, row in enumerate(inventory.rows):
            at = position.get(row.name)
            state = ABSENT if at is None else last[at]
            # an earlier session may have stepped what nobody steps now
            stepped = row.owned and state != ABSENT
            if (state == _FROZEN) if stepped else not row.trainable:
                frozen.append(i)
            elif not row.owned:
                unowned.append(i)
            elif state == _NONE and not had[at]:
                without.append(i)
        return Absence(inventory, tuple(frozen), tuple(unowned), tuple(without), self._steps[0], skipped, first)

    def _count(self, inventory: Inventory, stepped: Array, states: Array) -> None:
        if inventory is not self._inventory:
            self._inventory, self._here = inventory, self._places(inventory)
        _, had, last = self._seen
        # none of these is a state where no step was
        had[self._here] |= ((states >= 0) & (states <= _ZERO)).any(0)
        latest = len(stepped) - 1 - stepped[::-1].argmax(0)
        known = np.flatnonzero(stepped.any(0))
        last[self._here[known]] = states[latest[known], known]

    def _places(self, inventory: Inventory) -> Array:
        """Where in `_seen` the rows of an inventory are."""
        position, had, last = self._seen
        if more := [row.name for row in inventory.rows if row.name not in position]:
            position = position | {name: i for i, name in enumerate(more, start=len(position))}
            had, last = np.append(had, np.zeros(len(more), bool)), np.append(last, np.full(len(more), ABSENT, np.int8))
            self._seen = _Seen(position, had, last)
        return np.array([position[row.name] for row in inventory.rows], np.intp)

    def _count_step(self, step: int, skipped: bool) -> None:
        """Steps come in order, but one may come in several parts."""
        steps, latest = self._steps
        if step != latest:
            self._steps = steps + 1, step
        if skipped:
            self._count_skipped(step)

    def _count_skipped(self, step: int) -> None:
        times, first, latest = self._skipped
        if step != latest:
            self._skipped = times + 1, (*first, step)[:SHOWN], step


def _widest(name: str, others: set[str]) -> str:
    """The shortest prefix of a name that rows left out do not share; the name itself if they share all."""
    end = name.find(".")
    while end >= 0 and name[:end] in others:
        end = name.find(".", end + 1)
    return name if end < 0 else name[:end]


def _and_others(labels: Iterable[str], more: int) -> str:
    return ", ".join(labels) + (f" and {more:,} other{'s' * (more != 1)}" if more else "")


def _printable(name: str) -> str:
    return shortened(name if name.isprintable() else repr(name), 80)
