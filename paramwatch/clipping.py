"""Seeing gradients before they are clipped, in a plain loop: `raw_gradients=True`.

`clip_grad_norm_` and `clip_grad_value_` both group their gradients through one helper, a global of their module, before they change
anything, and then go through the groups, writing each gradient. While a Watch asks for it that helper is wrapped; functions imported
earlier find the wrapped one too, since they look the global up when they run. So is the function by which a `GradScaler` takes out its
scale, since a gradient may be clipped before that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from paramwatch.callstack import caller
from paramwatch.guard import Guard
from paramwatch.raw import RawGradients
from paramwatch.traced import untraced_or

_ONLY_LOOKS = "_get_total_norm"
"""The one caller of the helper that changes nothing."""

_DOING = "measuring gradients before clipping"

# reentrant: a collector may end a Watch while this thread holds it
_lock = threading.RLock()
_listeners: tuple[RawListener, ...] = ()
_originals: dict[str, Any] = {}
_in_place: set[str] = set()


class RawListener(Protocol):
    """Is told what becomes of gradients before their step."""

    guard: Guard

    def before_clipping(self, tell: Callable[[RawGradients], object]) -> None: ...


def listen(listener: RawListener) -> None:
    """Report to this listener whenever torch clips.

    Raises:
        AttributeError: This torch has no such helper.
    """
    global _listeners
    with _lock:
        for where, name, ours in _WRAPPED:
            if name not in _in_place:
                _originals[name] = getattr(where, name)
                setattr(where, name, ours)
                _in_place.add(name)
        _listeners = (*_listeners, listener)


def unlisten(listener: RawListener) -> None:
    """Forget a listener; after the last one torch's functions are back in their places, unless someone has wrapped ours in turn."""
    global _listeners
    with _lock:
        _listeners = tuple(other for other in _listeners if other is not listener)
        for where, name, ours in _WRAPPED if not _listeners else ():
            if getattr(where, name) is ours:
                setattr(where, name, _originals[name])
                _in_place.remove(name)


class _Groups(dict[Any, Any]):
    """What the helper gives: who has gone through it has written all gradients in it."""

    grads: Sequence[Tensor] = ()

    def items(self) -> Iterator[Any]:  # type: ignore[override]  # torch only goes through it
        yield from super().items()
        _written(self.grads)


def _report_clipping(tensorlistlist: Any, *args: Any, **kwargs: Any) -> Any:
    clipped: list[Tensor] = []
    for listener in _listeners:
        with listener.guard.contain(_DOING):
            running = caller()
            if running is None or running.f_code.co_name != _ONLY_LOOKS:
                clipped = [tensor for tensors in tensorlistlist for tensor in tensors if isinstance(tensor, Tensor)]
                params = None if running is None else running.f_locals.get("parameters")
                # of an iterator that torch has gone through they are not known any more
                of = params if isinstance(params, list | tuple) else None
                listener.before_clipping(partial(RawGradients.clipping, grads=clipped, of=of))
    groups = _originals[_GROUPS](tensorlistlist, *args, **kwargs)
    if clipped:
        groups = _Groups(groups)
        groups.grads = clipped
    return groups


def _report_unscaling(grads: Any, found_inf: Any, factor: Any) -> Any:
    for listener in _listeners:
        with listener.guard.contain(_DOING):
            listener.before_clipping(partial(RawGradients.unscaling, grads=grads, factor=factor))
    result = _originals[_UNSCALE](grads, found_inf, factor)
    _report_written(grads)
    return result


def _report_written(grads: Sequence[Tensor]) -> None:
    for listener in _listeners:
        with listener.guard.contain(_DOING):
            listener.before_clipping(partial(RawGradients.written, grads=grads))


_GROUPS, _UNSCALE = "_group_tensors_by_device_and_dtype", "_amp_foreach_non_finite_check_and_unscale_"

# a compiled loop must call these as they are and not trace them
_written = torch.compiler.disable(_report_written)
_WRAPPED: tuple[tuple[Any, str, Any], ...] = (
    (clip_grad, _GROUPS, untraced_or(_report_clipping, lambda *args, **kwargs: _originals[_GROUPS](*args, **kwargs))),
    (torch, _UNSCALE, untraced_or(_report_unscaling, lambda *args, **kwargs: _originals[_UNSCALE](*args, **kwargs))),
)
