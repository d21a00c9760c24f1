"""Seeing gradients before they are clipped, in a plain loop: `raw_gradients=True`.

`clip_grad_norm_` and `clip_grad_value_` both group their gradients through one helper, a global of their module, before they change
anything. While a Watch asks for it that helper is wrapped; functions imported earlier find the wrapped one too, since they look the global
up when they run.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn.utils import clip_grad

from paramwatch.callstack import caller
from paramwatch.guard import Guard
from paramwatch.traced import untraced_or

_HELPER = "_group_tensors_by_device_and_dtype"

_ONLY_LOOKS = "_get_total_norm"
"""The one caller of the helper that changes nothing."""

# reentrant: a collector may end a Watch while this thread holds it
_lock = threading.RLock()
_listeners: tuple[RawListener, ...] = ()
_original: Any = None
_in_place = False


class RawListener(Protocol):
    """Takes gradients that are about to be clipped."""

    guard: Guard

    def raw_gradients(self, grads: Sequence[Tensor], *, of: Collection[int] | None) -> None: ...


def listen(listener: RawListener) -> None:
    """Report to this listener whenever torch is about to clip.

    Raises:
        AttributeError: This torch has no such helper.
    """
    global _listeners, _original, _in_place
    with _lock:
        if not _in_place:
            _original = getattr(clip_grad, _HELPER)
            setattr(clip_grad, _HELPER, _reporting)
            _in_place = True
        _listeners = (*_listeners, listener)


def unlisten(listener: RawListener) -> None:
    """Forget a listener; after the last one torch's helper is back in its place, unless someone has wrapped ours in turn."""
    global _listeners, _in_place
    with _lock:
        _listeners = tuple(other for other in _listeners if other is not listener)
        if not _listeners and getattr(clip_grad, _HELPER) is _reporting:
            setattr(clip_grad, _HELPER, _original)
            _in_place = False


def _report_first(tensorlistlist: Any, *args: Any, **kwargs: Any) -> Any:
    for listener in _listeners:
        with listener.guard.contain("measuring gradients before clipping"):
            _tell(listener, tensorlistlist)
    return _original(tensorlistlist, *args, **kwargs)


def _tell(listener: RawListener, tensorlistlist: Any) -> None:
    running = caller()
    if running is None or running.f_code.co_name != _ONLY_LOOKS:
        params = None if running is None else running.f_locals.get("parameters")
        # of an iterator that torch has gone through they are not known any more
        of = {*map(id, params)} if isinstance(params, list | tuple) else None
        listener.raw_gradients([tensor for tensors in tensorlistlist for tensor in tensors if isinstance(tensor, Tensor)], of=of)


# a compiled loop must call this as it is and not trace it
_reporting: Any = untraced_or(_report_first, lambda *args, **kwargs: _original(*args, **kwargs))
