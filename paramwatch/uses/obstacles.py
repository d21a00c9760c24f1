"""What stands in the way of telling uses apart, in words, and the way out: compiled regions above all."""

from __future__ import annotations

import gc
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

EAGER = (
    "To split a step that is compiled set torch.compiler.set_stance('force_eager') before the step before it ends, or train the module "
    "without a compiled form of it: docs/tied-gradients.md"
)
"""The way out."""

_STEP_BY_STEP = "torch.backends.{0}.flags(enabled=False) around the forward pass has a recurrent layer run step by step, more slowly"

WAYS = {
    "compiledfunction": EAGER,
    "mkldnnrnnlayer": _STEP_BY_STEP.format("mkldnn"),
    "cudnnrnn": _STEP_BY_STEP.format("cudnn"),
    "miopenrnn": _STEP_BY_STEP.format("cudnn"),
    "differentiablegraph": "Call the module itself instead of its scripted form",
    "broadcast": "DistributedDataParallel has a process for each device",
}
"""Operations that hold several uses as one, and the way out of each."""

SEVERAL_THREADS = (
    "gradients are split by use only in part: modules are called from several threads at once (nn.DataParallel?), and what threads make "
    "beside the outermost call cannot be told apart. DistributedDataParallel has a process for each device"
)

_WARNING = "Using `torch.compile(module)` when there are global hooks"


def merged(operation: str, rows: Sequence[str]) -> str:
    """Of uses of some rows that are one to autograd."""
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    which = ", ".join(map(repr, rows[:3])) + more
    return f"the uses of {which} inside {operation!r} cannot be told apart: to autograd they are one operation. {WAYS[operation]}"


def obstacle_to_splitting(module: nn.Module) -> str | None:
    """Why no step of a model can be split now; None if one can."""
    if lacking := missing():
        return (
            f"gradients are not split by use: this torch ({torch.__version__}) has no {lacking}, which tells in which call an operation "
            "was made; another version of torch or of paramwatch may get along. All else is recorded"
        )
    if not is_eager() and (compiled := compiled_part(module)) is not None:
        return f"gradients are not split by use: uses inside a compiled region cannot be told apart, and {compiled} is one. {EAGER}"
    return None


def missing() -> str:
    """What this torch lacks of what is needed beyond its public interface; "" where it is all there."""
    needed = {"torch.autograd._get_sequence_nr": torch.autograd, "torch._C._current_graph_task_id": torch._C}
    return " and ".join(name for name, owner in needed.items() if not hasattr(owner, name.rpartition(".")[2]))


def is_eager() -> bool:
    """Whether compiled code is not being used at the moment, at the user's wish."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    stance = getattr(getattr(frames, "_stance", None), "stance", "default")
    return bool(stance == "force_eager")


def compiled_part(module: nn.Module) -> str | None:
    """What of a model is compiled, in words; None if nothing is."""
    for name, part in module.named_modules():
        if "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None:
            return f"{name!r}" if name else "the model"
    return "the model" if _has_compiled_form(module) else None


def _has_compiled_form(module: nn.Module) -> bool:
    """Whether there is a `torch.compile(module)` beside the module, which knows nothing of it."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    # nothing was ever compiled in most processes, and to look at all objects takes 40 ms; None is what `torch.compiler.disable` leaves here
    if frames is None or not any(backend is not None for backend in getattr(frames, "cached_backends", {}).values()):
        return False
    inside = {id(part) for part in module.modules()}
    forms = [each for each in gc.get_referrers(frames.OptimizedModule) if type(each) is frames.OptimizedModule]
    return any(id(each._modules.get("_orig_mod")) in inside for each in forms)


class no_warning_of_hooks:  # noqa: N801
    """torch warns whoever calls a compiled module while there are global hooks: nobody else's are meant, and they are gone soon."""

    def __init__(self) -> None:
        # not by filterwarnings, which has Python show again what it has shown once
        self._entry = ("ignore", re.compile(re.escape(_WARNING)), UserWarning, None, 0)
        warnings.filters.insert(0, self._entry)  # type: ignore[attr-defined]  # typed as a sequence, and is a list

    def remove(self) -> None:
        if self._entry in warnings.filters:
            warnings.filters.remove(self._entry)  # type: ignore[attr-defined]  # as above
