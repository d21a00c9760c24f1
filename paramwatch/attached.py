"""Which Watches are open: who gives way when a module is attached again, what becomes of all of them at exit, and what is said then."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from paramwatch.guard import ParamWatchError, logger
from paramwatch.record import Inventory
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


def say_goodbye(recorder: Recorder, inventory: Inventory, path: Path | None, gave_way: bool) -> None:
    """The closing message: what was seen, or why nothing was."""
    seen, model, failed = recorder.steps_seen, inventory.model, recorder.guard.failed
    if seen:
        how = " before the failure" if failed else ""
        where = "" if path is None else f", written to {path}"
        why = "; closed because its model was attached again" if gave_way else ""
        rows = _counted(len(inventory.rows), "row")
        logger.info("paramwatch: %s of %s seen%s, %s%s%s", _counted(seen, "optimizer step"), model, how, rows, where, why)
    elif gave_way:
        logger.info("paramwatch: the Watch of %s was closed before its first step, because its model was attached again", model)
    elif not failed:
        logger.warning("paramwatch: 0 optimizer steps of %s seen. %s", model, _likely_reason(recorder.foreign_steps))


def _likely_reason(foreign_steps: int) -> str:
    if foreign_steps:
        were = "was" if foreign_steps == 1 else "were"
        return (
            f"{_counted(foreign_steps, 'optimizer step')} {were} made, but of tensors that are not in this model: "
            "was it replaced, moved or wrapped after the optimizer was made?"
        )
    return "No torch optimizer stepped while it was attached; for one that torch's hooks cannot see use `with watch.step(optimizer):`."


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


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
