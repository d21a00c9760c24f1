"""Closed rounds on their way from the training thread to the background thread: in order, each once its readings have arrived."""

from __future__ import annotations

from collections import deque

from paramwatch.measure.capture import may_wait
from paramwatch.recorder import Recorder
from paramwatch.rounds import Round
from paramwatch.worker import Worker


class Handover:
    """The rounds that wait, and a count of all that came."""

    def __init__(self) -> None:
        self.counts = 0, 0, 0
        """How many step numbers came, the first of them and the last."""
        self._waiting: deque[Round] = deque()

    def connect(self, recorder: Recorder, worker: Worker) -> None:
        """Say where rounds come from, and who takes them."""
        self._recorder, self._worker = recorder, worker
        worker.ask = self._ask

    def take(self, closed: Round) -> None:
        """Take a round, let what is on a device travel, and hand over what is ready.

        Args:
            closed: A step that was read before its round was over comes in several. Whoever calls holds the lock of the training threads.
        """
        if closed.waits:
            closed.send()
        steps, first, last = self.counts
        if not steps or closed.step != last:
            self.counts = steps + 1, first if steps else closed.step, closed.step
        if self._waiting or closed.arriving:
            self._waiting.append(closed)
            self.give(wait=False)
        else:
            self._worker.submit(closed, self._recorder.updates.mode)

    def _ask(self) -> None:
        """For the background thread, which waits for nobody: let a streak publish what it holds, unless a step begins or ends just now."""
        if self._recorder.lock.acquire(blocking=False):
            try:
                self._recorder.streaks.give()
            finally:
                self._recorder.lock.release()

    def give(self, wait: bool) -> None:
        """Hand over what is ready.

        Args:
            wait: For readings that have not arrived, unless a CUDA graph is captured; else the first of them ends it.
        """
        wait = wait and may_wait()
        with self._recorder.lock:
            while self._waiting:
                first = self._waiting.popleft()
                if wait:
                    first.wait()
                elif not first.ready:
                    self._waiting.appendleft(first)
                    return
                self._worker.submit(first, self._recorder.updates.mode)
