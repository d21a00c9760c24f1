"""Where an optimizer step begins and ends, on torch's global step hooks; nothing is put on the model.

torch calls a global pre-hook before `Optimizer.step` and a global post-hook after it, for every optimizer of the process. The pre-hook is
the moment of the parameters' old value. It is not yet the moment of the gradient when a closure is passed (Lightning, LBFGS): the closure
is what computes the gradient, so it is replaced by one that reports when it has returned. The facts about hooks are in `docs/steps.md`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch.optim import Optimizer

from paramwatch.callstack import caller, is_only_step, steps_running
from paramwatch.closures import Arguments, Gradients, Seen, Told, are_the_same, gradients_of, has_closure, may_compute, reporting
from paramwatch.guard import Guard
from paramwatch.inherited import complete, see_parents, unsee_parents
from paramwatch.progress import (
    Entry,
    Watcher,
    close_entry,
    drop,
    drop_left_by_exception,
    drop_left_in_any_thread,
    open_entry,
    report_gradients,
    report_missing,
    stack,
)
from paramwatch.traced import Traced
from paramwatch.untraced import Hook, compiled, hook, untraced

_watchers: tuple[Watcher, ...] = ()
_handles: list[Any] = []
_lock = threading.Lock()
_evaluating: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that were seen to call their closure."""


def _forget_all() -> None:
    global _watchers
    _watchers = ()


def _stop_all() -> None:
    stopped = _watchers
    _forget_all()
    for watcher in stopped:
        watcher.guard.stop()


_guard = Guard("Recording has stopped; training goes on.", _stop_all)


def register(watcher: Watcher) -> None:
    """Tell a watcher of every step from now on. The hooks hold it until `unregister`."""
    global _watchers, _guard
    with _lock:
        if not _handles:
            _put_hooks()
        if _guard.failed:
            _guard = Guard("Recording has stopped; training goes on.", _stop_all)
        _watchers = (*_watchers, watcher)


def unregister(watcher: Watcher) -> None:
    """Forget a watcher. After the last one torch's registries are as before.

    Where a step is running torch may be walking them: then it is so once the steps of now are over, at the latest after the next one.
    """
    global _watchers
    _watchers = tuple(other for other in _watchers if other is not watcher)
    # a collector may call this while the lock is held by the same thread: then the hooks stay, idle, until the next call
    if _lock.acquire(blocking=False):
        try:
            # the stacks of threads that go on meanwhile are read here
            with _guard.contain("forgetting steps that raised"):
                drop_left_in_any_thread()
            with _guard.contain("taking away the hooks"):
                if not _watchers and not steps_running():
                    _take_away_hooks()
        finally:
            _lock.release()


@cache
def _made() -> tuple[Traced, list[Any], tuple[Hook, Hook]]:
    """Handles at torch, and what reports of the steps of parents. Made once: dynamo compiles anew for others."""
    alone, meet = (lambda optimizer: not _others_are_between(optimizer)), (lambda kind: see_parents(kind, *_made()[2]))
    traced = Traced(_before_parents_step, _after_parents_step, alone, meet)
    before, after = traced.hooks(hook(_before), hook(_after))
    handles = [torch_optimizer.register_optimizer_step_pre_hook(before), torch_optimizer.register_optimizer_step_post_hook(after)]
    parents = traced.hooks(untraced(_before_parents_step), untraced(_after_parents_step))
    return traced, [*zip(handles, (before, after), strict=True)], parents


def _put_hooks() -> None:
    traced, made, _ = _made()
    for handle, function in made:
        handle.hooks_dict_ref()[handle.id] = function
        _handles.append(handle)
    _handles.extend(traced.register())


def _take_away_hooks() -> None:
    while _handles:
        _handles.pop().remove()
    unsee_parents()


def _retire(registry: dict[int, Any], ours: int) -> None:
    """From inside a hook of ours, after the last watcher: take both away, if nobody is walking the registry of the other.

    The registry that is being walked may only lose its last entry: the iterator of an `OrderedDict` is then past the end, and does not look
    for changes. So when others come after us on the way in, our other hook is made the last of its registry, and does this on the way out.
    """
    following = torch_optimizer._global_optimizer_post_hooks
    if not isinstance(registry, OrderedDict) or not isinstance(following, OrderedDict) or not _lock.acquire(blocking=False):
        return
    try:
        with _guard.contain("taking away the hooks"):
            if _watchers or not _handles or not is_only_step():
                return
            if next(reversed(registry)) == _handles[ours].id:
                _take_away_hooks()
            elif registry is not following:
                following.move_to_end(_handles[1].id)
    finally:
        _lock.release()


