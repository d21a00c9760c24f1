"""What a `step` is given to compute gradients with, replaced by what says when it has.

The first argument, or the one called `closure`, is there for that. So may be other functions that a step is given, under any name, alone or
several in a list: they count where gradients are others after they have returned.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.optim import Optimizer

from paramwatch.progress import Entry, Watcher
from paramwatch.untraced import untraced

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a call of `step`, by position and by keyword, the optimizer first."""

Seen: TypeAlias = list[tuple[Watcher, Any]]

Gradients: TypeAlias = list[tuple[weakref.ref[torch.Tensor] | None, int]]
"""Which tensors the gradients are, and how often each was written."""


class Told(NamedTuple):
    """Who hears of a function that a step was given; our failures are contained in each."""

    look: Callable[[Optimizer], Gradients | None]
    """Before one that need not compute gradients."""
    evaluated: Callable[[Seen, Optimizer, Gradients | None], None]
    """When one has returned, with what `look` gave."""
    left: Callable[[Entry], None]
    """When a closure has raised."""


class ReportingClosure:
    """A function of the user's, with a word each time it has returned. What it raises passes untouched.

    Args:
        function: The user's.
        entry: The step that it was given to.
        told: Hear of it.
        surely: Whether it is there to compute gradients.
    """

    def __init__(self, function: Callable[..., Any], entry: Entry, told: Told, surely: bool) -> None:
        # who asks for its signature gets the user's
        self.__wrapped__, self.__doc__ = function, getattr(function, "__doc__", None)
        self._entry, self._seen, self._surely = entry, list(entry.seen), surely
        # in a compiled step the function is traced, which is the user's; what we do before and after it is not
        self._look, self._evaluated, self._left = untraced(told.look), untraced(told.evaluated), told.left

    def add(self, seen: Seen) -> None:
        """Report to these as well: an optimizer inside passed the function on."""
        known = [token for _, token in self._seen]
        self._seen += [(watcher, token) for watcher, token in seen if not any(token is other for other in known)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = None if self._surely else self._look(self._entry.optimizer)
        try:
            result = self.__wrapped__(*args, **kwargs)
        except BaseException:
            # the step will not end; waiting for the next one would keep alive what the frames on the stack hold
            if self._surely:
                self._left(self._entry)
            raise
        self._evaluated(self._seen, self._entry.optimizer, before)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)


def has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a step is given what is there to compute gradients. A model, or a class, is not called for that, and must stay what it is."""
    return _is_closure(kwargs.get("closure", args[1] if len(args) > 1 else None))


def may_compute(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a step is given anything that may compute gradients."""
    return (len(args) > 1 or bool(kwargs)) and bool(_exchanged(args, kwargs, lambda function, surely: None)[1])


def reporting(args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry, told: Told) -> tuple[Arguments, bool]:
    """Arguments that report to a step in progress, and whether they did to none before: an optimizer around it may have passed them on."""

    def exchange(function: Any, surely: bool) -> Any:
        if isinstance(function, ReportingClosure):
            function.add(entry.seen)
            return function
        return ReportingClosure(function, entry, told, surely)

    given, found = _exchanged(args, kwargs, exchange)
    return given, not all(isinstance(function, ReportingClosure) for function in found)


def gradients_of(optimizer: Optimizer) -> Gradients:
    grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
    return [(None, 0) if grad is None else (weakref.ref(grad), 0 if grad.is_inference() else grad._version) for grad in grads]


def are_the_same(before: Gradients, now: Gradients) -> bool:
    # two references to one tensor are one object
    return len(before) == len(now) and all(a is b and i == j for (a, i), (b, j) in zip(before, now, strict=True))


def _exchanged(args: tuple[Any, ...], kwargs: dict[str, Any], exchange: Callable[[Any, bool], Any]) -> tuple[Arguments, list[Any]]:
    """Arguments with all functions exchanged that may compute gradients, and these functions. What holds none stays the same object."""
    found: list[Any] = []

    def alone(value: Any, surely: bool = False) -> Any:
        if not (_is_closure(value) if surely else isinstance(value, FunctionType | MethodType | ReportingClosure)):
            return value
        found.append(value)
        return exchange(value, surely)

    def each(value: Any, surely: bool) -> Any:
        if type(value) not in (list, tuple, dict):
            return alone(value, surely)
        before = len(found)
        others = [alone(one) for one in (value.values() if type(value) is dict else value)]
        if len(found) == before:
            return value
        return dict(zip(value, others, strict=True)) if type(value) is dict else type(value)(others)

    named = "closure" in kwargs
    by_position = tuple(each(value, i == 0 and not named) for i, value in enumerate(args[1:]))
    by_name = {name: each(value, name == "closure") for name, value in kwargs.items()}
    return ((*args[:1], *by_position), by_name), found


def _is_closure(value: Any) -> bool:
    return callable(value) and not isinstance(value, (torch.nn.Module, type))
