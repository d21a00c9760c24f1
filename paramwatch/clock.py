"""What watching takes: of the training thread by its clock, and of a GPU by events in its stream, for which nobody waits.

Between `recorder`, which starts and stops it around whatever it does inside a step, and `rounds`, which asks what came of it. On a GPU the
time between two events is what a training loses: the work that was queued between them where the GPU is behind, and where it is not, the
time that the training thread took to queue it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any, TypeAlias

import torch

from paramwatch.inventory import LiveInventory
from paramwatch.measure.capture import capturing
from paramwatch.record import Inventory

Started: TypeAlias = int | tuple[int, Any]
"""Nanoseconds, for a GPU with the event that was recorded then, if one was."""


class Events:
    """Events of one GPU, each used again when it has been read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.cuda.Event] = []

    def record(self) -> torch.cuda.Event | None:
        """One that is recorded in the stream of this moment; None while a graph is captured, of which it would become a part."""
        if capturing():
            return None
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def give_back(self, *events: torch.cuda.Event) -> None:
        """They have been read."""
        self._free += events


class Spent:
    """What one round took. `ready` and `wait` are for the training thread alone."""

    # one is made at each step, and costs least where nothing has to be set
    host_us = 0.0
    """Of the training thread."""
    device_us: float | None = None
    """Of the GPU, once it is known; None without one."""
    spans: Sequence[tuple[Events, Any, Any]] = ()
    """Where an event comes from, it, and the one at the end."""

    @property
    def ready(self) -> bool:
        """Whether all is known. Never waits."""
        while self.spans:
            events, start, end = self.spans[-1]
            if capturing() or not end.query():
                return False
            self.device_us = (self.device_us or 0.0) + 1000 * start.elapsed_time(end)
            events.give_back(start, end)
            self.spans = self.spans[:-1]
        return True

    def wait(self) -> None:
        """Until all is known: for flush and close only."""
        for _, _, end in self.spans:
            end.synchronize()
        if not self.ready:
            raise RuntimeError("events were waited for and have not come")


class Clock:
    """Sums up what watching takes.

    Args:
        live: The rows. Of several GPUs the first is asked.
    """

    def __init__(self, live: LiveInventory) -> None:
        self._live = live
        self._inventory: Inventory | None = None
        self._events: Events | None = None
        self._host_ns = 0
        self._spans: list[tuple[Events, Any, Any]] = []
        self.start: Callable[[], Started] = perf_counter_ns
        """Something of ours begins."""
        self.look()

    def stop(self, started: Started, to: Spent | None = None) -> None:
        """It is over.

        Args:
            started: When it began.
            to: Takes everything since one was given the last time.
        """
        if not isinstance(started, int):
            event = started[1]
            if event is not None and self._events is not None and (end := self._events.record()) is not None:
                self._spans.append((self._events, event, end))
        self.count(self.since(started))
        if to is not None:
            to.host_us, self._host_ns = to.host_us + self._host_ns / 1000, 0
            if self._spans:
                to.spans, self._spans = [*to.spans, *self._spans], []

    def since(self, started: Started) -> int:
        """Nanoseconds of the training thread."""
        return perf_counter_ns() - (started if isinstance(started, int) else started[0])

    def count(self, ns: int) -> None:
        """So many nanoseconds were taken as well."""
        self._host_ns += ns

    @property
    def on_host(self) -> bool:
        """Whether no device is asked."""
        return self._events is None

    def look(self) -> None:
        """Where the rows are now, of which another inventory may say something else."""
        if self._live.current is self._inventory:
            return
        self._inventory = self._live.current
        device = next((row.device for row in self._inventory.rows if row.device.startswith("cuda")), None)
        if device is None:
            self.start, self._events = perf_counter_ns, None
        elif self._events is None or str(self._events.device) != device:
            self.start, self._events = partial(_started, events := Events(torch.device(device))), events


def _started(events: Events) -> Started:
    return perf_counter_ns(), events.record()
