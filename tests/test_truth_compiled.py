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
from torch.utils.weak import WeakIdRef

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


# ---- what the compiler makes of them, and the numbers -------------------------------------------


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


class Compiler:
    """Compiles for one loop, and keeps count."""

    def __init__(self, backend: str = "eager") -> None:
        torch._dynamo.reset()
        counters.clear()
        self._backend = torch._dynamo.lookup_backend(backend)
        self._graphs: list[list[str]] = []
        self._frames = [sum(FRAME_COMPILE_COUNTER.values())]

    def __call__(self, what: Any, **options: Any) -> Any:
        return torch.compile(what, backend=self._make, **options)

    def _make(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self._graphs.append([f"{node.op} {node.target}" for node in graph.graph.nodes])
        return self._backend(graph, inputs)

    def passed(self) -> None:
        """A pass of the loop is over."""
        self._frames.append(sum(FRAME_COMPILE_COUNTER.values()))

    def made(self, net: nn.Module) -> Compiled:
        """All of it."""
        traced = self._frames[-1] - self._frames[0], self._frames[-1] - self._frames[-2]
        # the compiler's own that nothing holds any more go whenever garbage is collected
        gc.collect()
        # torch 2.6 keeps its tables of tensors for each frame it traced, and traces one less where it gives up a frame sooner
        weakrefs = [sum(not isinstance(ref, WeakIdRef) for ref in weakref.getweakrefs(param)) for param in net.parameters()]
        return Compiled(self._graphs, Counter(counters["graph_break"]), traced, weakrefs)


def verify_compiled(compiling: Compiling, backend: str = "eager", make: Callable[[nn.Module], Optimizer] = sgd) -> list[Compiled]:
    """The harness over a compiled loop of plain SGD, and what the compiler made of it bare and watched."""
    found = []

    def loop(lab: Lab) -> None:
        compiler = Compiler(backend)
        lab.compiles = True
        net = mlp()
        optimizer = make(net)
        lab.attach(net)
        iterate = compiling(net, optimizer, compiler)
        for i in range(STEPS):
            with lab.by_update(optimizer):
                iterate(batch(i))
            compiler.passed()
            lab.losses.append(loss_of(net, batch(i)).item())
        found.append(compiler.made(net))

    verify(loop)
    return found


def compiled_run(compiling: Compiling, attach_at: int | None, make: Callable[[nn.Module], Optimizer] = sgd) -> Compiled:
    """Compile a loop and run it, watched from one of its passes on, or not."""
    compiler, net = Compiler(), mlp()
    iterate, watch = compiling(net, make(net), compiler), None
    for i in range(STEPS):
        if i == attach_at:
            watch = paramwatch.attach(net)
        iterate(batch(i))
        compiler.passed()
    if watch is not None:
        watch.close()
        assert len(watch.steps) == STEPS - (attach_at or 0)
    return compiler.made(net)


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


def assert_the_same(watched: Compiled, bare: Compiled, uncounted: int = 0) -> None:
    """Attached before the first pass, nothing is compiled or broken on top; of frames, dynamo gave up so many before it counted them."""
    assert watched.graphs == bare.graphs
    assert watched.weakrefs == bare.weakrefs
    assert watched.traced == (bare.traced[0] - uncounted, 0)
    assert of_others(watched.breaks) == of_others(bare.breaks)
    assert watched.breaks.total() == bare.breaks.total() - uncounted


COMPILED = {made.__name__: made for made in (the_model, the_step, the_bound_step, a_step_with_a_closure, the_whole_pass)}


@pytest.mark.parametrize("compiling", COMPILED.values(), ids=COMPILED)
def test_the_books_agree_and_the_graphs_are_the_same_watched_or_not(compiling: Compiling) -> None:
    bare, watched = verify_compiled(compiling)
    # a closure is given by a hook that is called: dynamo gives up torch's function around `step` in the loop over hooks
    assert_the_same(watched, bare, uncounted=int(compiling is a_step_with_a_closure))


def test_the_graphs_of_adam_are_the_same_watched_or_not() -> None:
    assert_the_same(compiled_run(the_step, 0, adam), compiled_run(the_step, None, adam))


@pytest.mark.parametrize("compiling", [the_model, the_whole_pass])
def test_the_books_agree_where_the_backward_is_compiled_too(compiling: Compiling) -> None:
    bare, watched = verify_compiled(compiling, "aot_eager")
    assert_the_same(watched, bare)


@pytest.mark.parametrize("compiling", [a_step_with_a_closure, the_whole_pass])
def test_attached_later_the_graphs_are_the_same(compiling: Compiling) -> None:
    bare, later = (compiled_run(compiling, attach_at) for attach_at in (None, 2))

    assert later.graphs == bare.graphs
    assert later.weakrefs == bare.weakrefs
    assert later.traced[1] == 0
    assert of_others(later.breaks).keys() <= of_others(bare.breaks).keys()
    # the frame that has a hook to call is met once more
    assert later.breaks.total() <= bare.breaks.total() + 1
    # torch's wrapper of `step`, which has a hook to call now, and a step that is given another closure are traced once more
    assert later.traced[0] <= bare.traced[0] + 3


def clipping_sgd(net: nn.Module) -> Optimizer:
    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.mul_(0.25)

    optimizer = sgd(net)
    optimizer.register_step_pre_hook(clip)
    return optimizer


def test_a_hook_that_changes_gradients_in_a_compiled_step_is_run_as_it_is_and_the_step_is_one_graph_as_ever() -> None:
    bare, watched = verify_compiled(the_step, "aot_eager", clipping_sgd)

    # dynamo gives up torch's wrapper of `step`, into which it had put this hook, since ours breaks the loop that calls them both
    of_the_hook, of_the_step = bare.graphs
    assert sum("mul_" in operation for operation in of_the_hook) == 4
    assert watched.graphs == [of_the_step]


def explained(compiling: Compiling, watched: bool, make: Callable[[nn.Module], Optimizer]) -> tuple[int, int, int, list[str]]:
    """What `torch._dynamo.explain` says of a pass: graphs, breaks between them, operations, reasons."""
    torch._dynamo.reset()
    net = mlp()
    iterate = compiling(net, make(net), lambda what, **_: torch._dynamo.explain(what))
    with paramwatch.attach(net) if watched else contextlib.nullcontext():
        found: Any = iterate(batch(0))
    return found.graph_count, found.graph_break_count, found.op_count, [each.reason for each in found.break_reasons]


@pytest.mark.parametrize("make", [sgd, adam])
def test_torchs_own_count_of_graph_breaks_is_the_same_watched_or_not(make: Callable[[nn.Module], Optimizer]) -> None:
    bare, watched = (explained(the_whole_pass, watched, make) for watched in (False, True))

    assert bare[0] > 1
    assert watched == bare


def test_a_compiled_model_is_one_graph_without_a_break() -> None:
    def fullgraph(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
        return the_model(net, optimizer, partial(compiled, fullgraph=True))

    found = compiled_run(fullgraph, 0)
    assert not found.breaks
    assert len(found.graphs) == 1


def test_another_graph_is_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_the_same(compiled_run(the_step, None), compiled_run(the_step, None, adam))


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
