"""A sink as the background thread sees it: switched off by name when it fails, passed over while a call to it does not return.

Between `worker`, whose threads come here one after the other, and the sinks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from paramwatch.absence import counted
from paramwatch.batch import Batch, BatchSink
from paramwatch.guard import Guard, logger
from paramwatch.record import Record, Sink

Piece: TypeAlias = Callable[[], None]
"""Some of the work of the background thread. Another thread can go on with the next piece while one hangs."""


@dataclass(frozen=True)
class _Call:
    doing: str
    thread: threading.Thread = field(default_factory=threading.current_thread)
    began: float = field(default_factory=time.monotonic)


class Outlet:
    """A sink, its guard, and the call that it is in. It is called by one thread at a time, in the order of the records."""

    missed = 0
    """How many records it was not given, since it was still at an earlier one."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._name: str = getattr(sink, "called", type(sink).__name__)
        self._guard = Guard(f"{self._name} is switched off; recording and training go on.", self._release)
        self._call: _Call | None = None
        self._late = False

    def pieces(self, given: Record | Batch) -> Iterator[Piece]:
        """What is to be done to write this: all at once where the sink is ours, else one record after the other."""
        if not isinstance(given, Batch):
            yield partial(self._write, given)
        elif not isinstance(self._sink, BatchSink):
            for record in given if not self._guard.failed else ():
                yield partial(self._write, record)
        else:
            doing = f"writing {len(given)} steps from {given.step[0]} on to {self._name}"
            yield partial(self._enter, doing, partial(self._sink.write_batch, given), len(given))

    def tell(self, method: str) -> None:
        """Let a sink that buffers `flush`, or write at a `tick` what has waited long enough."""
        if call := getattr(self._sink, method, None):
            self._enter(f"writing to {self._name}", call)

    def close(self) -> None:
        """To be called last. A sink that hangs is left as it is; one that failed may still close its files."""
        if self._call is None:
            with self._guard.contain(f"closing {self._name}"):
                self._sink.close()
        if self.missed:
            logger.warning("paramwatch: %s was not given %s, while it was passed over.", self._name, counted(self.missed, "record"))

    def holds_up(self, thread: threading.Thread, seconds: float) -> bool:
        """Whether a thread has been in one call for so long."""
        call = self._call
        return call is not None and call.thread is thread and time.monotonic() - call.began > seconds

    def passed_over(self) -> None:
        """Say, once, that nobody waits any longer."""
        if (call := self._call) and not self._late:
            self._late = True
            logger.warning(
                "paramwatch: %s has taken more than %.1f s and goes on. %s is passed over until it is done; recording and training go on.",
                call.doing,
                time.monotonic() - call.began,
                self._name,
            )

    def _write(self, record: Record) -> None:
        self._enter(f"writing step {record.step} to {self._name}", partial(self._sink.write, record), 1)

    def _enter(self, doing: str, call: Callable[[], object], records: int = 0) -> None:
        if self._guard.failed:
            return
        if self._call is not None:
            # another thread hangs in it
            self.missed += records
            return
        self._call = _Call(doing)
        try:
            with self._guard.contain(doing):
                call()
        finally:
            self._call = None

    def _release(self) -> None:
        """A sink that holds much may have a `release`: it will be given nothing more."""
        if call := getattr(self._sink, "release", None):
            call()
