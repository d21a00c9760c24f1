"""Which Watches are open: who gives way when a module is attached again, what becomes of all of them at exit, and what is said then."""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from paramwatch.absence import Absence, counted
from paramwatch.guard import ParamWatchError, logger
from paramwatch.measure import forget
from paramwatch.recorder import Recorder
from paramwatch.worker import wait_for_all


class Attached(Protocol):
    """What is asked here of a Watch."""

    @property
    def path(self) -> Path | None: ...
    @property
    def watched(self) -> Callable[[], nn.Module | None]:
        """Gives its module, None once that is gone."""

    def close(self) -> None: ...
    def give_way(self) -> None:
        """Close, since the module is attached again."""

    def abandon(self) -> None:
        """Stop without a word: this process has not the thread that would write."""


opened: list[Attached] = []
_company: tuple[Attached, ...] = ()


def leave(watch: Attached) -> None:
    """It is open no longer. The last one gives back the memory that all had in common."""
    if watch in opened:
        opened.remove(watch)
    if not opened:
        forget()


@contextlib.contextmanager
def beside(watches: Sequence[Attached]) -> Iterator[None]:
    """In this context `attach` leaves these alone, although they watch the same module: several callbacks of one trainer."""
    global _company
    before, _company = _company, tuple(watches)
    try:
        yield
    finally:
        _company = before


def close_earlier(module: nn.Module, folder: Path | None) -> None:
    """Close the Watches of this module, and those whose module is gone.

    Raises:
        ParamWatchError: Another Watch writes into the folder; then nothing is closed.
    """
    earlier = [other for other in opened if other not in _company and other.watched() in (module, None)]
    if folder is not None and any(other.path == folder for other in opened if other not in earlier):
        raise ParamWatchError(f"{folder} is being written by another Watch; pass name= for a folder of its own")
    for other in earlier:
        if other.watched() is None:
            other.close()
        else:
            other.give_way()


def say_goodbye(recorder: Recorder, absence: Absence, share: float | None, path: Path | None, gave_way: bool) -> None:
    """The closing report: what was seen, or why nothing was; and a warning of what should have been there and was not.

    Args:
        recorder: Of the Watch that closes.
        absence: What its run did not have.
        share: Of the run's time, what watching took at least.
        path: Where the run was written to.
        gave_way: Whether it closes because its model is attached again.
    """
    seen, model, failed = recorder.steps_seen, absence.inventory.model, recorder.guard.failed
    if seen:
        how = " before the failure" if failed else ""
        where = "" if path is None else f", written to {path} (to look at: paramwatch summary {shlex.quote(str(path))})"
        took = "" if share is None or failed else f"; watching took at least {_percent(share)} of the time"
        why = "; closed because its model was attached again" if gave_way else ""
        what = f"{_rows(absence)}{_skipped(absence)}{where}{took}{why}"
        logger.info("paramwatch: %s of %s seen%s, %s", counted(seen, "optimizer step"), model, how, what)
        # what came after a failure of ours nobody knows
        if not failed and (wrong := _wrong(absence)):
            logger.warning("paramwatch: in %s %s", model, "; ".join(wrong))
    elif gave_way:
        logger.info("paramwatch: the Watch of %s was closed before its first step, because its model was attached again", model)
    elif not failed:
        logger.warning(
            "paramwatch: 0 optimizer steps of %s seen. %s", model, _likely_reason(recorder.steps_entered, recorder.foreign_steps)
        )


def _rows(absence: Absence) -> str:
    frozen = f" ({len(absence.frozen):,} frozen)" if absence.frozen else ""
    return counted(len(absence.inventory.rows), "row") + frozen


def _skipped(absence: Absence) -> str:
    if not absence.skipped:
        return ""
    return f", {absence.skipped:,} of {counted(absence.steps, 'measured step')} skipped ({absence.skipped_steps()})"


def _wrong(absence: Absence) -> list[str]:
    all_skipped = absence.steps == absence.skipped > 0
    nothing = ["every measured step was skipped, so nothing was trained"] if all_skipped else []
    return absence.wrong("measured") + nothing


def _percent(share: float) -> str:
    return f"{float(f'{100 * share:.2g}'):g} %"


def _likely_reason(entered: int, foreign_steps: int) -> str:
    if entered:
        none = "it did not come to its" if entered == 1 else "none came to its"
        return f"{counted(entered, 'optimizer step')} began, and {none} end: an exception left it, in the step or in its closure."
    if foreign_steps:
        were = "was" if foreign_steps == 1 else "were"
        return (
            f"{counted(foreign_steps, 'optimizer step')} {were} made, but of tensors that are not in this model: "
            "was it replaced, moved or wrapped after the optimizer was made?"
        )
    return "No torch optimizer stepped while it was attached; for one that torch's hooks cannot see use `with watch.step(optimizer):`."


@atexit.register
def _close_all() -> None:
    for watch in tuple(opened):
        watch.close()
    wait_for_all()


def _abandon_all() -> None:
    for watch in opened:
        watch.abandon()
    opened.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
