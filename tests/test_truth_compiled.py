"""The truth harness over compiled loops, and what the compiler makes of them: the same graphs, watched or not."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from harness import Lab, verify
from loops import LR, mlp, sgd
from torch import Tensor, nn
from torch._dynamo.convert_frame import FRAME_COMPILE_COUNTER
from torch._dynamo.utils import counters
from torch.optim import Optimizer

import paramwatch
from paramwatch import untraced

pytestmark = [
    # what dynamo does to itself when it traces an optimizer, and a loss
    pytest.mark.filterwarnings("ignore:.*script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

Compile = Callable[..., Any]
Iterate = Callable[[Tensor], Any]
"""One pass of a loop over a batch: gradient and step."""

Compiling = Callable[[nn.Module, Optimizer, Compile], Iterate]
"""Makes a loop of which something is compiled."""

STEPS = 4

RECOMPILE_LIMIT = getattr(torch._dynamo.config, "recompile_limit", 8)
"""How often dynamo traces a function before it gives up; before torch 2.7 it has another name and is 8."""


def batch(i: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def loss_of(net: Any, x: Tensor) -> Tensor:
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def closure_of(net: nn.Module, optimizer: Optimizer, x: Tensor) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        return loss

    return evaluate


# ---- what is compiled: each gives one pass of a loop ------------------------------------------


def the_model(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    model = compiled(net)

    def iterate(x: Tensor) -> None:
        closure_of(model, optimizer, x)()
        optimizer.step()

    return iterate


def the_step(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    step = compiled(lambda: optimizer.step())

    def iterate(x: Tensor) -> None:
        closure_of(net, optimizer, x)()
        step()

    return iterate


def the_bound_step(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    step = compiled(optimizer.step)

    def iterate(x: Tensor) -> None:
        closure_of(net, optimizer, x)()
        step()

    return iterate


def a_step_with_a_closure(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    step = compiled(lambda closure: optimizer.step(closure))
    return lambda x: step(closure_of(net, optimizer, x))


def the_whole_pass(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    def iterate(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        optimizer.step()
        return loss

    made: Iterate = compiled(iterate)
    return made


def a_step_that_clips_in_a_hook(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.mul_(0.25)

    optimizer.register_step_pre_hook(clip)
    return the_step(net, optimizer, compiled)


COMPILED = {made.__name__: made for made in (the_model, the_step, the_bound_step, a_step_with_a_closure, the_whole_pass)}


# ---- the numbers ------------------------------------------------------------------------------


def verify_compiled(compiling: Compiling, backend: str, make: Callable[[nn.Module], Optimizer] = sgd) -> None:
    """The harness over a compiled loop of plain SGD."""

    def loop(lab: Lab) -> None:
        torch._dynamo.reset()
        lab.compiles = True
        net = mlp()
        optimizer = make(net)
        lab.attach(net)
        iterate = compiling(net, optimizer, lambda what, **options: torch.compile(what, backend=backend, **options))
        for i in range(3):
            with lab.by_update(optimizer):
                iterate(batch(i))
            lab.losses.append(loss_of(net, batch(i)).item())

    verify(loop)


@pytest.mark.parametrize("compiling", COMPILED.values(), ids=COMPILED)
def test_the_books_agree(compiling: Compiling) -> None:
    verify_compiled(compiling, "eager")


@pytest.mark.parametrize("compiling", [the_model, the_step, the_whole_pass])
def test_the_books_agree_where_the_backward_is_compiled_too(compiling: Compiling) -> None:
    verify_compiled(compiling, "aot_eager")


def clipping_sgd(net: nn.Module) -> Optimizer:
    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.mul_(0.25)

    optimizer = sgd(net)
    optimizer.register_step_pre_hook(clip)
    return optimizer


def test_the_books_agree_where_a_hook_changes_the_gradients_of_a_compiled_step() -> None:
    verify_compiled(the_step, "aot_eager", clipping_sgd)


# ---- the graphs -------------------------------------------------------------------------------


@dataclass
class Compiled:
    """What the compiler made of a loop."""

    graphs: list[list[str]]
    """The operations of each graph, in order."""
    breaks: Counter[str]
    """How often each reason to break a graph was met."""
    traced: tuple[int, int]
    """Frames traced in all passes, and in the last one."""
    weakrefs: list[int]


def compiled_run(compiling: Compiling, attach_at: int | None, make: Callable[[nn.Module], Optimizer] = sgd) -> Compiled:
    """Compile a loop and run it, watched from one of its passes on, or not."""
    torch._dynamo.reset()
    counters.clear()
    graphs: list[list[str]] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([f"{node.op} {node.target}" for node in graph.graph.nodes])
        return graph.forward

    net = mlp()
    optimizer = make(net)
    iterate = compiling(net, optimizer, lambda what, **options: torch.compile(what, backend=counting, **options))
    frames, watch = [sum(FRAME_COMPILE_COUNTER.values())], None
    for i in range(STEPS):
        if i == attach_at:
            watch = paramwatch.attach(net)
        iterate(batch(i))
        frames.append(sum(FRAME_COMPILE_COUNTER.values()))
    if watch is not None:
        watch.close()
        assert len(watch.steps) == STEPS - (attach_at or 0)
    # the compiler's own that nothing holds any more go whenever garbage is collected
    gc.collect()
    weakrefs = [weakref.getweakrefcount(param) for param in net.parameters()]
    return Compiled(graphs, Counter(counters["graph_break"]), (frames[-1] - frames[0], frames[-1] - frames[-2]), weakrefs)


def of_others(breaks: Counter[str]) -> Counter[str]:
    """Without the breaks inside `Optimizer.step`: unwatched torch's own, watched those at what it calls of ours."""
    inside = (
        *("torch._dynamo.graph_break()", "paramwatch measures"),
        # in the words of torch 2.6
        "'skip function graph_break in file",
    )
    return Counter({reason: n for reason, n in breaks.items() if not any(each in reason for each in inside)})


