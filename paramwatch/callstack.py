"""Who is calling, and which threads are inside `Optimizer.step`: what `steps` reads off the call stacks."""

from __future__ import annotations

import os
import sys
import threading
from types import FrameType

import torch.optim.optimizer as torch_optimizer

_OURS = os.path.join(os.path.dirname(__file__), "")

_DYNAMO = os.path.join("torch", "_dynamo", "")

RESUMED = "torch_dynamo_resume_in_"
"""Starts the name of a function that goes on where a compiled one was left: a second frame of the same call."""


def caller(ours: int = 1) -> FrameType | None:
    """The nearest frame that is neither ours nor dynamo's: the one that runs the step.

    Args:
        ours: How many of the nearest are ours for certain, the one that calls this among them.
    """
    frame: FrameType | None = sys._getframe(ours + 1)
    while frame is not None and (frame.f_code.co_filename.startswith(_OURS) or _DYNAMO in frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def is_running(wanted: FrameType, top: FrameType | None) -> bool:
    """Whether a frame is on the stack that has this one on top."""
    frame = top
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False


def steps_running() -> int:
    """Calls of all threads inside torch's wrapper of `Optimizer.step`, where it may be walking the registries of global hooks."""
    return sum(_calls(top) for top in sys._current_frames().values())


def is_only_step() -> bool:
    """Whether one step is running in the process, that of this thread."""
    return steps_running() == _calls(sys._current_frames()[threading.get_ident()]) == 1


def _calls(top: FrameType | None) -> int:
    found = 0
    while top is not None:
        code = top.f_code
        found += code.co_filename == torch_optimizer.__file__ and not code.co_name.startswith(RESUMED)
        top = top.f_back
    return found
