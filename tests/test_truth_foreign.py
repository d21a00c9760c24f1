"""The truth harness over optimizers that are not torch's: schedule-free ones, and those that torch's hooks cannot see."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, loss_of, mlp, step_with_closures
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

import paramwatch

# ---- schedule-free: parameters are moved to evaluate, and moved back to train ---------------


def _schedule_free(lab: Lab, name: str, **options: Any) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    net = mlp()
    optimizer = getattr(schedulefree, name)(net.parameters(), lr=LR, **options)
    lab.attach(net)
    for i in range(6):
        optimizer.train()
        optimizer.zero_grad()
        loss_of(net, i).backward()
        lab.raw()
        clip_grad_norm_(net.parameters(), 0.5)
        used = net[0].weight.grad.clone()
        with lab.by_twin(optimizer):
            optimizer.step()
        assert torch.equal(net[0].weight.grad, used) == ("weight_decay" not in options and name != "AdamWScheduleFree")
        if i % 2:
            trained = net[0].weight.detach().clone()
            optimizer.eval()
            assert not torch.equal(net[0].weight, trained)
            lab.losses.append(float(loss_of(net, 9).detach()))


def schedule_free_sgd(lab: Lab) -> None:
    _schedule_free(lab, "SGDScheduleFree")


def schedule_free_sgd_that_changes_gradients(lab: Lab) -> None:
    _schedule_free(lab, "SGDScheduleFree", weight_decay=0.25, foreach=True)


def schedule_free_adamw(lab: Lab) -> None:
    _schedule_free(lab, "AdamWScheduleFree", warmup_steps=2)


def schedule_free_adamw_one_by_one(lab: Lab) -> None:
    _schedule_free(lab, "AdamWScheduleFree", weight_decay=0.25, foreach=False)


def schedule_free_with_a_closure(lab: Lab) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    lab.attach(mlp())
    step_with_closures(lab, schedulefree.SGDScheduleFreeClosure(lab.model.parameters(), lr=LR, momentum=0.5))


# ---- what torch's hooks cannot see ----------------------------------------------------------


class Plain:
    """No `torch.optim.Optimizer` at all."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.param_groups = [{"params": list(params), "lr": LR}]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"])


class Uninitialised(Optimizer):
    """An optimizer whose class torch never got to put hooks into."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.param_groups = [{"params": list(params), "lr": LR}]
        self.state = {}

    step = Plain.step


class Around:
    """No optimizer, with one inside that hooks see: what it does to the parameters afterwards they do not."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.base = SGD(params, lr=LR)
        self.param_groups = self.base.param_groups

    def step(self) -> None:
        self.base.step()
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=LR)


def _with_watch_step(lab: Lab, optimizer: Any, named: bool = True, lr: float = LR) -> None:
    net = lab.model
    for i in range(4):
        net.zero_grad()
        loss_of(net, i).backward()
        lab.raw()
        clip_grad_norm_(net.parameters(), 0.5)
        seen = contextlib.nullcontext() if lab.watch is None else lab.watch.step(optimizer if named else None)
        with lab.by_update(optimizer, lr=lr), seen:
            optimizer.step()


def a_plain_class(lab: Lab) -> None:
    lab.attach(mlp())
    _with_watch_step(lab, Plain(lab.model.parameters()))


def a_plain_class_that_is_not_named(lab: Lab) -> None:
    lab.attach(mlp())
    _with_watch_step(lab, Plain(lab.model.parameters()), named=False)


def a_plain_class_of_some_parameters(lab: Lab) -> None:
    lab.attach(mlp())
    _with_watch_step(lab, Plain(lab.model[2].parameters()))


def a_subclass_without_its_parents_init(lab: Lab) -> None:
    lab.attach(mlp())
    _with_watch_step(lab, Uninitialised(lab.model.parameters()))


def a_plain_class_around_an_optimizer(lab: Lab) -> None:
    lab.attach(mlp())
    _with_watch_step(lab, Around(lab.model.parameters()), lr=2 * LR)


def an_optimizer_that_hooks_see_as_well(lab: Lab) -> None:
    lab.attach(mlp())
    _with_watch_step(lab, SGD(lab.model.parameters(), lr=LR))


def an_optimizer_that_hooks_see_after_one_that_they_do_not(lab: Lab) -> None:
    net = mlp()
    hidden, seen = Plain(net[0].parameters()), SGD(net[2].parameters(), lr=LR)
    lab.attach(net)
    for i in range(3):
        net.zero_grad()
        loss_of(net, i).backward()
        with lab.by_update(hidden, seen):
            with contextlib.nullcontext() if lab.watch is None else lab.watch.step(hidden):
                hidden.step()
            seen.step()


LOOPS: dict[str, Loop] = by_name(
    schedule_free_sgd,
    schedule_free_sgd_that_changes_gradients,
    schedule_free_adamw,
    schedule_free_adamw_one_by_one,
    schedule_free_with_a_closure,
    a_plain_class,
    a_plain_class_that_is_not_named,
    a_plain_class_of_some_parameters,
    a_subclass_without_its_parents_init,
    a_plain_class_around_an_optimizer,
    an_optimizer_that_hooks_see_as_well,
    an_optimizer_that_hooks_see_after_one_that_they_do_not,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)


@pytest.mark.parametrize("kind", [Plain, Uninitialised])
def test_without_watch_step_nothing_is_recorded_and_closing_says_what_to_do(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    net = mlp()
    optimizer, watch = kind(net.parameters()), paramwatch.attach(net)
    loss_of(net).backward()
    optimizer.step()
    with caplog.at_level(logging.WARNING, "paramwatch"):
        watch.close()

    assert watch.frame().empty
    assert "0 optimizer steps of Sequential seen" in caplog.text
    assert "with watch.step(optimizer):" in caplog.text