@contextlib.contextmanager
def explicit(watcher: Watcher, optimizer: Optimizer) -> Iterator[None]:
    """A step that torch's hooks cannot see: begins on entry, gradients as on entry, ends on exit; nothing is recorded on an exception."""
    entry: Entry | None = None
    with watcher.guard.contain("entering an optimizer step"):
        drop_left_by_exception()
        entry = open_entry(optimizer, None, (watcher,), at_once=True)
        report_missing(entry)
    try:
        yield
    except BaseException:
        with watcher.guard.contain("leaving an optimizer step"):
            if entry is not None:
                drop(entry)
        raise
    with watcher.guard.contain("recording an optimizer step"):
        if entry is not None:
            close_entry(entry)


# ---- the two hooks --------------------------------------------------------------------------


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    if compiled():
        given: Arguments | None = untraced(_before)(optimizer, args, kwargs)
        return given
    if not _watchers:
        _retire(torch_optimizer._global_optimizer_pre_hooks, 0)
        return None
    return _guard.call("entering an optimizer step", _enter, optimizer, args, kwargs, True)


def _before_parents_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """The `step` of a parent class is entered from that of its child: no hook of the optimizer follows."""
    return _guard.call("entering an optimizer step", _enter, optimizer, args, kwargs, False) if _watchers else None


def _enter(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], hooks_follow: bool) -> Arguments | None:
    """A `step` is entered; unless None, it is to be given these arguments."""
    if stack.entries:
        drop_left_by_exception()
    hooks_follow = hooks_follow and _others_follow(optimizer)
    entry = open_entry(optimizer, caller(3), _watchers, at_once := not hooks_follow and not may_compute(args, kwargs))
    if not entry.seen:
        stack.entries.pop()
        return None
    if type(optimizer) not in complete:
        see_parents(type(optimizer), *_made()[2])
    if at_once or hooks_follow:
        (report_missing if at_once else _see_when_hooks_are_done)(entry)
        return None
    return _see(entry, args, kwargs)


def _see(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Report gradients, now or when the closure has computed them; unless None, `step` is to be given these arguments."""
    if not may_compute(args, kwargs):
        report_missing(entry)
        return None
    given, first = reporting(args, kwargs, entry, _TOLD)
    # what is given may never be called, and the gradients there are be used up
    if first and not (entry.optimizer in _evaluating and has_closure(args, kwargs)):
        report_gradients(entry.seen, entry.optimizer, awaited=True)
    return given


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if compiled():
        untraced(_after)(optimizer, args, kwargs)
        return
    if stack.entries:
        _guard.call("leaving an optimizer step", _leave, optimizer)
    if not _watchers:
        _retire(torch_optimizer._global_optimizer_post_hooks, 1)


def _after_parents_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if stack.entries:
        _guard.call("leaving an optimizer step", _leave, optimizer)


def _leave(optimizer: Optimizer) -> None:
    for entry in reversed(stack.entries):
        if entry.optimizer is optimizer:
            close_entry(entry)
            return


def _gradients_before(optimizer: Optimizer) -> Gradients | None:
    return _guard.call("looking at gradients before a function", gradients_of, optimizer)


def _function_returned(seen: Seen, optimizer: Optimizer, before: Gradients | None) -> None:
    with _guard.contain("measuring after a closure"):
        if before is None or not are_the_same(before, gradients_of(optimizer)):
            _evaluating.add(optimizer)
            # it may have been passed on, and called by an optimizer inside
            report_gradients(seen, stack.entries[-1].optimizer if stack.entries else optimizer, evaluation=True)


def _closure_raised(entry: Entry) -> None:
    with _guard.contain("leaving a step that raised"):
        drop(entry)


_TOLD = Told(_gradients_before, _function_returned, _closure_raised)


def _others_follow(optimizer: Optimizer) -> bool:
    """Whether ours is not the last of all pre-hooks: those of others run after it, and may still change gradients."""
    own = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    return own is not None and (bool(own) or next(reversed(torch_optimizer._global_optimizer_pre_hooks), None) != _handles[0].id)


def _others_are_between(optimizer: Optimizer) -> bool:
    """Whether hooks of others come between the step and ours, or after ours, on the way in or out."""
    return _others_follow(optimizer) or next(reversed(torch_optimizer._global_optimizer_post_hooks), None) != _handles[1].id


def _see_when_hooks_are_done(entry: Entry) -> None:
    """Report gradients after everyone who may still change them, or what `step` is given."""

    def last(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        return _guard.call("measuring before an optimizer step", _see, entry, args, kwargs)

    # a hook added from a pre-hook takes effect in the same step, as the last one
    entry.hook = entry.optimizer.register_step_pre_hook(torch.compiler.disable(last))


if hasattr(os, "register_at_fork"):
    # a forked child inherits the hooks but not the thread that would take the records
    os.register_at_fork(after_in_child=_forget_all)
