"""The truth harness over plain loops: one optimizer, no closure; which gradients are there, and which rows step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, loss_of, mlp, sgd
from torch import nn
from torch.nn.utils import clip_grad_norm_


def attached_after_the_optimizer_is_made(lab: Lab) -> None:
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


def attached_before_the_optimizer_is_made(lab: Lab) -> None:
    net = mlp(dtype=torch.float32)
    lab.attach(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    for i in range(4):
        net.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        lab.losses.append(loss.item())
        with lab.by_twin(optimizer):
            optimizer.step()


def attached_in_the_middle(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net, momentum=0.5)
    for i in range(5):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        if i == 2:
            lab.attach(net)
        if i < 2:
            optimizer.step()
        else:
            with lab.by_twin(optimizer):
                optimizer.step()


# ---- zeroing, accumulating, stale gradients -------------------------------------------------


def _zeroed(lab: Lab, zero: Callable[[nn.Module, torch.optim.Optimizer], None]) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    for i in range(5):
        zero(net, optimizer)
        # every other batch reaches the first layer alone
        loss = loss_of(net, i) if i % 2 == 0 else loss_of(net[0], i)
        loss.backward()
        with lab.by_update(optimizer):
            optimizer.step()


def zeroed_to_none(lab: Lab) -> None:
    _zeroed(lab, lambda _, optimizer: optimizer.zero_grad(set_to_none=True))


def zeroed_in_place(lab: Lab) -> None:
    _zeroed(lab, lambda _, optimizer: optimizer.zero_grad(set_to_none=False))


def zeroed_in_part(lab: Lab) -> None:
    _zeroed(lab, lambda net, _: net[0].zero_grad())


def accumulated(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    for i in range(9):
        loss_of(net, i).backward()
        if i % 3 == 2:
            with lab.by_update(optimizer):
                optimizer.step()
            optimizer.zero_grad(set_to_none=i == 2)


def applied_again_while_stale(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    for i in range(2):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        lab.raw()
        clip_grad_norm_(net.parameters(), 0.05)
        for _ in range(3):
            with lab.by_update(optimizer):
                optimizer.step()


# ---- rows that do not train, and step or not ------------------------------------------------


def frozen_with_gradients_left(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    for i in range(6):
        if i == 2:
            net[0].requires_grad_(False)
        # from step 4 on the gradients that were left are gone
        (optimizer if i == 4 else net[2]).zero_grad()
        loss_of(net, i).backward()
        before = net[0].weight.detach().clone()
        with lab.by_update(optimizer):
            optimizer.step()
        assert torch.equal(net[0].weight, before) == (i >= 4)


def owned_in_part(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net[2])
    lab.attach(net)
    for i in range(12):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        with lab.by_update(optimizer):
            optimizer.step()


LOOPS: dict[str, Loop] = by_name(
    attached_after_the_optimizer_is_made,
    attached_before_the_optimizer_is_made,
    attached_in_the_middle,
    zeroed_to_none,
    zeroed_in_place,
    zeroed_in_part,
    accumulated,
    applied_again_while_stale,
    frozen_with_gradients_left,
    owned_in_part,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)


def test_rows_of_no_optimizer_are_measured_at_the_first_step_at_powers_of_two_and_at_close() -> None:
    watch = verify(owned_in_part).watch
    frame = watch.frame("param_norm")

    assert {name: list(column.index[column.notna()]) for name, column in frame.items()} == {
        "0.weight": [0, 1, 2, 4, 8, 11],
        "0.bias": [0, 1, 2, 4, 8, 11],
        "2.weight": list(range(12)),
        "2.bias": list(range(12)),
    }
    assert set(watch.frame("grad_state")["0.weight"]) == {"unowned"}
    assert list(watch.parameters["owned"]) == [False, False, True, True]
