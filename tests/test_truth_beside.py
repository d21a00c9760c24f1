"""The truth harness over optimizers that step while the closure of another one runs: what each used is told, and not what comes later."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, closure_of, loss_of, mlp, sgd
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

import paramwatch


class Evaluates(SGD):
    """A subclass that calls the closure itself, and then its parent's `step` without one."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


def _beside(lab: Lab, after: Callable[[Optimizer], object], kind: type[SGD] = SGD, clips: bool = False) -> None:
    """The closure of one lets another step first.

    Args:
        lab: Watches.
        after: Told of the other one once it has stepped.
        kind: Of the one that is given the closure.
        clips: Before each of both.
    """
    net = mlp()
    optimizer, other = kind(net[0].parameters(), lr=LR), sgd(net[2])
    lab.attach(net)

    def complete(who: SGD, i: int) -> None:
        loss_of(net, i).backward()
        lab.raw(who)
        if clips:
            clip_grad_norm_(who.param_groups[0]["params"], 0.05)

    def closure(i: int) -> None:
        net.zero_grad()
        complete(other, i)
        other.step()
        after(other)
        optimizer.zero_grad()
        complete(optimizer, i)

    for i in range(4):
        with lab.by_update(optimizer, other):
            optimizer.step(partial(closure, i))


def what_is_computed_later(lab: Lab) -> None:
    _beside(lab, lambda other: other.zero_grad())


def what_is_added_later(lab: Lab) -> None:
    _beside(lab, lambda other: None)


def what_is_set_to_zero(lab: Lab) -> None:
    _beside(lab, lambda other: other.zero_grad(set_to_none=False))


def what_is_clipped(lab: Lab) -> None:
    _beside(lab, lambda other: other.zero_grad(), clips=True)


def one_that_leaves_its_step_to_its_parent(lab: Lab) -> None:
    _beside(lab, lambda other: other.zero_grad(), kind=Evaluates)


def and_then_alone(lab: Lab) -> None:
    """No row steps twice in a round, in whatever it does so."""
    net = mlp()
    optimizer, other = sgd(net[0]), sgd(net[2])
    lab.attach(net)

    def closure() -> Tensor:
        closure_of(net, other, i)()
        other.step()
        return closure_of(net, optimizer, i)()

    for i in range(8):
        with lab.by_update(other):
            closure_of(net, other, i)()
            other.step()
        with lab.by_update(optimizer, other):
            optimizer.step(closure)
        if i % 2:
            with lab.by_update(optimizer):
                optimizer.step(closure_of(net, optimizer, i))


def one_for_each_parameter_inside_the_backward_of_a_closure(lab: Lab) -> None:
    net = mlp()
    optimizer, others = sgd(net[0]), {param: sgd([param]) for param in net[2].parameters()}
    lab.attach(net)

    def step_now(param: Tensor) -> None:
        others[param].step()
        param.grad = None

    for param in others:
        param.register_post_accumulate_grad_hook(step_now)
    for i in range(4):
        with lab.by_update(optimizer, *others.values()):
            optimizer.step(closure_of(net, optimizer, i))


LOOPS: dict[str, Loop] = by_name(
    what_is_computed_later,
    what_is_added_later,
    what_is_set_to_zero,
    what_is_clipped,
    one_that_leaves_its_step_to_its_parent,
    and_then_alone,
    one_for_each_parameter_inside_the_backward_of_a_closure,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)


def test_of_what_both_hold_the_gradient_is_that_of_the_last_evaluation_and_the_update_of_both_steps() -> None:
    net = mlp()
    optimizer, other, weight = sgd(net), sgd(net[2]), net[2].weight
    watch = paramwatch.attach(net, update="exact")

    def closure() -> Tensor:
        closure_of(net, other, 0)()
        other.step()
        return closure_of(net, optimizer, 1)()

    for i in range(3):
        before = weight.detach().clone()
        optimizer.step(closure)
        found = watch.frame().loc[(i, "2.weight")]
        np.testing.assert_allclose(found["grad_norm"], weight.grad.norm(), rtol=1e-6)
        np.testing.assert_allclose(found["update_norm"], (weight.detach() - before).norm(), rtol=1e-6)
    watch.close()

    assert len(watch.steps) == 3
