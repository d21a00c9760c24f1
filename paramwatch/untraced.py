"""Hooks that compilers call as they are and do not trace, at no cost where nothing is compiled.

`torch.compiler.disable` does it by a wrapper that takes longer than much of what a hook of ours does. So a hook is marked as that wrapper
is, asks first whether anybody compiles, and goes by way of the wrapper only then. Marking and asking are private to torch: where it has
neither, every call goes by way of the wrapper.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Hook = Callable[..., Any]


@cache
def untraced(function: Hook) -> Hook:
    """The function, of which nothing is traced, nor of what it calls."""
    disabled: Hook = torch.compiler.disable(function)
    return disabled


def hook(function: Hook) -> Hook:
    """What to register for a function that begins with `if compiled(): return untraced(function)(...)`."""
    # made now: within a compiled step the making would be compiled
    disabled = untraced(function)
    if compiled is bool:
        return disabled
    from torch._dynamo.decorators import skip

    marked: Hook = skip(function)
    return marked


def _asks_torch() -> Callable[[], Any]:
    # earlier versions, 2.6 for one, give a reference away that they do not own: asked at each step, Python crashes sooner or later
    if torch.__version__ < "2.13":
        return bool
    try:
        from torch._C._dynamo.eval_frame import get_eval_frame_callback
        from torch._dynamo.decorators import skip
    except ImportError:
        return bool
    return get_eval_frame_callback if callable(skip) else bool


compiled = _asks_torch()
"""Whether what this thread calls now would be traced."""
