"""The code that dynamo generates for a frame which is just a step, and the two calls that it is given: at its beginning and at its end.

Beside `traced`, which says which frames these are, and marks them by a `Span` among the constants of their code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Iterable
from types import CodeType
from typing import Any

import torch
from torch.optim import Optimizer

from paramwatch.callstack import RESUMED
from paramwatch.guard import logger
from paramwatch.untraced import Hook

NOT_THERE = (AttributeError, ImportError, KeyError, TypeError)
"""What is raised where dynamo is otherwise than here."""


class _Moment(functools.partial[None]):
    """A call among the constants of a compiled code. Where that code is saved and loaded, `bool` is called, which does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type, (False,)


class Span:
    """Kept among the constants of a code while it is compiled: the steps that it is, from its first instruction to its last.

    Args:
        before: Called for each optimizer when the code is entered, as a pre-hook is.
        after: Called for each when it is left, as a post-hook is.
    """

    def __init__(self, before: Hook, after: Hook) -> None:
        self.optimizers: list[weakref.ref[Optimizer]] = []
        self.ended: set[int] = set()
        """The identities of those whose step has returned, where that is in the same code."""
        self.seen = True
        self.enter = _Moment(torch.compiler.disable(lambda: self._each(before, self.optimizers)))
        self.leave = _Moment(torch.compiler.disable(lambda: self._each(after, reversed(self.optimizers))))

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()

    def _each(self, call: Hook, optimizers: Iterable[weakref.ref[Optimizer]]) -> None:
        for ref in optimizers:
            if (optimizer := ref()) is not None:
                call(optimizer, (optimizer,), {})


def with_span(code: CodeType, new_code: CodeType) -> CodeType | None:
    span = span_of(new_code.co_consts)
    if span is None:
        return None
    if span.seen:
        # one that raised, and was caught in this very code, is no step; after a break it goes on in other code
        inside = [constant.co_name for constant in new_code.co_consts if isinstance(constant, CodeType)]
        if not any(RESUMED in name or "__resume_at" in name for name in (*new_code.co_names, *inside)):
            span.optimizers = [ref for ref in span.optimizers if id(ref()) in span.ended]
        with contextlib.suppress(*NOT_THERE):
            return _surrounded(new_code, span)
    say_unseen(", ".join(sorted({type(optimizer).__name__ for ref in span.optimizers if (optimizer := ref()) is not None})))
    return None


def say_unseen(names: str) -> None:
    logger.warning(
        "paramwatch: steps of %s are compiled into one graph with what comes before or after them (fullgraph=True) and cannot be seen "
        "there: they are not recorded. Compile `optimizer.step` by itself, or without fullgraph=True.",
        names,
    )


def span_of(constants: Iterable[Any]) -> Span | None:
    return next((constant for constant in constants if isinstance(constant, Span)), None)


def _surrounded(compiled: CodeType, span: Span) -> CodeType:
    from torch._dynamo import bytecode_transformation as bytecode

    def calling(what: Hook) -> list[Any]:
        called = bytecode.create_call_function(0, True)
        return [bytecode.create_load_const(what, checked=False), *called, bytecode.create_instruction("POP_TOP")]

    def surround(instructions: list[Any], options: dict[str, Any]) -> None:
        body: list[Any] = []
        for instruction in instructions:
            if instruction.opname.startswith("RETURN_"):
                body += bytecode.overwrite_instruction(instruction, [*calling(span.leave), copy.copy(instruction)])
            else:
                body.append(instruction)
            if instruction.opname == "RESUME":
                body += calling(span.enter)
        instructions[:] = body

    # newer versions give what the tracer has to say as well
    made: Any = bytecode.transform_code_object(compiled, surround, safe=True)
    return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]  # a code, of a module without types
