"""Steps inside code that dynamo compiles: the graphs stay as they are, and the code around them says where a step begins and ends.

dynamo traces torch's hooks along with `step`. A hook that it has to call breaks the graph, and one that it traces is not run again. So ours
trace to nothing where a compiled frame is just the step: what dynamo generates for that frame is then given a call before its first
instruction and one before it returns. Where the same graph has other operations before the step or after it nobody can see the gradients
and parameters in between: there our hooks are called, which breaks the graph, unless it must not be broken; then the step goes unseen, and
that is said. Of dynamo's inside nothing here is public: where something is missing the hooks are called.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch.optim import Optimizer

from paramwatch.callstack import RESUMED
from paramwatch.codespan import NOT_THERE, Span, say_unseen, span_of, with_span
from paramwatch.untraced import Hook

_WHY = "paramwatch measures at the beginning and at the end of a step"

_HARMLESS = frozenset(["POP_TOP", "NOP", "CACHE", "PRECALL", "LOAD_CONST", "LOAD_FAST", "LOAD_FAST_BORROW"])
"""Instructions that change nothing."""


class Traced:
    """Hooks for torch that know what to do when they are traced.

    Args:
        before: A pre-hook without anything that follows it.
        after: A post-hook.
        alone: Whether nobody else's hook comes between our two and the step.
        meet: Told of the class of an optimizer, before its step is traced.
    """

    def __init__(self, before: Hook, after: Hook, alone: Callable[[Optimizer], bool], meet: Callable[[type[Optimizer]], None]) -> None:
        self._before, self._after, self._alone, self._meet = before, after, alone, meet
        self._can_trace = can_trace()

    def hooks(self, before: Hook, after: Hook) -> tuple[Hook, Hook]:
        """Make a pre-hook and a post-hook of two that are not to be traced: they leave a step in the graph where they can."""
        if not self._can_trace:
            return before, after
        from torch._dynamo.comptime import comptime
        from torch._dynamo.exc import SkipFrame

        # not looked up in this module, of which dynamo would leave the name in the user's
        tracing, address_of, count = torch.compiler.is_dynamo_compiling, id, len

        def begins(context: Any) -> None:
            whole = _must_be_one(context)
            stays = self._stays(_optimizer_of(context), context.get_local("arguments").as_python_constant(), whole)
            if not stays and be_called(context):
                say_unseen("an optimizer")

        def ends(context: Any) -> None:
            if not self._is_around(context.get_local("address").as_python_constant()):
                be_called(context)

        def be_called(context: Any) -> bool:
            """Whether it must not be: then the graph goes on without us."""
            # a hook that is called already is not to be compiled, and goes on as it is
            if _frame().f_code in (pre_hook.__code__, post_hook.__code__):
                raise SkipFrame(_WHY)
            if not _must_be_one(context):
                context.graph_break(_WHY)
            return True

        def pre_hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if tracing():
                address, arguments = address_of(optimizer), count(args) + count(kwargs)  # noqa: F841  # guarded, and read by `begins`
                comptime(begins)
                return None
            return before(optimizer, args, kwargs)

        def post_hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if tracing():
                address = address_of(optimizer)  # noqa: F841  # read by `ends`
                comptime(ends)
            else:
                after(optimizer, args, kwargs)

        for function in (pre_hook, post_hook):
            # dynamo would save what is local to a function along with its guards, and does not come to an end with one that knows itself
            function.__qualname__ = function.__name__
        return pre_hook, post_hook

    def _stays(self, optimizer: Optimizer | None, arguments: int, whole: bool) -> bool:
        """Whether a step that is entered is left in the graph, and the frame's code will tell of it."""
        if optimizer is None:
            return False
        with contextlib.suppress(*NOT_THERE):
            frame = _frame()
            span = span_of(frame.output.code_options["co_consts"])
            seen = arguments == 1 and self._alone(optimizer) and _is_untouched(frame.output) and (span is not None or _is_last(frame))
            if not seen and not whole:
                return False
            self._meet(type(optimizer))
            if span is None:
                span = Span(self._before, self._after)
                frame.output.code_options["co_consts"] += (span,)
            span.optimizers.append(weakref.ref(optimizer))
            span.seen = span.seen and seen
            return True
        return False

    def _is_around(self, address: int) -> bool:
        """Whether the code around a step tells of its end. What follows a break in `step` is run by the code that told of its beginning."""
        with contextlib.suppress(*NOT_THERE):
            frame = _frame()
            span = span_of(frame.output.code_options["co_consts"])
            if span is not None:
                span.ended.add(address)
            return span is not None or _is_wrapper(frame.f_code, RESUMED)
        return False

    def register(self) -> list[Any]:
        """From now on compiled code has its span. Returns the handle, if that can be had."""
        if not self._can_trace:
            return []
        from torch._dynamo.convert_frame import register_bytecode_hook

        return [register_bytecode_hook(with_span)]


