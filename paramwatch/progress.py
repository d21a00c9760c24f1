"""Steps in progress: for each thread a stack of the `step` calls it is in, and the watchers that began with each.

Beside `steps`, which says when a step is entered, when its gradients are known and when it is over.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from types import FrameType
from typing import Any, Protocol

from torch.optim import Optimizer

from paramwatch.callstack import is_running
from paramwatch.guard import Guard


class Watcher(Protocol):
    """Who wants to know of steps. A failure in a call is contained by the watcher's own guard."""

    guard: Guard

    def begin(self, optimizer: Optimizer, at_once: bool = False) -> Any | None:
        """A step is entered; parameters have their old value. None: this optimizer holds nothing of ours.

        Args:
            optimizer: About to step.
            at_once: Gradients are as it will use them. Who has taken them says so (`token.has_gradients`) and is not told again.
        """

    def begin_inside(self, token: Any, optimizer: Optimizer) -> None:
        """An optimizer steps inside a step of ours (a wrapper's base optimizer): it is part of that step."""

    def gradients(self, token: Any, optimizer: Optimizer, evaluation: bool, awaited: bool = False) -> None:
        """Gradients are as this optimizer will use them, as far as is known; the last call before `end` is right."""

    def end(self, token: Any) -> None:
        """The step is over; parameters have their new value."""


class Entry:
    """One `step` call in progress."""

    __slots__ = ("begun", "caller", "hook", "optimizer", "seen")

    def __init__(self, optimizer: Optimizer, caller: FrameType | None) -> None:
        self.optimizer = optimizer
        # the calling frame, held until the step ends, tells a step inside a step from one that was left by an exception
        self.caller = caller
        self.begun: list[tuple[Watcher, Any]] = []
        self.seen: list[tuple[Watcher, Any]] = []
        self.hook: Any = None


class Stack(threading.local):
    """The calls that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        _of_threads[threading.get_ident()] = self.entries


_of_threads: dict[int, list[Entry]] = {}
stack = Stack()


def open_entry(optimizer: Optimizer, caller: FrameType | None, watchers: tuple[Watcher, ...], at_once: bool) -> Entry:
    """Begin a step for each watcher, `at_once` with gradients; inside another step of the same watcher the two are one."""
    entry = Entry(optimizer, caller)
    outer = [pair for other in stack.entries for pair in other.begun] if stack.entries else []
    stack.entries.append(entry)
    for watcher in watchers:
        running = next((token for other, token in outer if other is watcher), None) if outer else None
        if running is None:
            token = watcher.guard.call("entering an optimizer step", watcher.begin, optimizer, at_once)
            if token is not None:
                pair = watcher, token
                entry.begun.append(pair)
                entry.seen.append(pair)
            continue
        with watcher.guard.contain("entering an optimizer step"):
            watcher.begin_inside(running, optimizer)
            entry.seen.append((watcher, running))
    return entry


def close_entry(entry: Entry) -> None:
    """End a step, and forget those inside it that were left by an exception."""
    if stack.entries and stack.entries[-1] is entry and entry.hook is None:
        stack.entries.pop().caller = None
    else:
        drop(entry)
    for watcher, token in entry.begun:
        watcher.guard.call("recording an optimizer step", watcher.end, token)


def drop(entry: Entry) -> None:
    """Forget a step, and those inside it. The calling frame may hold the entry, by way of the closure that it gave."""
    while entry in stack.entries:
        last = stack.entries.pop()
        last.caller = None
        if last.hook is not None:
            last.hook.remove()


def drop_left_by_exception() -> None:
    """Forget steps whose call is no longer running: they raised, so torch's post-hook never came."""
    for entry in list(stack.entries):
        if entry.caller is not None and not is_running(entry.caller, sys._getframe()):
            drop(entry)


def drop_left_in_any_thread() -> None:
    """The same for all threads. To be called now and then: what is left holds frames, and with them whatever the user's loop had."""
    tops = sys._current_frames()
    for thread, entries in tuple(_of_threads.items()):
        for entry in tuple(entries):
            caller = entry.caller
            if caller is not None and not is_running(caller, tops.get(thread)):
                with contextlib.suppress(ValueError):  # the thread itself was quicker
                    entries.remove(entry)
                entry.caller = None
                if entry.hook is not None:
                    entry.hook.remove()
        if thread not in tops:
            _of_threads.pop(thread, None)
    # our own frame is among them
    tops.clear()


def report_missing(entry: Entry) -> None:
    """Report gradients to those who have not taken them at once; who began with an outer step may have those of that one."""
    for pair in entry.seen:
        if pair not in entry.begun or not pair[1].has_gradients:
            report_gradients([pair], entry.optimizer)


def report_gradients(seen: list[tuple[Watcher, Any]], optimizer: Optimizer, evaluation: bool = False, awaited: bool = False) -> None:
    for watcher, token in seen:
        with watcher.guard.contain("measuring gradients"):
            watcher.gradients(token, optimizer, evaluation, awaited)
