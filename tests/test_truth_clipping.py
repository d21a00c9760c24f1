"""The truth harness over loops that clip: what was used, and what it was before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, loss_of, mlp, sgd
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.optimizer import register_optimizer_step_pre_hook

from paramwatch.raw import RawGradients

LOW = 0.05
"""Far below the norm of every gradient."""


def _clipped(lab: Lab, clip: Callable[[nn.Module], object]) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    for i in range(4):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        loss_of(net, i + 9).backward()
        lab.raw()
        assert _norm(net) > 2 * LOW
        clip(net)
        assert _norm(net) < 2 * LOW
        with lab.by_update(optimizer):
            optimizer.step()


def by_norm(lab: Lab) -> None:
    _clipped(lab, lambda net: clip_grad_norm_(net.parameters(), LOW))


def by_norm_with_foreach(lab: Lab) -> None:
    _clipped(lab, lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), LOW, norm_type=float("inf"), foreach=True))


def by_value(lab: Lab) -> None:
    _clipped(lab, lambda net: clip_grad_value_(net.parameters(), LOW / 8))


def layer_by_layer(lab: Lab) -> None:
    _clipped(lab, lambda net: [clip_grad_norm_(layer.parameters(), LOW / 2) for layer in (net[0], net[2])])


def while_accumulating(lab: Lab) -> None:
    net = mlp(dtype=torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    lab.attach(net)
    for i in range(6):
        loss_of(net, i).backward()
        if i % 2 == 1:
            lab.raw()
            clip_grad_norm_(net.parameters(), LOW)
            with lab.by_twin(optimizer):
                optimizer.step()
            optimizer.zero_grad()


def of_one_buffer(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    buffer = torch.zeros(sum(param.numel() for param in net.parameters()), dtype=next(net.parameters()).dtype)
    for param, part in zip(net.parameters(), buffer.split([param.numel() for param in net.parameters()]), strict=True):
        param.grad = part.view_as(param)
    lab.attach(net)
    for i in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(net, i).backward()
        lab.raw()
        clip_grad_norm_(net.parameters(), LOW)
        with lab.by_update(optimizer):
            optimizer.step()


def _clip_what_it_holds(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    clip_grad_norm_([param for group in optimizer.param_groups for param in group["params"]], LOW)


def in_a_hook_of_the_optimizer(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    optimizer.register_step_pre_hook(_clip_what_it_holds)
    _by_a_hook(lab, net, optimizer)


def in_a_global_hook_after_ours(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    handle = register_optimizer_step_pre_hook(_clip_what_it_holds)
    try:
        _by_a_hook(lab, net, optimizer)
    finally:
        handle.remove()


def _by_a_hook(lab: Lab, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for i in range(3):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        lab.raw()
        assert _norm(net) > 2 * LOW
        with lab.by_update(optimizer):
            optimizer.step()
        assert _norm(net) < 2 * LOW


def _norm(net: nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([param.grad for param in net.parameters() if param.grad is not None]))


LOOPS: dict[str, Loop] = by_name(
    by_norm,
    by_norm_with_foreach,
    by_value,
    layer_by_layer,
    while_accumulating,
    of_one_buffer,
    in_a_hook_of_the_optimizer,
    in_a_global_hook_after_ours,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    lab = verify(loop, **options)

    if "raw_gradients" in options:
        assert (lab.watch.steps["clip_coef"] < 1).all()


class Elsewhere(nn.Module):
    """Stands for a parameter that another thread trains: whoever reads its gradient meanwhile may read what is gone."""

    @property
    def grad(self) -> torch.Tensor:
        raise AssertionError("its gradient was read")


@pytest.mark.parametrize("known", [True, False], ids=["parameters_are_known", "an_iterator_in_another_thread"])
def test_clipping_reads_no_gradient_of_a_model_that_another_thread_trains(known: bool) -> None:
    clipped, raw = nn.Parameter(torch.ones(2)), RawGradients()
    clipped.grad = torch.ones(2)
    raw.stepped(())
    rows: list[tuple[str, Any]] = [("clipped", clipped), ("elsewhere", Elsewhere())]

    look = partial(raw.look, rows, [clipped.grad], False, {id(clipped)} if known else None)
    if known:
        look()
    else:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert list(raw.seen) == ["clipped"] * known
