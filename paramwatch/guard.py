"""The one place that contains our own failures, and the one error that reports misuse.

torch, Lightning and the background thread call into paramwatch; whatever goes wrong in such a call must not reach the training loop. Each
of these calls runs inside `Guard.contain`, which reports the first failure by name, with its cause, and then lets go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

Given = TypeVar("Given")

logger = logging.getLogger("paramwatch")


class ParamWatchError(ValueError):
    """Something was asked of paramwatch that it cannot do; the message says what was wrong and what to do."""


class Guard:
    """Contains failures: after the first one, `failed` is True and `on_failure` has been called.

    Use as `with guard.contain("measuring step 3"): ...`. An `Exception` raised inside is reported once and swallowed;
    `KeyboardInterrupt`, `SystemExit` and other `BaseException`s pass untouched, and what is named in `passing` (misuse, which is the
    caller's to hear of).
    """

    def __init__(self, consequence: str, on_failure: Callable[[], None], passing: tuple[type[Exception], ...] = ()) -> None:
        self.failed = False
        self.passing = passing
        self._consequence = consequence
        self._on_failure = on_failure

    def contain(self, doing: str) -> _Contained:
        """A context in which failures are ours, named by what was being done."""
        return _Contained(self, doing)

    def call(self, doing: str, function: Callable[..., Given], *args: object) -> Given | None:
        """What a function gives, contained as in `contain`; None if it fails. For what is done at every step: a context takes longer."""
        try:
            return function(*args)
        except Exception as error:
            if isinstance(error, self.passing):
                raise
            self._report(doing, error)
            return None

    def stop(self) -> None:
        """Let go without a word: the failure was someone else's, and was reported there."""
        if not self.failed:
            self.failed = True
            self._on_failure()

    def _report(self, doing: str, error: BaseException) -> None:
        if self.failed:
            return
        self.failed = True
        # a full disk is no fault in the code, and its file is named
        trace = None if isinstance(error, OSError) and error.filename else error
        logger.warning("paramwatch failed while %s (%s: %s). %s", doing, type(error).__name__, error, self._consequence, exc_info=trace)
        try:
            self._on_failure()
        except Exception as another:
            logger.debug("paramwatch failed while letting go (%s: %s)", type(another).__name__, another, exc_info=another)


class _Contained:
    __slots__ = ("_doing", "_guard")

    def __init__(self, guard: Guard, doing: str) -> None:
        self._guard = guard
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception) or isinstance(error, self._guard.passing):
            return False
        self._guard._report(self._doing, error)
        return True
