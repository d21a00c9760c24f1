"""The background thread of one Watch: turns closed rounds into records, applies the rules, feeds the sinks. It never calls CUDA."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from paramwatch.assemble import assemble
from paramwatch.guard import Guard, logger
from paramwatch.record import Finding, Record, Rule, Sink
from paramwatch.recorder import Round

Job: TypeAlias = Callable[[], None]

TICK_SECONDS = 1.0


class Worker:
    """Takes rounds in step order and hands records on.

    Args:
        sinks: Each is switched off, by name, when it fails.
        rules: Read each record; what they say goes to `report`.
        report: Takes findings.
        guard: Contains failures of our own.
    """

    def __init__(self, sinks: Sequence[Sink], rules: Sequence[Rule], report: Callable[[list[Finding]], None], guard: Guard) -> None:
        self.last: Record | None = None
        self._outlets = [_Outlet(sink) for sink in sinks]
        self._rules = rules
        self._report = report
        self._guard = guard
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="paramwatch", daemon=True)
        self._thread.start()

    def submit(self, done: Round, update_mode: str) -> None:
        """Hand over a round whose readings have arrived."""
        self._jobs.put(lambda: self._process(done, update_mode))

    def call(self, job: Job) -> None:
        """Run something after everything handed over so far, and wait for it, except from the thread itself or in a forked child."""
        if threading.current_thread() is self._thread or not self._alive():
            return
        done = threading.Event()

        def signalled() -> None:
            try:
                with self._guard.contain("flushing"):
                    job()
            finally:
                done.set()

        self._jobs.put(signalled)
        # at interpreter exit the thread may be gone before it comes to this job
        while not done.wait(timeout=0.1) and self._alive():
            pass

    def stop(self, wait: bool) -> None:
        """Close the sinks after everything handed over so far; `wait=False` where the caller must not block."""
        self._jobs.put(None)
        if wait and threading.current_thread() is not self._thread and self._alive():
            self._thread.join()

    def _alive(self) -> bool:
        return self._pid == os.getpid() and self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=TICK_SECONDS)
            except queue.Empty:
                self._tick()
                continue
            if job is None:
                break
            job()
        for outlet in self._outlets:
            outlet.close()

    def _process(self, done: Round, update_mode: str) -> None:
        with self._guard.contain(f"putting together the record of step {done.step}"):
            record = assemble(done, update_mode)
            findings = [finding for rule in self._rules for finding in rule(record)]
            if findings:
                self._report(findings)
            for outlet in self._outlets:
                outlet.write(record)
            self.last = record

    def _tick(self) -> None:
        for outlet in self._outlets:
            outlet.tick()


class _Outlet:
    """A sink and the guard that switches it off."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._guard = Guard(f"{type(sink).__name__} is switched off; recording and training go on.", lambda: None)

    def write(self, record: Record) -> None:
        if not self._guard.failed:
            with self._guard.contain(f"writing step {record.step} to {type(self._sink).__name__}"):
                self._sink.write(record)

    def tick(self) -> None:
        """Let a sink that buffers write what has waited long enough."""
        tick = getattr(self._sink, "tick", None)
        if tick is not None and not self._guard.failed:
            with self._guard.contain(f"writing to {type(self._sink).__name__}"):
                tick()

    def close(self) -> None:
        with self._guard.contain(f"closing {type(self._sink).__name__}"):
            self._sink.close()


def log_findings(findings: Sequence[Finding]) -> None:
    """Say each finding once, where messages go."""
    for finding in findings:
        logger.warning("step %d: %s", finding.step, finding.message)
