"""The truth harness over `step(closure)`: which of its evaluations counts, and what is left when it raises or is never called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, closure_of, loss_of, mlp, sgd, step_with_closures
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import paramwatch

LOW = 0.05
"""Far below the norm of every gradient."""


def positional(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, sgd(lab.model))


def keyword(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, Adam(lab.model.parameters(), lr=LR, fused=True), keyword=True)


def given_by_a_hook(lab: Lab) -> None:
    """A pre-hook gives `step` a closure, or another one than it was called with, by position and by keyword."""
    net = mlp()
    optimizer, i = sgd(net), 0
    lab.attach(net)

    def another(of: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if of is not optimizer:
            return None
        evaluate = closure_of(net, optimizer, i)
        return (args[:1], {"closure": evaluate}) if i % 2 else ((args[0], evaluate), {})

    for register in (optimizer.register_step_pre_hook, register_optimizer_step_pre_hook):
        handle = register(another)
        try:
            for i in range(4):
                with lab.by_closure(optimizer, lambda model, twin, i=i: closure_of(model, twin, i)):
                    optimizer.step(*[] if i < 2 else [closure_of(net, optimizer, 9)])
        finally:
            handle.remove()


def lbfgs(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, torch.optim.LBFGS(lab.model.parameters(), max_iter=3))


def lbfgs_with_a_line_search(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, torch.optim.LBFGS(lab.model.parameters(), max_iter=4, line_search_fn="strong_wolfe"))


def drawing_random_numbers(lab: Lab) -> None:
    lab.attach(nn.Sequential(*mlp()[:2], nn.Dropout(0.5), mlp()[2]))
    step_with_closures(lab, torch.optim.LBFGS(lab.model.parameters(), max_iter=3))


def accumulating_and_clipping(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net, momentum=0.5)
    lab.attach(net)
    for i in range(4):

        def closure(model: nn.Module, optimizer: Any, i: int = i) -> Callable[[], Tensor]:
            def evaluate() -> Tensor:
                optimizer.zero_grad()
                losses = [loss_of(model, 2 * i), loss_of(model, 2 * i + 1)]
                for loss in losses:
                    loss.backward()
                lab.raw()
                clip_grad_norm_(model.parameters(), LOW)
                return losses[0]

            return evaluate

        with lab.by_closure(optimizer, closure):
            optimizer.step(closure(net, optimizer))


# ---- closures that raise, or that nobody calls ----------------------------------------------


def _failing(net: nn.Module, optimizer: Optimizer, evaluations: int) -> Callable[[], Tensor]:
    """A closure that computes new gradients, clips them, and raises at the last of some evaluations."""
    left = evaluations

    def closure() -> Tensor:
        nonlocal left
        left -= 1
        loss = closure_of(net, optimizer, 7)()
        clip_grad_norm_(net.parameters(), LOW)
        if left == 0:
            raise ZeroDivisionError
        return loss

    return closure


def raising(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(_failing(net, optimizer, 1))
        step_with_closures(lab, optimizer, steps=2)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(_failing(net, optimizer, 1))
    net.zero_grad()
    loss_of(net, 8).backward()
    with lab.by_update(optimizer):
        optimizer.step()


def raising_after_parameters_were_moved(lab: Lab) -> None:
    net = mlp()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
    lab.attach(net)
    step_with_closures(lab, optimizer, steps=2)
    before = net[0].weight.detach().clone()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(_failing(net, optimizer, 2))
    assert not torch.equal(net[0].weight, before)
    step_with_closures(lab, optimizer, steps=2)


class Deaf(Optimizer):
    """Plain gradient descent that never calls its closure."""

    def __init__(self, params: Iterable[Tensor], frees: bool = False) -> None:
        super().__init__(params, {"lr": LR})
        self.frees = frees

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> float:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"])
        if self.frees:
            self.zero_grad()
        return 0.0


def never_called(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, Deaf(lab.model.parameters()), steps=5)


def never_called_and_gradients_are_gone(lab: Lab) -> None:
    lab.attach(mlp())
    step_with_closures(lab, Deaf(lab.model.parameters(), frees=True), steps=5)


# ---- functions that are not given as the closure ----------------------------------------------


class Asks(Optimizer):
    """Plain gradient descent with the gradients that functions compute, wherever they are given; `then` is told of the loss."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": LR})

    def step(  # type: ignore[override]  # as there are such
        self, first: Any = None, second: Any = (), *, loss_fn: Any = None, options: Any = None, then: Any = None
    ) -> float:
        asked = [*(first if isinstance(first, (list, tuple)) else [first]), *second, loss_fn, (options or {}).get("closure")]
        loss = 0.0
        for function in asked:
            if function is not None:
                loss = float(function().detach())
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=LR)
                # used up
                param.grad.zero_()
        if then is not None:
            then(loss)
        return loss


