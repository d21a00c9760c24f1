"""The truth harness over plain loops: one optimizer, no closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import loss_of, mlp, sgd
from torch import nn


def plain(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    for i in range(4):
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        lab.losses.append(loss.item())
        with lab.by_update(optimizer):
            optimizer.step()


def adam(lab: Lab) -> None:
    net = mlp(dtype=torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    lab.attach(net)
    for i in range(4):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        lab.raw()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        with lab.by_twin(optimizer):
            optimizer.step()


def lbfgs(lab: Lab) -> None:
    net = mlp()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
    lab.attach(net)
    for i in range(4):

        def closure(net: nn.Module, optimizer: torch.optim.Optimizer, i: int = i) -> Callable[[], Any]:
            def evaluate() -> Any:
                optimizer.zero_grad()
                loss = loss_of(net, i)
                loss.backward()
                return loss

            return evaluate

        with lab.by_closure(optimizer, closure):
            optimizer.step(closure(net, optimizer))


LOOPS: dict[str, Loop] = {loop.__name__: loop for loop in (plain, adam, lbfgs)}
OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "full": {"detail": "full", "raw_gradients": True}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)
