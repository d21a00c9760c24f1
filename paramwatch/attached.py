"""Which Watches are open: who gives way when a module is attached again, and what becomes of all of them at exit and in a forked child."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from paramwatch.guard import ParamWatchError
from paramwatch.worker import wait_for_all


class Attached(Protocol):
    """What is asked here of a Watch."""

    @property
    def path(self) -> Path | None: ...
    @property
    def watched(self) -> Callable[[], nn.Module | None]:
        """Gives its module, None once that is gone."""

    def close(self) -> None: ...
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
        other.close()


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
