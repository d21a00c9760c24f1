"""The background thread of one Watch: turns closed rounds into records, applies the rules, feeds the sinks. It never calls CUDA."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from paramwatch.absence import Tally
from paramwatch.assemble import assemble
from paramwatch.cost import Cost
from paramwatch.guard import Guard, logger
from paramwatch.record import Finding, Record, Rule, Sink
from paramwatch.rounds import Round

Job: TypeAlias = Callable[[], None]

TICK_SECONDS = 1.0
"""How often a sink that buffers is asked whether something has waited too long."""

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
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="paramwatch", daemon=True)
        _running.add(self)
        self._thread.start()

    def submit(self, done: Round, update_mode: str) -> None:
        """Hand over a round whose readings have arrived."""
        self._jobs.put(lambda: self._process(done, update_mode))

    def later(self, job: Job) -> None:
        """Run something after everything handed over so far."""
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until the sinks have written everything handed over so far."""
        self.call(lambda: self._each("flush"))

    def call(self, job: Job) -> None:
        """Run something after everything handed over so far, and wait for it, except from the thread itself or in a forked child."""
        if threading.current_thread() is self._thread or not self._alive():
            return
        done = threading.Event()

        def signalled() -> None:
            try:
                job()
            finally:
                done.set()

        self._jobs.put(signalled)
        # at interpreter exit the thread may be gone before it comes to this job
        while not done.wait(timeout=0.1) and self._alive():
            pass

    def stop(self, wait: bool) -> None:
        """Close the sinks after everything handed over so far; `wait=False` where the caller must not block."""
        if self._alive():
            self._jobs.put(None)
        if wait and threading.current_thread() is not self._thread and self._alive():
            self._thread.join()

    def _alive(self) -> bool:
        return self._pid == os.getpid() and self._thread.is_alive()

    def _run(self) -> None:
        tick_at = time.monotonic() + TICK_SECONDS
        while True:
            try:
                job = self._jobs.get(timeout=max(0.0, tick_at - time.monotonic()))
            except queue.Empty:
                job = _nothing
            if job is None:
                break
            job()
            if time.monotonic() >= tick_at:
                self._each("tick")
                tick_at = time.monotonic() + TICK_SECONDS
        for outlet in self._outlets:
            outlet.close()
        _running.discard(self)

    def _process(self, done: Round, update_mode: str) -> None:
        with self._guard.contain(f"putting together the record of step {done.step}"):
            record = assemble(done, update_mode)
            findings = [finding for rule in self._rules for finding in rule(record)]
            if findings:
                _log(findings)
                self._report(findings)
            for outlet in self._outlets:
                outlet.write(record)
            self.last = record

    def _each(self, method: str) -> None:
        for outlet in self._outlets:
            outlet.tell(method)


def wait_for_all() -> None:
    """Wait until the threads of all Watches that were closed or have lost their model have written what they had."""
    for worker in tuple(_running):
        worker.stop(wait=True)


class _Outlet:
    """A sink and the guard that switches it off."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._guard = Guard(f"{type(sink).__name__} is switched off; recording and training go on.", lambda: None)

    def write(self, record: Record) -> None:
        if not self._guard.failed:
            with self._guard.contain(f"writing step {record.step} to {type(self._sink).__name__}"):
                self._sink.write(record)

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


def _nothing() -> None:
    pass