def can_trace() -> bool:
    """Whether there is in dynamo what is used here."""
    try:
        from torch._dynamo import bytecode_transformation, comptime, convert_frame, exc, symbolic_convert
        from torch._guards import TracingContext
    except ImportError:
        return False
    used = {
        bytecode_transformation: ("create_call_function", "create_load_const", "overwrite_instruction", "transform_code_object"),
        comptime: ("comptime",),
        convert_frame: ("register_bytecode_hook",),
        exc: ("SkipFrame",),
        symbolic_convert.InstructionTranslator: ("current_tx",),
        TracingContext: ("extract_stack",),
    }
    return all(hasattr(where, name) for where, names in used.items() for name in names)


def untraced_or(function: Hook, otherwise: Hook) -> Hook:
    """What dynamo has to call, which breaks the graph; in one that must not be broken it is as if `otherwise` were there."""
    called: Hook = torch.compiler.disable(function)
    if not can_trace():
        return called
    from torch._dynamo.comptime import comptime
    from torch._dynamo.exc import SkipFrame

    tracing = torch.compiler.is_dynamo_compiling

    def be_called(context: Any) -> None:
        if _frame().f_code is chosen.__code__:
            raise SkipFrame(_WHY)
        if not _must_be_one(context):
            context.graph_break(_WHY)

    def chosen(*args: Any, **kwargs: Any) -> Any:
        if not tracing():
            return called(*args, **kwargs)
        comptime(be_called)
        return otherwise(*args, **kwargs)

    return chosen


def _must_be_one(context: Any) -> bool:
    """Whether a break would be an error, in the frame that is being compiled or in one that was called in it."""
    frame = getattr(context, "_ComptimeContext__tx", None) or _frame()
    while frame is not None:
        if frame.one_graph or getattr(frame, "error_on_graph_break", False):
            return True
        frame = getattr(frame, "parent", None)
    return False


def _frame() -> Any:
    """What dynamo is tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx()


def _optimizer_of(context: Any) -> Optimizer | None:
    """Whose step is traced; None of an optimizer that the code itself makes, which is another one each time."""
    variable: Any = getattr(context.get_local("optimizer"), "_ComptimeVar__variable", None)
    variable = variable.realize() if hasattr(variable, "realize") else variable
    found = None if getattr(variable, "source", None) is None else getattr(variable, "value", None)
    return found if isinstance(found, Optimizer) else None


def _is_untouched(output: Any) -> bool:
    """Whether nothing was computed or changed since the frame was entered."""
    effects = output.side_effects
    there = [variable for variable in effects.id_to_variable.values() if "Existing" in type(variable.mutation_type).__name__]
    computed = [node for node in output.graph.nodes if node.op not in ("placeholder", "get_attr")]
    return not computed and not any(map(effects.is_modified, there))


def _is_wrapper(code: CodeType, prefix: str = "") -> bool:
    """Whether this is torch's function around `step`."""
    return code.co_filename == torch_optimizer.__file__ and code.co_name.startswith(f"{prefix}wrapper")


def _is_last(frame: Any) -> bool:
    """Whether nothing happens in the frame between the end of the step and its own."""
    from torch._guards import TracingContext

    if _is_wrapper(frame.f_code):
        return True
    rest = [instruction.opname for instruction in frame.instructions[frame.instruction_pointer :]]
    returned = next((i for i, name in enumerate(rest) if name.startswith("RETURN_")), len(rest))
    # the frame itself, torch's function around `step` and our hook: nobody else is on the way
    return len(TracingContext.extract_stack()) == 3 and set(rest[:returned]) <= _HARMLESS
