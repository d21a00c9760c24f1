"""The background thread of one Watch: turns closed rounds into records, applies the rules, feeds the sinks. It never calls CUDA."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from paramwatch.absence import Tally
from paramwatch.alike import Handed
from paramwatch.assemble import assemble
from paramwatch.batch import Batch, BatchSink
from paramwatch.batching import MOST, Batching, round_bytes
from paramwatch.cost import Cost
from paramwatch.guard import Guard, logger
from paramwatch.progress import drop_left_in_any_thread
from paramwatch.record import Changes, Finding, Record, Rule, Sink
from paramwatch.rounds import Round

Job: TypeAlias = Callable[[], None]

TICK_SECONDS = 1.0
"""How often a sink that buffers is asked whether something has waited too long."""

PERIOD_SECONDS = 0.5
"""How often the thread looks for rounds by itself. One that was woken for each would take turns with the training thread at every step."""

MANY, MANY_BYTES = MOST, 16_000_000
"""Rounds, and their bytes, for which it is woken."""

FULL, FULL_BYTES = 16 * MANY, 16 * MANY_BYTES
"""Rounds, and their bytes, that may wait. Then training waits: the thread gets no turn otherwise, and memory would fill without end."""

STUCK_SECONDS = 1.0
"""How long training waits for a thread that does not get on: a sink may hang, or itself wait for the training thread."""

_UNCHANGED = Changes()
_running: set[Worker] = set()


class Worker:
    """Takes rounds in step order and hands records on.

    Args:
        sinks: Each is switched off, by name, when it fails.
        rules: Read each record; what they say goes to `report`.
        report: Takes findings, which are logged here.
        guard: Contains failures of our own.
    """

    def __init__(self, sinks: Sequence[Sink], rules: Sequence[Rule], report: Callable[[list[Finding]], None], guard: Guard) -> None:
        self.last: Record | None = None
        self.tally, self.cost = Tally(), Cost()
        ours: list[Sink] = [self.tally, self.cost]
        self._outlets = [_Outlet(sink) for sink in (*ours, *sinks)]
        self._rules = rules
        self._report = report
        self._guard = guard
        self._batching = Batching()
        # the collector may hand something over in the middle of anything: neither of these has a lock that could be held then
        self._waiting: deque[Handed | _Request] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._rung = False
        self._ended = False
        self._taken, self._stuck_at = 0, -1
        self._tick_at = time.monotonic() + TICK_SECONDS
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="paramwatch", daemon=True)
        _running.add(self)
        self._thread.start()

    def submit(self, done: Round, update_mode: str) -> None:
        """Hand over a round whose readings have arrived."""
        self._waiting.append((done, update_mode))
        waiting = len(self._waiting)
        size = waiting * round_bytes(done.inventory)
        if waiting >= MANY or size >= MANY_BYTES:
            self._ring()
            if waiting >= FULL or (size >= FULL_BYTES and waiting > 1):
                self._wait_for_room(waiting // 2)

    def later(self, job: Job) -> None:
        """Run something after everything handed over so far."""
        self._ask(job)

    def flush(self) -> None:
        """Wait until the sinks have written everything handed over so far."""
        self.call(lambda: self._each("flush"))

    def call(self, job: Job) -> None:
        """Run something after everything handed over so far, and wait for it, except from the thread itself or in a forked child."""
        if threading.current_thread() is self._thread or not self._alive():
            return
        done = self._ask(job)
        # at interpreter exit the thread may be gone before it comes to this job
        while not done.wait(timeout=0.1) and self._alive():
            pass

    def stop(self, wait: bool) -> None:
        """Close the sinks after everything handed over so far; `wait=False` where the caller must not block."""
        if self._alive():
            self._ask(None)
        if wait and threading.current_thread() is not self._thread and self._alive():
            self._thread.join()

    def _alive(self) -> bool:
        return self._pid == os.getpid() and self._thread.is_alive()

    def _ask(self, job: Job | None) -> threading.Event:
        request = _Request(job)
        self._waiting.append(request)
        self._ring()
        return request.done

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            self._bell.put(None)

    def _wait_for_room(self, most: int) -> None:
        """Let the thread catch up, while it does."""
        taken, since = self._taken, time.monotonic()
        if taken == self._stuck_at or threading.current_thread() is self._thread:
            return
        while len(self._waiting) > most and self._alive():
            time.sleep(0.001)
            if self._taken != taken:
                taken, since = self._taken, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                self._stuck_at = taken
                return

    def _run(self) -> None:
        while not self._ended:
            with self._guard.contain("working in the background"):
                with contextlib.suppress(queue.Empty):
                    self._bell.get(timeout=min(PERIOD_SECONDS, max(0.0, self._tick_at - time.monotonic())))
                self._rung = False
                self._work()
        for outlet in self._outlets:
            with self._guard.contain("closing"):
                outlet.close()
        _running.discard(self)

    def _work(self) -> None:
        """Do what waits, in order."""
        while not self._ended:
            rounds: list[Handed] = []
            while self._waiting and len(rounds) < MOST and not isinstance(self._waiting[0], _Request):
                rounds.append(self._waiting.popleft())  # type: ignore[arg-type]  # no request, as was just asked
            self._process(rounds)
            self._tick()
            if self._waiting and isinstance(request := self._waiting[0], _Request):
                self._waiting.popleft()
                try:
                    self._ended = request.job is None
                    (request.job or _nothing)()
                finally:
                    request.done.set()
            elif not self._waiting:
                return

    def _tick(self) -> None:
        if time.monotonic() >= self._tick_at:
            self._tick_at = time.monotonic() + TICK_SECONDS
            self._each("tick")
            drop_left_in_any_thread()

    def _process(self, rounds: Sequence[Handed]) -> None:
        while rounds:
            first, alike = rounds[0][0].step, 0
            with self._guard.contain(f"putting together the record of step {first}"):
                alike = self._batching.alike(rounds)
                if not alike:
                    self._put(assemble(*rounds[0]))
            if alike:
                with self._guard.contain(f"putting together the {alike} records from step {first} on"):
                    self._put_batch(self._batching.batch(rounds[:alike]))
            rounds = rounds[alike or 1 :]
            self._taken += alike or 1

    def _put(self, record: Record) -> None:
        self._apply_rules(record)
        for outlet in self._outlets:
            outlet.write(record)
        self.last = record

    def _put_batch(self, batch: Batch) -> None:
        for i in worth_reading(batch):
            self._apply_rules(batch.record(i))
        for outlet in self._outlets:
            outlet.write_batch(batch)
        self.last = batch.record(len(batch) - 1)

    def _apply_rules(self, record: Record) -> None:
        findings = [finding for rule in self._rules for finding in rule(record)]
        if findings:
            _log(findings)
            self._report(findings)

    def _each(self, method: str) -> None:
        for outlet in self._outlets:
            outlet.tell(method)


@dataclass
class _Request:
    """Something to run in its turn."""

    job: Job | None
    """None: the end."""
    done: threading.Event = field(default_factory=threading.Event)


def _nothing() -> None:
    pass


def wait_for_all() -> None:
    """Wait until the threads of all Watches that were closed or have lost their model have written what they had."""
    for worker in tuple(_running):
        worker.stop(wait=True)


def worth_reading(batch: Batch) -> list[int]:
    """The records of a batch of which a rule of ours may have something to say: that something is not finite, or has changed.

    What else a rule reads is the inventory, and none comes with a batch. A rule that reads anything else has to be asked for here too.
    """
    speaks = np.array([change != _UNCHANGED for change in batch.changes])
    for part in ("nan", "posinf", "neginf"):
        if (spoilt := batch.values[part] > 0).any():
            speaks |= spoilt.any((1, 2))
    return np.flatnonzero(speaks).tolist()


class _Outlet:
    """A sink and the guard that switches it off."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._guard = Guard(f"{type(sink).__name__} is switched off; recording and training go on.", lambda: None)

    def write(self, record: Record) -> None:
        if not self._guard.failed:
            with self._guard.contain(f"writing step {record.step} to {type(self._sink).__name__}"):
                self._sink.write(record)

    def write_batch(self, batch: Batch) -> None:
        """All at once where the sink is ours, else one by one."""
        if not isinstance(self._sink, BatchSink):
            for record in batch if not self._guard.failed else ():
                self.write(record)
        elif not self._guard.failed:
            with self._guard.contain(f"writing {len(batch)} steps from {batch.step[0]} on to {type(self._sink).__name__}"):
                self._sink.write_batch(batch)

    def tell(self, method: str) -> None:
        """Let a sink that buffers `flush`, or write at a `tick` what has waited long enough."""
        call = getattr(self._sink, method, None)
        if call is not None and not self._guard.failed:
            with self._guard.contain(f"writing to {type(self._sink).__name__}"):
                call()

    def close(self) -> None:
        with self._guard.contain(f"closing {type(self._sink).__name__}"):
            self._sink.close()


def _log(findings: Sequence[Finding]) -> None:
    """Say each finding once, where messages go."""
    for finding in findings:
        logger.warning("step %d: %s", finding.step, finding.message)
