"""`super().step()` of a class that torch has put no hooks into.

torch wraps the `step` of a class when the first instance of that very class is made. A subclass that changes gradients (adds noise, takes
signs, centres) and then calls the `step` of a parent of which there is no instance uses gradients that none of torch's hooks tells of. So
while somebody watches, such parents are wrapped here. The wrapper does for `steps` what torch's does, and runs nobody else's hooks: they
have run before, around the step of the subclass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.optim import Optimizer

Step = Callable[..., Any]

_COMPILED = "_torchdynamo_inline"
"""What dynamo traces in place of a function; `functools.wraps` hands it on to what is wrapped around one."""

complete: set[type[Optimizer]] = set()
"""Classes whose parents' `step` is seen, by torch's wrapper or ours."""
_wrapped: list[tuple[type[Optimizer], Step, Step]] = []
"""Classes that were changed: what their `step` was, and is."""


def see_parents(kind: type[Optimizer], before: Step, after: Step) -> None:
    """From now on the `step` of each parent of a class is seen where it is called by its children.

    Args:
        kind: The class of an optimizer that is about to step.
        before: Called as torch calls a global pre-hook, when a parent's step is entered.
        after: Called as torch calls a global post-hook, when it has returned.
    """
    if kind in complete:
        return
    complete.add(kind)
    for parent in kind.__mro__[1:]:
        step = vars(parent).get("step")
        if parent is not Optimizer and issubclass(parent, Optimizer) and isinstance(step, FunctionType) and not _has_hooks(step):
            ours = _reporting(step, before, after)
            _wrapped.append((parent, step, ours))
            parent.step = ours  # type: ignore[method-assign]  # as torch does


def unsee_parents() -> None:
    """All classes are as they were, but for those that someone has wrapped meanwhile: in these ours stays, idle."""
    complete.clear()
    while _wrapped:
        parent, step, ours = _wrapped.pop()
        if vars(parent).get("step") is ours:
            parent.step = step  # type: ignore[method-assign]  # as torch does


def _has_hooks(step: FunctionType) -> bool:
    """Whether torch's hooks are called with it, in compiled code too: dynamo goes around the wrapper of what is compiled itself."""
    return hasattr(step, "hooked") and not hasattr(step, _COMPILED)


def _reporting(step: Step, before: Step, after: Step) -> Step:
    @functools.wraps(step)
    def reporting(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        given = before(optimizer, (optimizer, *args), kwargs)
        args, kwargs = (args, kwargs) if given is None else (given[0][1:], given[1])
        result = step(optimizer, *args, **kwargs)
        after(optimizer, (optimizer, *args), kwargs)
        return result

    vars(reporting).pop(_COMPILED, None)
    return reporting
