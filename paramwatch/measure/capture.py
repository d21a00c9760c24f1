"""Whether a CUDA graph is being captured. What is queued then would be done at each replay, and no event may be asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from paramwatch.guard import logger


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


capturing: Callable[[], bool] = _capturing if torch.backends.cuda.is_built() else bool
"""Whether it is, on the stream on which this thread works now."""


def captured() -> bool:
    """The same of a step that would be measured, with a word about it, once."""
    found = capturing()
    if found:
        _say()
    return found


def may_wait() -> bool:
    """Whether a device may be waited for; where not that is said, once."""
    if found := capturing():
        _say_unread()
    return not found


@cache
def _say_unread() -> None:
    logger.warning(
        "paramwatch: while a CUDA graph is captured nobody can wait for the device; what is on its way from there is read once the capture "
        "is over, and not at all where the Watch is closed before"
    )


@cache
def _say() -> None:
    logger.warning("paramwatch: an optimizer step is captured in a CUDA graph; neither it nor what its replays do is recorded")
