"""The truth harness over optimizers that hold others: what looks ahead, what combines several, what steps a wider copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, closure_of, mlp, sgd, step_with_closures
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

import paramwatch


class Lookahead(Optimizer):
    """Every other step of its base optimizer is taken half back."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups
        self.slow = [param.detach().clone() for group in self.param_groups for param in group["params"]]
        self.steps = 0

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        loss = self.base.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            with torch.no_grad():
                params = [param for group in self.param_groups for param in group["params"]]
                torch._foreach_lerp_(self.slow, params, 0.5)
                torch._foreach_copy_(params, self.slow)
        return loss


def lookahead(lab: Lab) -> None:
    net = mlp()
    optimizer = Lookahead(AdamW(net.parameters(), lr=LR))
    lab.attach(net)
    for i in range(4):
        closure_of(net, optimizer, i)()
        lab.raw()
        clip_grad_norm_(net.parameters(), 0.05)
        with lab.by_twin(optimizer):
            optimizer.step()


def lookahead_with_a_closure(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)
    step_with_closures(lab, Lookahead(SGD(net.parameters(), lr=LR)))


class Together(Optimizer):
    """One optimizer to the loop, several inside: each has parameters of its own."""

    def __init__(self, *inside: Optimizer) -> None:
        super().__init__([group for optimizer in inside for group in optimizer.param_groups], {})
        self.inside = inside

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.inside:
            optimizer.step()
        return loss


def together(lab: Lab) -> None:
    net = mlp()
    optimizer = Together(SGD(net[0].parameters(), lr=LR), AdamW(net[2].parameters(), lr=LR))
    lab.attach(net)
    for i in range(3):
        closure_of(net, optimizer, i)()
        with lab.by_twin(optimizer):
            optimizer.step()


def together_with_a_closure(lab: Lab) -> None:
    net = mlp()
    optimizer = Together(SGD(net[0].parameters(), lr=LR), AdamW(net[2].parameters(), lr=LR))
    lab.attach(net)
    step_with_closures(lab, optimizer)


def together_where_the_first_changes_gradients(lab: Lab) -> None:
    net = mlp()
    nesterov = SGD(net[0].parameters(), lr=LR, momentum=0.9, nesterov=True, foreach=True)
    optimizer = Together(nesterov, AdamW(net[2].parameters(), lr=LR))
    lab.attach(net)
    for i in range(3):
        closure_of(net, optimizer, i)()
        with lab.by_twin(optimizer):
            optimizer.step()


class MasterWeights(Optimizer):
    """Steps a copy of the parameters in a wider type, and copies back; the model's gradients are gone by then, if told so."""

    def __init__(self, params: Iterable[Tensor], frees: bool) -> None:
        super().__init__(params, {"lr": LR})
        self.held = [param for group in self.param_groups for param in group["params"]]
        self.masters = [param.detach().double().requires_grad_() for param in self.held]
        self.base = SGD(self.masters, lr=LR, momentum=0.5)
        self.frees = frees

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for master, param in zip(self.masters, self.held, strict=True):
            master.grad = param.grad.double()
            if self.frees:
                param.grad = None
        self.base.step()
        torch._foreach_copy_(self.held, self.masters)


def _master_weights(lab: Lab, frees: bool) -> None:
    net = mlp(dtype=torch.bfloat16)
    optimizer = MasterWeights(net.parameters(), frees)
    lab.attach(net)
    for i in range(3):
        closure_of(net, optimizer, i)()
        with lab.by_twin(optimizer):
            optimizer.step()


def master_weights(lab: Lab) -> None:
    _master_weights(lab, frees=False)


def master_weights_that_free_gradients(lab: Lab) -> None:
    _master_weights(lab, frees=True)


class OneByOne(Together):
    """Each of those inside evaluates the closure for itself, where the ones before it have stepped already."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        return [optimizer.step(closure) for optimizer in self.inside][-1]


def one_by_one(lab: Lab) -> None:
    net = mlp()
    optimizer = OneByOne(sgd(net[0]), sgd(net[2]))
    lab.attach(net)
    for i in range(4):
        with lab.by_update(optimizer):
            optimizer.step(closure_of(net, optimizer, i))


LOOPS: dict[str, Loop] = by_name(
    lookahead,
    lookahead_with_a_closure,
    together,
    together_with_a_closure,
    together_where_the_first_changes_gradients,
    master_weights,
    master_weights_that_free_gradients,
    one_by_one,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)


class InThreads(Together):
    """Steps those inside in another thread, and waits for them."""

    def step(self, closure: None = None) -> None:
        with ThreadPoolExecutor(1) as pool:
            list(pool.map(lambda optimizer: optimizer.step(), self.inside))


def test_parts_that_are_stepped_in_another_thread_are_steps_of_their_own() -> None:
    net = mlp()
    optimizer = InThreads(sgd(net[0]), sgd(net[2]))
    watch = paramwatch.attach(net, update="exact")
    for i in range(3):
        closure_of(net, optimizer, i)()
        optimizer.step()
    watch.close()

    updates = watch.frame("update_norm").to_numpy()
    assert len(updates) == 6
    np.testing.assert_allclose(updates[::2], updates[1::2], rtol=1e-6)
