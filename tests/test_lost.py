"""An optimizer of tensors that have left the model is said, once, and as soon as it steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changing import assign, overwrite, said, step, train
from harness import LR, Lab, verify
from loops import loss_of, mlp, sgd
from torch import nn
from torch.optim import Optimizer

import paramwatch


@pytest.mark.parametrize("change", [assign, overwrite], ids=lambda change: change.__name__)
@pytest.mark.parametrize("made", ["before the watch", "after the watch"])
@pytest.mark.parametrize("stepped", [True, False])
def test_an_optimizer_that_owns_nothing_of_the_model_any_more_is_said_at_once(
    stepped: bool, made: str, change: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    net = mlp()
    optimizer = sgd(net)
    watch = paramwatch.attach(net)
    if made == "after the watch":
        optimizer = sgd(net)
    for i in range(3 * stepped):
        step(net, optimizer, i=i)
    change(net)
    step(net, optimizer)

    # nobody reads, flushes or closes: only the thread is waited for
    watch._worker.flush()
    (warning,) = [record.message for record in caplog.records if "the optimizer (" in record.message]
    assert warning.partition(": ")[2].startswith(
        "the optimizer (SGD) owns 4 tensors that are no longer in the model: training has silently stopped for them "
        "(was '0.weight', '0.bias', '2.weight' and 1 more)."
    )
    step(net, optimizer)
    assert [(number, parameter) for number, parameter, _ in said(watch, "dead_optimizer")] == [(3 * stepped, "0.weight")]


def test_an_optimizer_that_lost_some_of_its_tensors_is_said_with_its_step_and_goes_on_with_the_others() -> None:
    def loop(lab: Lab) -> None:
        net = mlp()
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
        lab.attach(net)
        lab.expected_findings = {"dead_optimizer"}
        train(lab, net, optimizer, first=0)
        net[0].weight = nn.Parameter(net[0].weight.detach().clone())
        train(lab, net, optimizer, first=2)

    ((number, parameter, message),) = said(verify(loop).watch, "dead_optimizer")
    assert (number, parameter) == (2, "0.weight")
    assert message.startswith(
        "the optimizer (AdamW) owns 1 tensor that is no longer in the model: training has silently stopped for it (was '0.weight')."
    )


def test_training_goes_on_being_recorded_once_a_dead_optimizer_was_replaced() -> None:
    def loop(lab: Lab) -> None:
        net = mlp()
        lab.attach(net)
        lab.expected_findings = {"dead_optimizer"}
        dead = sgd(net)
        train(lab, net, dead, first=0)
        assign(net)
        for i in range(3):
            step(net, dead, i=i)
        train(lab, net, sgd(net), first=2)

    assert len(said(verify(loop).watch, "dead_optimizer")) == 1


def test_a_tensor_whose_memory_was_replaced_is_known_by_the_optimizer_that_held_it() -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for i in range(7):
            step(net, optimizer, i=i)
            if i == 4:
                for p in net.parameters():
                    p.data = p.data.clone()
        # neither of the changes was at a power of two, where the model is read again in any case
        assign(net)
        step(net, optimizer)

    assert [number for number, _, _ in said(watch, "dead_optimizer")] == [7]


def test_tensors_that_an_optimizer_loses_later_are_said_then() -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for i, layer in enumerate([None, 0, 2, 0, 2]):
            if layer is not None:
                net[layer] = mlp()[layer]
            step(net, optimizer, i=i)

    assert [(number, parameter) for number, parameter, _ in said(watch, "dead_optimizer")] == [(1, "0.weight"), (2, "2.weight")]


def test_an_optimizer_of_two_models_is_not_dead_for_the_tensors_of_the_other() -> None:
    net, other = mlp(0), mlp(1)
    optimizer = sgd([*net.parameters(), *other.parameters()])
    with paramwatch.attach(net) as watch:
        for i in range(3):
            loss_of(other, i).backward()
            step(net, optimizer, sgd(other), i=i)
            other.zero_grad()
            other[0].weight.data = other[0].weight.data.clone()

    assert watch.findings.empty


def test_a_new_tensor_with_the_identity_of_one_that_is_gone_is_not_taken_for_it() -> None:
    net = mlp()
    with paramwatch.attach(net) as watch:
        step(net, sgd(net))
        kept = [p.data for p in net[0].parameters()]
        net[0] = mlp(1)[0]
        watch._live.refresh(1)
        gone, stranger = watch._live.changed._gone, nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        # whose identity is used again is for the allocator to say: here it is said for it
        gone[id(stranger)] = gone.pop(next(iter(gone)))
        step(net, sgd([*net[2].parameters(), stranger]))

        assert id(stranger) in watch._live.changed._gone
    assert len(kept) == 2
    assert said(watch, "dead_optimizer") == []


def replace_and_add(net: nn.Sequential, optimizer: Optimizer) -> None:
    net[2] = mlp(1)[2]
    optimizer.add_param_group({"params": net[2].parameters()})


def tie(net: nn.Sequential, optimizer: Optimizer) -> None:
    net[1].weight = net[0].weight


def remake(net: nn.Module, optimizer: Optimizer) -> None:
    assign(net)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(net.parameters())})


@pytest.mark.parametrize("change", [replace_and_add, tie, remake], ids=lambda change: change.__name__)
def test_an_optimizer_that_was_given_what_took_the_place_is_not_dead(change: Callable[[Any, Optimizer], None]) -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))) if change is tie else mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        step(net, optimizer)
        change(net, optimizer)
        step(net, optimizer, i=1)

    assert said(watch, "dead_optimizer") == []


def test_tensors_that_are_gone_keep_no_memory_and_are_forgotten() -> None:
    net = mlp()
    with paramwatch.attach(net) as watch:
        for i in range(5):
            net[0] = mlp(i)[0]
            step(net, sgd(net), i=i)
        gc.collect()
        assert [known.lives for known in watch._live.changed._gone.values()].count(True) <= 2
        net[0] = mlp()[0]
        step(net, sgd(net))

        assert len(watch._live.changed._gone) <= 4
        assert len(watch._live.changed._holders) <= 2
