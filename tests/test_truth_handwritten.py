"""Compiled steps of optimizers written by hand: the same graphs and breaks watched or not, and the numbers that they used.

torch's own break inside `step`, these do not: their hooks are traced with them, and what is compiled may have to be one graph.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.bytecode_transformation
import torch._dynamo.convert_frame
from harness import Lab, verify
from loops import LR, mlp
from test_truth_compiled import (
    RECOMPILE_LIMIT,
    Compile,
    Compiling,
    Iterate,
    assert_the_same,
    batch,
    compiled_run,
    explained,
    loss_of,
    the_bound_step,
    the_step,
    the_whole_pass,
    verify_compiled,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import paramwatch
from paramwatch import steps, traced
from paramwatch.codespan import Span
from paramwatch.testing import ListSink

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Mentions(Optimizer):
    """Its step names torch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": LR})

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(param.grad, alpha=group["lr"])


class Decorated(Mentions):
    """torch is named around its step, not in it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"])


class Foreach(Mentions):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        torch._foreach_sub_(params, [param.grad for param in params], alpha=LR)


class Breaking(Mentions):
    """Breaks its own graph."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad, alpha=LR)
        torch._dynamo.graph_break()


class OnlyCalls(Decorated):
    """Leaves everything to its parent, of which there is an instance or not."""

    def step(self, closure: Any = None) -> None:
        super().step()