class Passes(Asks):
    """Gives its parent what it was given."""

    def step(self, *args: Any, **kwargs: Any) -> float:  # type: ignore[override]  # a closure by another name
        return super().step(*args, **kwargs)


Call = Callable[[Asks, Callable[[], Tensor]], float]

CALLS: dict[str, Call] = {
    "in a list": lambda optimizer, closure: optimizer.step([closure]),
    "in a tuple": lambda optimizer, closure: optimizer.step((closure, closure)),
    "in a dict": lambda optimizer, closure: optimizer.step(options={"closure": closure, "lines": 1}),
    "as another argument": lambda optimizer, closure: optimizer.step(None, [closure]),
    "under another name": lambda optimizer, closure: optimizer.step(loss_fn=closure),
    "after the closure": lambda optimizer, closure: optimizer.step(closure, loss_fn=closure),
    "with a function that computes nothing": lambda optimizer, closure: optimizer.step([closure], then=lambda loss: None),
}


def asked(kind: type[Asks], call: Call) -> Loop:
    def loop(lab: Lab) -> None:
        net = mlp()
        optimizer = kind(net.parameters())
        lab.attach(net)
        for i in range(5):
            with lab.by_update(optimizer):
                lab.losses.append(call(optimizer, closure_of(net, optimizer, i)))

    return loop


@pytest.mark.parametrize("kind", [Asks, Passes])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients_that_functions_compute_which_are_not_given_as_the_closure_are_those_of_the_step(kind: type[Asks], call: Call) -> None:
    verify(asked(kind, call))
    assert (verify(asked(kind, call), raw_gradients=True).watch.steps["evaluations"] == (2 if call in TWICE else 1)).all()


TWICE = [CALLS["in a tuple"], CALLS["after the closure"]]


def test_of_a_closure_that_is_not_given_to_the_step_nothing_is_known() -> None:
    class Holds(Asks):
        closure: Callable[[], Tensor]

        def step(self) -> float:  # type: ignore[override]  # a closure by another name
            return super().step.__wrapped__(self, self.closure)  # type: ignore[attr-defined,no-any-return]  # its hooks would tell

    net = mlp()
    optimizer = Holds(net.parameters())
    optimizer.closure = closure_of(net, optimizer, 0)
    with paramwatch.attach(net) as watch:
        for _ in range(2):
            optimizer.step()

    # those of the step are used up
    assert watch.frame("grad_norm").iloc[1].tolist() == [0.0] * 4


def test_what_a_step_is_given_beside_its_closure_is_as_it_was() -> None:
    """Only functions that a user wrote are others, by identity: what else a step is given may be told by it."""
    given: list[Any] = []

    class Looks(Asks):
        def step(self, *args: Any, **kwargs: Any) -> float:  # type: ignore[override]  # a closure by another name
            given.extend((*args, *kwargs.values()))
            return 0.0

    def named(x: int = 1) -> int:
        """Says so."""
        return x

    net = mlp()
    optimizer = Looks(net.parameters())
    values: tuple[Any, ...] = (1, "text", net, Adam, [1, net], {"a": 1}, Tensor.exp)
    with paramwatch.attach(net):
        optimizer.step(None, *values, loss_fn=named)
    assert all(a is b for a, b in zip(given[1:-1], values, strict=True))
    function = given[-1]
    assert (function(2), function.__name__, function.__doc__, inspect.signature(function)) == (
        2,
        "named",
        "Says so.",
        inspect.signature(named),
    )


LOOPS: dict[str, Loop] = by_name(
    given_by_a_hook,
    positional,
    keyword,
    lbfgs,
    lbfgs_with_a_line_search,
    drawing_random_numbers,
    accumulating_and_clipping,
    raising,
    raising_after_parameters_were_moved,
    never_called,
    never_called_and_gradients_are_gone,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)


@pytest.mark.parametrize(
    ("loop", "several"),
    [(positional, False), (lbfgs, True), (lbfgs_with_a_line_search, True), (never_called, None)],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_evaluations_of_the_closure_are_counted(loop: Loop, several: bool | None) -> None:
    counts = verify(loop).watch.steps["evaluations"]

    assert (counts > 1).all() if several else (counts == (0 if several is None else 1)).all()
