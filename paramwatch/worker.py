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
from functools import partial
from typing import TypeAlias

from paramwatch.absence import Tally, counted
from paramwatch.alike import Handed
from paramwatch.assemble import assemble
from paramwatch.batch import Batch
from paramwatch.batching import MOST, Batching, at_once
from paramwatch.cost import Cost
from paramwatch.guard import Guard, logger
from paramwatch.outlet import Outlet, Piece
from paramwatch.progress import drop_left_in_any_thread
from paramwatch.record import Finding, Record, Rule, Sink
from paramwatch.rounds import Round
from paramwatch.rules import worth_reading

Job: TypeAlias = Callable[[], None]

PERIOD_SECONDS = 1.0
"""How often the thread looks for rounds, and asks sinks what has waited too long. Woken for each it would take turns with training."""

MANY, MANY_BYTES = 4 * MOST, 16_000_000
"""Rounds, and their bytes, for which it is woken: a batch after others is quicker than one that finds nothing in the processor's caches."""

FULL, FULL_BYTES = 8 * MOST, 16 * MANY_BYTES
"""Rounds, and their bytes, that may wait. Then training waits: the thread gets no turn otherwise, and memory would fill without end."""

STUCK_SECONDS = 1.0
"""How long training waits for a thread that does not get on: a sink may hang, or itself wait for the training thread."""

SLOW_SECONDS = 2.0
"""How long it waits for one that does, too slowly: else it would be as slow as the disk. Then rounds are dropped, and counted."""

PATIENCE_SECONDS, MOMENT_SECONDS = 30.0, 0.2
"""How long a reader, or whoever closes, waits for it; and how long a `repr` does."""

_running: set[Worker] = set()


