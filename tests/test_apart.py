"""A tie that comes apart while a model is trained is said once, by its names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changing import assign, overwrite, said, step, train
from harness import Lab, verify
from loops import sgd
from torch import nn

import paramwatch


def tied(*names: str) -> nn.Sequential:
    """Layers of one weight at these places, and others between them."""
    net = nn.Sequential(*(nn.Linear(3, 3, dtype=torch.float64) for _ in range(4)))
    for name in names[1:]:
        net.get_submodule(name).weight = net.get_submodule(names[0]).weight
    return net


def replace(net: nn.Sequential) -> None:
    net[3] = nn.Linear(3, 3, dtype=torch.float64)


def copy_one(net: nn.Sequential) -> None:
    net[3].weight = nn.Parameter(net[3].weight.detach().clone())


@pytest.mark.parametrize("change", [assign, overwrite, replace, copy_one], ids=lambda change: change.__name__)
def test_a_tie_that_breaks_is_said_at_the_step_that_finds_it(change: Callable[[Any], None]) -> None:
    def loop(lab: Lab) -> None:
        net = tied("1", "3")
        lab.attach(net)
        lab.expected_findings = {"tie_broken", "changed_outside"} if change is replace else {"tie_broken"}
        train(lab, net, sgd(net), first=0)
        change(net)
        train(lab, net, sgd(net), first=2)

    ((number, parameter, message),) = said(verify(loop).watch, "tie_broken")
    assert (number, parameter) == (2, "1.weight")
    assert message.startswith("'1.weight' and '3.weight' came apart at step 2, after load_state_dict(assign=True)?")


def test_a_tie_that_breaks_before_the_first_step_is_said_there(caplog: pytest.LogCaptureFixture) -> None:
    net = tied("0", "1", "3")
    watch = paramwatch.attach(net)
    assign(net)
    step(net, sgd(net))
    watch._worker.flush()

    ((number, _, message),) = said(watch, "tie_broken")
    assert number == 0
    assert message.startswith("'0.weight', '1.weight' and '3.weight' came apart at step 0, ")
    assert [record.levelno for record in caplog.records if record.message == f"step 0: {message}"] == [logging.WARNING]


def delete(net: nn.Sequential) -> None:
    del net[3]


def freeze(net: nn.Sequential) -> None:
    net[3].requires_grad_(False)


def tie_again(net: nn.Sequential) -> None:
    assign(net)
    net[3].weight = net[1].weight


def replace_by_nothing(net: nn.Sequential) -> None:
    net[1] = nn.Identity()


@pytest.mark.parametrize("change", [delete, freeze, tie_again, replace_by_nothing], ids=lambda change: change.__name__)
def test_no_tie_is_broken_where_a_place_is_gone_or_frozen_or_was_tied_again(change: Callable[[Any], None]) -> None:
    net = tied("1", "3")
    with paramwatch.attach(net) as watch:
        step(net, sgd(net))
        change(net)
        step(net, sgd(net))

    assert said(watch, "tie_broken") == []


def tie_first(net: nn.Sequential) -> None:
    net[0].weight = net[1].weight


def test_the_same_pair_is_not_said_twice_and_another_is() -> None:
    net = tied("1", "3")
    with paramwatch.attach(net) as watch:
        for i, change in enumerate([copy_one, tie_again, copy_one, tie_first, assign]):
            step(net, sgd(net), i=2 * i)
            change(net)
            step(net, sgd(net), i=2 * i + 1)

    assert [(number, message.partition(" came")[0]) for number, _, message in said(watch, "tie_broken")] == [
        (1, "'1.weight' and '3.weight'"),
        (9, "'0.weight' and '1.weight'"),
    ]


def test_what_is_done_to_a_tie_after_the_last_step_is_not_said() -> None:
    net = tied("1", "3")
    net[0].requires_grad_(False)
    with paramwatch.attach(net) as watch:
        step(net, sgd(p for p in net.parameters() if p.requires_grad))
        assign(net)

    assert watch.findings.empty