class HalvesFirst(Decorated):
    """Changes the gradients before its parent uses them."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.grad.mul_(0.5)
        super().step()


class CompilesItsOwn(Mentions):
    """Its step is compiled wherever it is called."""

    @torch.compile(backend="eager")
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(param.grad, alpha=group["lr"])


class HalvesBeforeIt(CompilesItsOwn):
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.grad.mul_(0.5)
        super().step()


class HalvesSGD(torch.optim.SGD):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=LR)

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.grad.mul_(0.5)
        return super().step()


HAND_WRITTEN = {kind.__name__: kind for kind in (Mentions, Decorated, Foreach, Breaking, OnlyCalls)}
WHERE = {made.__name__: made for made in (the_step, the_bound_step, the_whole_pass)}
SOME = [("Mentions", "the_step"), ("Decorated", "the_whole_pass"), ("Foreach", "the_bound_step"), ("Breaking", "the_bound_step")]
SOME += [("OnlyCalls", "the_step")]


@pytest.mark.parametrize(("kind", "where"), SOME)
def test_the_books_agree_and_graphs_and_breaks_are_the_same_watched_or_not(kind: str, where: str) -> None:
    bare, watched = verify_compiled(WHERE[where], "eager", HAND_WRITTEN[kind])
    assert watched == bare


def test_attached_later_the_graphs_are_the_same() -> None:
    bare, later = (compiled_run(the_whole_pass, attach_at, Decorated) for attach_at in (None, 2))

    # dynamo guards torch's registries of hooks: what has traced them is compiled once more, to the same
    assert later.graphs[: len(bare.graphs)] == bare.graphs
    assert all(graph in bare.graphs for graph in later.graphs)
    assert later.traced[1] == 0


def test_torchs_own_count_of_graph_breaks_is_the_same_watched_or_not() -> None:
    bare, watched = (explained(the_whole_pass, watched, Decorated) for watched in (False, True))

    assert bare[0] > 1
    assert watched == bare


def test_where_a_step_changes_gradients_before_its_parent_uses_them_the_graph_breaks_in_between() -> None:
    bare, watched = verify_compiled(the_step, "eager", HalvesFirst)
    count = [[sum(operation in each for each in found.graphs[0]) for operation in ("mul_", "sub_")] for found in (bare, watched)]

    assert len(bare.graphs) == 1
    assert count == [[4, 4], [4, 0]]
    # torch's own break there by themselves
    assert_the_same(compiled_run(the_step, 0, HalvesSGD), compiled_run(the_step, None, HalvesSGD))


def test_what_a_step_does_before_it_calls_a_parent_that_compiles_its_own_is_seen() -> None:
    before = vars(CompilesItsOwn)["step"]
    verify_compiled(the_step, "eager", HalvesBeforeIt)
    assert vars(CompilesItsOwn)["step"] is before
    # torch has put hooks into it now, and dynamo goes around them
    CompilesItsOwn(mlp())
    verify_compiled(the_step, "eager", HalvesBeforeIt)


MISSING = [(torch._dynamo.convert_frame, "register_bytecode_hook"), (torch._dynamo.bytecode_transformation, "create_load_const")]


@pytest.mark.parametrize(("where", "name"), MISSING, ids=[name for _, name in MISSING])
def test_without_what_torch_does_not_promise_the_hooks_are_called(where: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(where, name)
    steps._made.cache_clear()
    try:
        assert not traced.can_trace()
        verify_compiled(the_step, "eager", Decorated)
    finally:
        steps._made.cache_clear()


def after_backward(net: nn.Module, optimizer: Optimizer, finish: Callable[[], Any]) -> Iterate:
    def iterate(x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(net, x).backward()
        finish()

    return iterate


def clipped_in_the_same_graph(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    def finish() -> None:
        with torch.no_grad():
            for param in net.parameters():
                assert param.grad is not None
                param.grad.mul_(0.25)
        optimizer.step()

    return after_backward(net, optimizer, compiled(finish))


def clipped_by_torch(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    def finish() -> None:
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()

    return after_backward(net, optimizer, compiled(finish))


def changed_after_the_step(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    def finish() -> None:
        optimizer.step()
        optimizer.step()

    return after_backward(net, optimizer, compiled(finish))


def test_what_is_done_to_gradients_in_the_same_graph_is_seen_since_that_breaks() -> None:
    bare, watched = verify_compiled(clipped_in_the_same_graph, "eager", Decorated)
    assert (len(bare.graphs), len(watched.graphs)) == (1, 2)


def gradients_given(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
    def finish(grads: list[Tensor]) -> None:
        for param, grad in zip(net.parameters(), grads, strict=True):
            param.grad = grad
        optimizer.step()

    step = compiled(finish)
    return lambda x: step(list(torch.autograd.grad(loss_of(net, x), list(net.parameters()))))


def test_gradients_that_are_given_without_an_operation_are_those_of_the_step() -> None:
    verify_compiled(gradients_given, "eager", Decorated)


# ---- what must be one graph -------------------------------------------------------------------


def whole(compiling: Compiling) -> Compiling:
    return lambda net, optimizer, compiled: compiling(net, optimizer, partial(compiled, fullgraph=True))


@pytest.mark.parametrize(("kind", "where"), [("Mentions", "the_step"), ("Decorated", "the_bound_step")])
def test_a_step_that_must_be_one_graph_is_one_and_is_recorded(kind: str, where: str) -> None:
    bare, watched = verify_compiled(whole(WHERE[where]), "aot_eager", HAND_WRITTEN[kind])
    assert watched == bare
    assert len(bare.graphs) == 1


clips_in_one_graph = pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 does not trace its own clip function, watched or not")


@pytest.mark.parametrize(
    "finish",
    [clipped_in_the_same_graph, pytest.param(clipped_by_torch, marks=clips_in_one_graph), changed_after_the_step, gradients_given],
)
def test_a_step_amid_others_in_what_must_be_one_graph_is_left_alone_and_said_to_be_unseen(
    finish: Compiling, caplog: pytest.LogCaptureFixture
) -> None:
    trained = []
    for watched in (False, True):
        torch._dynamo.reset()
        net = mlp()
        iterate = finish(net, Decorated(net), lambda what: torch.compile(what, backend="eager", fullgraph=True))
        watch = paramwatch.attach(net, raw_gradients=True) if watched else None
        with caplog.at_level(logging.WARNING, "paramwatch"):
            for i in range(3):
                iterate(batch(i))
        trained.append([param.detach().clone() for param in net.parameters()])
        if watch is not None:
            assert len(watch.steps) == 0
            assert [record.message for record in caplog.records if "steps of Decorated are compiled into one graph" in record.message]
            watch.close()
    assert all(map(torch.equal, *trained))


def test_a_closure_in_what_must_be_one_graph_harms_nothing() -> None:
    net = mlp()
    torch._dynamo.reset()
    optimizer = Decorated(net)
    step = torch.compile(lambda closure: optimizer.step(closure), backend="eager", fullgraph=True)
    loss_of(net, batch(0)).backward()
    with paramwatch.attach(net):
        step(lambda: None)


def test_attaching_again_and_again_compiles_a_step_but_once() -> None:
    def loop(net: nn.Module, optimizer: Optimizer, compiled: Compile) -> Iterate:
        iterate = the_bound_step(net, optimizer, compiled)

        def attached(x: Tensor) -> None:
            for _ in range(RECOMPILE_LIMIT):
                with paramwatch.attach(net):
                    iterate(x)

        return attached

    found = compiled_run(loop, None, Decorated)
    assert found.graphs == compiled_run(the_bound_step, None, Decorated).graphs


def test_a_step_that_raises_is_forgotten_and_the_next_one_recorded() -> None:
    def loop(lab: Lab) -> None:
        torch._dynamo.reset()
        lab.compiles = True
        net = mlp()
        optimizer = Decorated(net)
        lab.attach(net)
        step = torch.compile(optimizer.step, backend="eager")
        for i in range(3):
            optimizer.zero_grad()
            loss_of(net, batch(i)).backward()
            kept = net[0].weight.grad
            net[0].weight.grad = None
            with pytest.raises(Exception, match="None"):
                step()
            net[0].weight.grad = kept
            with lab.by_update(optimizer):
                step()

    verify(loop)


@pytest.mark.skipif(not hasattr(torch._dynamo, "error_on_graph_break"), reason="this torch has no error_on_graph_break")
def test_a_step_in_a_function_that_must_not_break_does_not_raise() -> None:
    torch._dynamo.reset()
    net = mlp()
    optimizer = Decorated(net)
    unbroken = torch._dynamo.error_on_graph_break(True)(lambda: optimizer.step())
    with paramwatch.attach(net):
        one_step(net, torch.compile(lambda: unbroken(), backend="eager"))


def test_a_step_that_was_compiled_while_it_was_watched_can_be_saved_like_any_other() -> None:
    made = Span(lambda *_: None, lambda *_: None)
    enter, leave, kept = pickle.loads(pickle.dumps((made.enter, made.leave, made)))

    # what is loaded elsewhere calls these, where there may be no paramwatch
    assert enter() is leave() is kept is False
    assert b"paramwatch" not in pickle.dumps((made.enter, made))


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "caching_precompile"), reason="this torch does not save what it compiles")
def test_torch_saves_what_it_compiles_of_a_watched_step() -> None:
    torch._dynamo.reset()
    net = mlp()
    with torch._dynamo.config.patch(caching_precompile=True), paramwatch.attach(net) as watch:
        one_step(net, torch.compile(Decorated(net).step, backend="eager"))
        assert len(watch.steps) == 1


@pytest.mark.skipif(not hasattr(torch.compiler, "load_compiled_function"), reason="this torch does not compile ahead")
def test_a_step_that_is_compiled_ahead_while_it_is_watched_is_saved_and_loaded(tmp_path: Path) -> None:
    torch._dynamo.reset()
    net, saved = mlp(), tmp_path / "step"
    optimizer = Decorated(net)

    def update(optimizer: Optimizer) -> None:
        optimizer.step()

    net(batch(0)).square().mean().backward()
    with paramwatch.attach(net) as watch:
        torch.compile(update, backend="eager", fullgraph=True).aot_compile(((optimizer,), {})).save_compiled_function(str(saved))
        with saved.open("rb") as file:
            step = torch.compiler.load_compiled_function(file)
        step(optimizer)
        assert len(watch.steps) == 0
        with watch.step(optimizer):
            step(optimizer)
        assert len(watch.steps) == 1


def test_a_step_that_raises_within_compiled_code_that_goes_on_is_none() -> None:
    class Late(Mentions):
        bad = False

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(param.grad, alpha=group["lr"])
            if self.bad:
                raise ValueError

    torch._dynamo.reset()
    net = mlp()
    optimizer = Late(net)

    def update() -> None:
        try:  # noqa: SIM105  # as users write it
            optimizer.step()
        except ValueError:
            pass

    compiled = torch.compile(update, backend="eager")
    with paramwatch.attach(net, sinks=[sink := ListSink()]):
        for bad in (False, True, False):
            optimizer.bad = bad
            one_step(net, compiled)
    assert len(sink.records) == 2


def one_step(net: nn.Module, compiled: Any) -> None:
    net(batch(0)).square().mean().backward()
    compiled()