class Worker:
    """Takes rounds in step order and hands records on, in one thread, piece by piece.

    Where a sink does not return another thread takes its place and goes on with the next piece; the one that hangs ends with its own.

    Args:
        sinks: Each is switched off, by name, when it fails, and passed over while it hangs.
        rules: Read each record; what they say goes to `report`.
        report: Takes findings, which are logged here.
        guard: Contains failures of our own.
    """

    def __init__(self, sinks: Sequence[Sink], rules: Sequence[Rule], report: Callable[[list[Finding]], None], guard: Guard) -> None:
        self.last: Record | None = None
        self.dropped = 0
        """Rounds that became no record, since too many waited."""
        self.tally, self.cost = Tally(), Cost()
        self._outlets = [Outlet(self.tally), Outlet(self.cost), *map(Outlet, sinks)]
        self._rules, self._report, self._guard = rules, report, guard
        self._batching = Batching()
        # the collector may hand something over in the middle of anything: neither of these has a lock that could be held then
        self._waiting: deque[Handed | _Request] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._due, self._rung, self._ended = 0, False, False
        # asked before the thread looks for rounds
        self.ask: Callable[[], object] = bool
        self._rounds: list[Handed] = []
        self._pieces: deque[Piece] = deque()
        # how many may wait again before training waits for them once more
        self._behind, self._taken, self._pid = 0, 0, os.getpid()
        self._tick_at = time.monotonic() + PERIOD_SECONDS
        # held by whoever takes the next piece, or says who may
        self._turn = threading.Lock()
        with self._turn:
            self._thread = self._started()
        _running.add(self)

    def submit(self, done: Round, update_mode: str) -> None:
        """Hand over a round whose readings have arrived."""
        waiting = len(self._waiting) + 1
        size = waiting * done.inventory.bytes_a_round
        if (waiting > FULL or (size > FULL_BYTES and waiting > 1)) and not self._room(waiting // 2):
            self._drop(done.step)
            return
        self._waiting.append((done, update_mode))
        if waiting >= MANY or size >= MANY_BYTES:
            self._ring()

    def later(self, *jobs: Job | None) -> threading.Event:
        """Run something after everything handed over so far, which the event says; None alone is the end."""
        request = _Request(jobs)
        self._waiting.append(request)
        self._ring()
        return request.done

    def flush(self) -> None:
        """Wait until the sinks have written everything handed over so far."""
        self.call(*(partial(outlet.tell, "flush") for outlet in self._outlets))

    def call(self, *jobs: Job) -> None:
        """Run something after everything handed over so far, and wait for it, except from the thread itself or in a forked child."""
        if threading.current_thread() is not self._thread and self._alive():
            done = self.later(*jobs)
            # at interpreter exit the thread may be gone before it comes to this job
            self._wait_until(partial(done.wait, 0.1), PATIENCE_SECONDS)

    def counted(self) -> Tally:
        """What was counted, with everything handed over so far if that is done in a moment."""
        if threading.current_thread() is not self._thread and self._alive():
            self.later().wait(MOMENT_SECONDS)
        return self.tally

    def stop(self, wait: bool) -> None:
        """Close the sinks after everything handed over so far; `wait=False` where the caller must not block."""
        if self._alive():
            self.later(None)
        if wait and threading.current_thread() is not self._thread and self._alive():
            self._wait_until(self._over, PATIENCE_SECONDS)

    def _alive(self) -> bool:
        return self._pid == os.getpid() and self._thread.is_alive()

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            self._bell.put(None)

    # ---- when the thread does not get on ------------------------------------------------------------

    def _room(self, most: int) -> bool:
        """Let the thread catch up, while it does; whether it did."""
        if threading.current_thread() is self._thread:
            return True
        if self._behind:
            return False
        self._ring()
        self._behind = 0 if self._wait_until(partial(self._fewer, most), STUCK_SECONDS, SLOW_SECONDS) else most
        return not self._behind

    def _fewer(self, most: int) -> bool:
        time.sleep(0.001)
        return len(self._waiting) <= most

    def _over(self) -> bool:
        self._thread.join(0.1)
        return not self._alive()

    def _wait_until(self, there: Callable[[], bool], seconds: float, in_all: float = float("inf")) -> bool:
        """Ask again and again, as long as the thread gets on, if need be past a sink that does not let it; whether it was there."""
        taken, since, end = self._taken, time.monotonic(), time.monotonic() + in_all
        while not there():
            if time.monotonic() > end:
                return False
            if self._taken != taken or self._pass_over(seconds):
                taken, since = self._taken, time.monotonic()
            elif not self._alive() or time.monotonic() - since > 2 * seconds:
                return False
        return True

    def _pass_over(self, seconds: float) -> bool:
        """Let another thread go on where this one has been in a sink for so long."""
        # it never waits for the thread, which may wait for a lock that is held here
        if not self._turn.acquire(blocking=False):
            return False
        try:
            hanging = [outlet for outlet in self._outlets if outlet.holds_up(self._thread, seconds)]
            if hanging:
                self._thread = self._started()
        finally:
            self._turn.release()
        for outlet in hanging:
            outlet.passed_over()
        return bool(hanging)

    def _drop(self, step: int) -> None:
        self.dropped += 1
        if self.dropped == 1:
            logger.warning(
                "paramwatch: the background thread does not get on, or not fast enough (a slow disk?), and %d records wait for it. Step %d "
                "is not recorded, and others will not be; training goes on.",
                *(len(self._waiting), step),
            )

    # ---- the thread ---------------------------------------------------------------------------------

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="paramwatch", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        going_on = True
        while going_on:
            with self._guard.contain("working in the background"):
                going_on = self._work()

    def _work(self) -> bool:
        """Do one piece; False if there is none."""
        if piece := self._next():
            piece()
        return piece is not None

    def _next(self) -> Piece | None:
        """The next piece, unless another thread has taken over, or this was all."""
        with self._turn:
            self._taken += 1
            if threading.current_thread() is not self._thread:
                return None
            if self._pieces:
                return self._pieces.popleft()
        if self._ended:
            _running.discard(self)
            return None
        return self._look

    def _look(self) -> None:
        """Cut what comes next into pieces."""
        if not self._due and not self._rounds:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=max(0.0, self._tick_at - time.monotonic()))
            self._rung = False
            self.ask()
            # what comes meanwhile waits for the next bell, and for company: many at once cost little more than one
            self._due = len(self._waiting)
            self._behind *= self._due > self._behind
        most = 0
        while self._due and not isinstance(handed := self._waiting[0], _Request):
            if len(self._rounds) >= (most := most or at_once(handed[0].inventory)):
                break
            self._rounds.append(handed)
            self._waiting.popleft()
            self._due -= 1
        if self._rounds:
            self._process()
        elif self._due and isinstance(request := self._waiting[0], _Request):
            self._waiting.popleft()
            self._due -= 1
            self._ended = request.jobs == (None,)
            if self._ended and self.dropped:
                logger.warning("paramwatch: %s were dropped, since the background thread was too slow", counted(self.dropped, "record"))
            try:
                self._pieces.extend([outlet.close for outlet in self._outlets] if self._ended else filter(None, request.jobs))
            finally:
                self._pieces.append(request.done.set)
        if time.monotonic() >= self._tick_at and not self._ended:
            self._tick_at = time.monotonic() + PERIOD_SECONDS
            self._pieces.extend([partial(outlet.tell, "tick") for outlet in self._outlets])
            drop_left_in_any_thread()

    def _process(self) -> None:
        """Make records of the first rounds that are alike."""
        first, alike = self._rounds[0][0].step, 0
        with self._guard.contain(f"putting together the record of step {first}"):
            alike = self._batching.alike(self._rounds)
            if not alike:
                self._put(record := assemble(*self._rounds[0]), [record])
        if alike:
            with self._guard.contain(f"putting together the {alike} records from step {first} on"):
                batch = self._batching.batch(self._rounds[:alike])
                self._put(batch, [batch.record(i) for i in worth_reading(batch)])
        del self._rounds[: alike or 1]

    def _put(self, made: Record | Batch, to_read: Sequence[Record]) -> None:
        for record in to_read:
            self._apply_rules(record)
        for outlet in self._outlets:
            self._pieces.extend(outlet.pieces(made))
        self.last = made.record(len(made) - 1) if isinstance(made, Batch) else made

    def _apply_rules(self, record: Record) -> None:
        if findings := [finding for rule in self._rules for finding in rule(record)]:
            for finding in findings:
                logger.warning("step %d: %s", finding.step, finding.message)
            self._report(findings)


@dataclass
class _Request:
    """Something to run in its turn."""

    jobs: tuple[Job | None, ...]
    """A single None: the end."""
    done: threading.Event = field(default_factory=threading.Event)


def wait_for_all() -> None:
    """Wait until the threads of all Watches that were closed or have lost their model have written what they had."""
    for worker in tuple(_running):
        worker.stop(wait=True)
