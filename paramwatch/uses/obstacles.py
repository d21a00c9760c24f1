"""What stands in the way of telling uses apart, in words, and the way out: compiled regions above all."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

EAGER = (
    "To split a step that is compiled set torch.compiler.set_stance('force_eager') before the step before it ends, or call the module "
    "itself, which is not compiled: docs/tied-gradients.md"
)
"""The way out."""

_STEP_BY_STEP = "torch.backends.{0}.flags(enabled=False) around the forward pass has a recurrent layer run step by step, more slowly"

COMPUTED = "parametrization"
"""Stands for the operations that compute a weight from parameters, once for several uses."""

PRODUCT = "product"
"""Stands for a product of parameters, of which what it makes is used several times, and not as a weight."""

WAYS = {
    COMPUTED: (
        "Without torch.nn.utils.parametrize.cached(), or where each use reads the weight anew, they can; so they can where it is computed "
        "by operations of torch alone, outside of checkpoint and saved_tensors_hooks, and with a torch newer than 2.6 that tells so"
    ),
    PRODUCT: (
        "Computed anew for each use they can; so they can where what is computed is the weight of a linear layer, a convolution or an "
        "embedding: F.linear(x, w + b @ a)"
    ),
    "compiledfunction": EAGER,
    "mkldnnrnnlayer": _STEP_BY_STEP.format("mkldnn"),
    "cudnnrnn": _STEP_BY_STEP.format("cudnn"),
    "miopenrnn": _STEP_BY_STEP.format("cudnn"),
    "differentiablegraph": "Call the module itself instead of its scripted form",
    "broadcast": "DistributedDataParallel has a process for each device",
}
"""What holds several uses as one, and the way out of each."""

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
        return is_compiled(compiled)
    return None


def is_compiled(part: str) -> str:
    """Of a part, in words."""
    return f"gradients are not split by use: uses inside a compiled region cannot be told apart, and {part} is one. {EAGER}"


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
    """What of a model is compiled in its place, in words; None if nothing is. What is only beside it shows when it is called."""
    for name, part in module.named_modules():
        # the last is Lightning's, of a module that was given to it compiled
        compiled = getattr(part, "_compiled_call_impl", None) is not None or vars(part).get("_compiler_ctx") is not None
        if compiled or hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
            return in_words(name)
    return None


def in_words(name: str) -> str:
    """A part of a model."""
    return f"{name!r}" if name else "the model"


def runs_compiled(module: nn.Module) -> bool:
    """Whether it is a `torch.compile(module)`, of which compiled code is about to run."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None or not isinstance(module, frames.OptimizedModule) or is_eager():
        return False
    # what `torch.compiler.disable` gives is one as well
    return not isinstance(module.dynamo_ctx, frames.DisableContext)


def compiles_backward() -> bool:
    """Whether compiled autograd goes through the graph, and has come upon what it does not compile."""
    compiled: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiled is not None and bool(getattr(compiled, "in_compiled_autograd_region", False))


class no_warning_of_hooks:  # noqa: N801
    """torch warns whoever calls a compiled module while there are global hooks: nobody else's are meant, and they are gone soon."""

    def __init__(self) -> None:
        # not by filterwarnings, which has Python show again what it has shown once
        self._entry = ("ignore", re.compile(re.escape(_WARNING)), UserWarning, None, 0)
        warnings.filters.insert(0, self._entry)  # type: ignore[attr-defined]  # typed as a sequence, and is a list

    def remove(self) -> None:
        if self._entry in warnings.filters:
            warnings.filters.remove(self._entry)  # type: ignore[attr-defined]  # as above
