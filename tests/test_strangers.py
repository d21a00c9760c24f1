"""Optimizers of other models: they cost little, and are believed to be strangers for no longer than they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loops import mlp, sgd
from torch import nn

import paramwatch
from paramwatch.inventory import LiveInventory
from paramwatch.testing import ListSink

Change = Callable[[nn.Sequential, nn.Module, torch.optim.Optimizer], object]


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()


def test_a_stranger_is_looked_at_closely_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    held_by = LiveInventory.held_by
    monkeypatch.setattr(LiveInventory, "held_by", lambda *args: asked.append(args) or held_by(*args))
    net, other = mlp(), mlp()
    optimizer = sgd(other)
    with paramwatch.attach(net) as watch:
        for _ in range(9):
            step(other, optimizer)
        assert watch.recorder.foreign_steps == 9
        assert len(asked) == 1


CHANGES: dict[str, Change] = {
    "it takes a row": lambda net, other, optimizer: optimizer.add_param_group({"params": list(net.parameters())[:1]}),
    "it takes the place of what it held": lambda net, other, optimizer: optimizer.param_groups[0].update(params=list(net.parameters())),
    "the model takes its tensor": lambda net, other, optimizer: net[0].register_parameter("more", next(other.parameters())),
    "the model takes its layer": lambda net, other, optimizer: net.add_module("more", other),
    "a layer takes its layer": lambda net, other, optimizer: net[0].add_module("more", other),
    "what holds nothing takes its tensor": lambda net, other, optimizer: net[1].register_parameter("more", next(other.parameters())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stranger_that_is_one_no_more_is_recorded(change: Change) -> None:
    net, other = mlp(), mlp()
    optimizer, sink = sgd(other), ListSink()
    with paramwatch.attach(net, sinks=[sink]) as watch:
        for _ in range(3):
            step(other, optimizer)
        change(net, other, optimizer)
        for _ in range(2):
            step(other, optimizer)
        assert watch.recorder.foreign_steps == 3
        assert watch.recorder.steps_seen == 2
    assert [record.stepped.any() for record in sink.records] == [True, True]


def test_another_optimizer_in_the_place_of_a_stranger_is_not_taken_for_it() -> None:
    net, other = mlp(), mlp()
    with paramwatch.attach(net) as watch:
        for _ in range(20):
            # CPython gives the memory of the one to the next
            for each in (other, net):
                optimizer = sgd(each)
                step(each, optimizer)
                del optimizer
        assert watch.recorder.foreign_steps == watch.recorder.steps_seen == 20


def test_a_layer_of_a_stranger_that_is_made_anew_is_seen_when_the_model_takes_it() -> None:
    net, other = mlp(), mlp()
    with paramwatch.attach(net, sinks=[sink := ListSink()]) as watch:
        for _ in range(2):
            step(other, sgd(other))
        net[0] = other[0]
        for _ in range(3):
            step(other, sgd(other))
        assert watch.recorder.foreign_steps == 2
    assert len(sink.records) == 3


def test_an_optimizer_makes_a_record_at_each_step_whatever_it_holds_then() -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net, sinks=[sink := ListSink()]):
        for i in range(6):
            optimizer.param_groups[0]["params"] = list(net[0 if i % 2 else 2].parameters())
            step(net, optimizer)
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
        optimizer.param_groups[0]["params"] = list(net.parameters())
        step(net, optimizer)
    assert [record.step for record in sink.records] == list(range(7))
