"""What a test file leaves of paramwatch to the files that run after it in the same process: there must be nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator


def leftovers() -> list[str]:
    """Of what is loaded: watches, hooks, threads, and what was found out once for all while it was otherwise."""
    return [*_open(), *_threads(), *_stale()]


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        if thread.name == "paramwatch":
            thread.join(10)
            if thread.is_alive():
                yield "a thread"


def _open() -> Iterator[str]:
    if "paramwatch.watch" not in sys.modules:
        return
    from torch.nn.modules import module
    from torch.nn.utils import clip_grad
    from torch.optim import optimizer

    from paramwatch import attached

    yield from (f"{watch} is open" for watch in tuple(attached.opened))
    registries = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
    for registry in (*registries, module._global_forward_hooks, module._global_forward_pre_hooks):
        yield from (f"a hook {hook}" for hook in registry.values())
    if not clip_grad._group_tensors_by_device_and_dtype.__module__.startswith("torch."):
        yield "torch's helper for clipping is still wrapped"


def _stale() -> Iterator[str]:
    """Functions that said no when they were asked the only time, and would not say so now."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("paramwatch"):
            continue
        for function in vars(module).values():
            asked_once = getattr(function, "__module__", "") == name and hasattr(function, "cache_info")
            if asked_once and not function.__wrapped__.__code__.co_argcount and function.cache_info().currsize:
                said = function()
                if (said is None or said is False) and function.__wrapped__() is not said:
                    yield f"{name}.{function.__name__}() is still {said}"