def adam(net: nn.Module) -> Optimizer:
    return torch.optim.Adam(net.parameters(), lr=LR)


KINDS = {
    "the_model": (the_model, sgd),
    "the_step": (the_step, sgd),
    "the_bound_step": (the_bound_step, sgd),
    "a_step_with_a_closure": (a_step_with_a_closure, sgd),
    "the_whole_pass": (the_whole_pass, sgd),
    "the_step_of_adam": (the_step, adam),
}


@pytest.mark.parametrize(("compiling", "make"), KINDS.values(), ids=KINDS)
def test_the_graphs_are_the_same_watched_or_not(compiling: Compiling, make: Callable[[nn.Module], Optimizer]) -> None:
    bare, watched, watched_later = (compiled_run(compiling, attach_at, make) for attach_at in (None, 0, 2))

    for other in (watched, watched_later):
        assert other.graphs == bare.graphs
        assert other.weakrefs == bare.weakrefs
        assert other.traced[1] == 0
        assert of_others(other.breaks).keys() <= of_others(bare.breaks).keys()
    assert of_others(watched.breaks) <= of_others(bare.breaks)
    # attached before the first pass, nothing is compiled or broken on top; later, the frame that has a hook to call is met once more
    assert watched.breaks.total() <= bare.breaks.total()
    assert watched.traced[0] <= bare.traced[0]
    assert watched_later.breaks.total() <= bare.breaks.total() + 1
    # torch's wrapper of `step`, which has a hook to call now, and a step that is given another closure are traced once more
    assert watched_later.traced[0] <= bare.traced[0] + 3


def explained(compiling: Compiling, attach_at: int | None, make: Callable[[nn.Module], Optimizer]) -> list[tuple[int, int, int, list[str]]]:
    """What `torch._dynamo.explain` says of two passes: graphs, breaks between them, operations, reasons."""
    torch._dynamo.reset()
    said = []

    def explaining(what: Any, **_: Any) -> Any:
        def called(*args: Any) -> Any:
            found = torch._dynamo.explain(what)(*args)
            said.append((found.graph_count, found.graph_break_count, found.op_count, [each.reason for each in found.break_reasons]))
            return what(*args)

        return called

    net = mlp()
    iterate = compiling(net, make(net), explaining)
    with contextlib.ExitStack() as watched:
        for i in range(2):
            if i == attach_at:
                watched.enter_context(paramwatch.attach(net))
            iterate(batch(i))
    return said


@pytest.mark.parametrize(("compiling", "make"), KINDS.values(), ids=KINDS)
def test_torchs_own_count_of_graph_breaks_is_the_same_watched_or_not(compiling: Compiling, make: Callable[[nn.Module], Optimizer]) -> None:
    bare, watched, watched_later = (explained(compiling, attach_at, make) for attach_at in (None, 0, 1))

    assert bare[0][0] > 0
    assert watched == bare
    assert watched_later == bare


def test_a_compiled_model_is_one_graph_without_a_break() -> None:
    def fullgraph(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
        return the_model(net, optimizer, partial(compiled, fullgraph=True))

    found = compiled_run(fullgraph, 0)
    assert not found.breaks
    assert len(found.graphs) == 1


def test_a_hook_that_changes_gradients_in_a_compiled_step_is_run_as_it_is_and_the_step_is_one_graph_as_ever() -> None:
    bare, watched = compiled_run(the_step, None, clipping_sgd), compiled_run(the_step, 0, clipping_sgd)

    # dynamo gives up torch's wrapper of `step`, into which it had put this hook, since ours breaks the loop that calls them both
    of_the_hook, of_the_step = bare.graphs
    assert sum("mul_" in operation for operation in of_the_hook) == 4
    assert watched.graphs == [of_the_step]


def test_another_graph_is_noticed() -> None:
    assert compiled_run(the_step, None).graphs != compiled_run(the_step, None, adam).graphs


def test_attaching_again_and_again_compiles_nothing_anew() -> None:
    def loop(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
        iterate = the_step(net, optimizer, compiled)

        def attached(x: Tensor) -> None:
            # more often than dynamo traces a function before it gives up
            for _ in range(RECOMPILE_LIMIT // STEPS + 1):
                with paramwatch.attach(net):
                    iterate(x)

        return attached

    assert compiled_run(loop, None).graphs == compiled_run(the_step, None).graphs


def test_asking_whether_anybody_compiles_takes_no_references_away() -> None:
    before = sys.getrefcount(None)
    for _ in range(10_000):
        untraced.compiled()
    # other threads run meanwhile
    assert abs(sys.getrefcount(None) - before) < 5_000
