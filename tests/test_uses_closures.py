"""Splits where gradients do not come from one `backward` before the step: closures, steps within steps, and `torch.autograd.grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_uses_edges import X, apart, loss, mlp, near, norms, sgd
from torch import Tensor, nn

import paramwatch


class Evaluating(torch.optim.SGD):
    """Calls the closure a few times, and leaves the step itself to the class that it is made from."""

    def __init__(self, params: Any, evaluations: int) -> None:
        super().__init__(params, lr=0.0)
        self.evaluations = evaluations

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            for _ in range(self.evaluations):
                closure()
        super().step()


class TwoSteps(torch.optim.Optimizer):
    """As sharpness-aware minimisation does it: a step up, an evaluation there, and the step of an optimizer inside."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.0)

    def step(self, closure: Any = None) -> None:
        self.zero_grad()
        with torch.enable_grad():
            closure()
        self.inner.step()


first, second = (lambda net: loss(net, X[:8])), (lambda net: loss(net, X[8:]))


@pytest.mark.parametrize(
    ("make", "before", "zeroes", "counts"),
    [
        (lambda net: Evaluating(net.parameters(), 1), False, True, [second]),
        (lambda net: Evaluating(net.parameters(), 2), False, True, [second]),
        (lambda net: Evaluating(net.parameters(), 2), False, False, [second, second]),
        (lambda net: Evaluating(net.parameters(), 2), True, False, [first, second, second]),
        (lambda net: Evaluating(net.parameters(), 1), True, True, [second]),
        (lambda net: TwoSteps(net.parameters()), True, False, [second]),
    ],
    ids=["zeroes", "twice, zeroes", "twice, adds", "adds to what was there, twice", "zeroes what was there", "an optimizer inside"],
)
@pytest.mark.parametrize("to_none", [True, False])
def test_a_closure_adds_to_what_was_there_unless_it_zeroes(
    make: Callable[[nn.Module], Any], before: bool, zeroes: bool, counts: list[Any], to_none: bool
) -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        optimizer = make(net)

        def closure() -> Tensor:
            if zeroes:
                optimizer.zero_grad(set_to_none=to_none)
            value = second(net)
            value.backward()
            return value

        for _ in range(2):
            optimizer.zero_grad(set_to_none=to_none)
            if before:
                first(net).backward()
            optimizer.step(closure)

    assert norms(watch, step=0) == norms(watch, step=1) == near(apart(*counts))
    assert set(watch.uses()["backwards"]) == {len(counts)}
    assert set(watch.uses()["mode"]) == {"full"}


def test_gradients_that_go_to_the_caller_are_let_go_of_when_their_backward_pass_is_over() -> None:
    net, held = mlp(), []
    with paramwatch.attach(net, uses=1) as watch:
        optimizer = sgd(net)
        rows = watch.recorder.splits._armed.watched.rows.values()  # type: ignore[union-attr]  # the first step is armed
        for batch in X.chunk(4):
            torch.autograd.grad(loss(net, batch), list(net.parameters()))
            held += [row.name for row in rows if row.found._arrived]
        loss(net).backward()
        optimizer.step()

    assert held == []
    assert norms(watch) == near(apart(loss))


def test_what_another_optimizer_steps_while_the_closure_runs_is_split_as_that_one_used_it() -> None:
    net = mlp()
    shared = net[2].weight
    with paramwatch.attach(net, uses=1) as watch:
        optimizer, other = (torch.optim.SGD(of, lr=0.0) for of in ([net[0].weight], [shared]))

        def closure() -> Tensor:
            net.zero_grad()
            first(net).backward()
            other.step()
            net.zero_grad()
            value = second(net)
            value.backward()
            return value

        for _ in range(2):
            optimizer.step(closure)

    assert norms(watch, step=0) == norms(watch, step=1) == near(apart(first))
