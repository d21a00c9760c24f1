"""The truth harness over loops that clip: what was used, and what it was before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, loss_of, mlp, sgd
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.optimizer import register_optimizer_step_pre_hook

import paramwatch

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
    _trained_in_one_buffer(lab, lambda net: clip_grad_norm_(net.parameters(), LOW))


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


@pytest.mark.parametrize("known", [True, False], ids=["parameters", "an iterator"])
def test_a_clipping_is_seen_in_whatever_thread_it_is(known: bool) -> None:
    net = mlp()
    optimizer, watch = sgd(net), paramwatch.attach(net, raw_gradients=True)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(net).backward()
        params = net.parameters()
        clip_grad_value_(list(params) if known else params, LOW / 8)
        optimizer.step()

    step()
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()

    assert (watch.frame("clip_coef") < 1).all(axis=None)


# ---- what is written between the clipping and the step --------------------------------------


def clipped_before_unscaling(lab: Lab) -> None:
    _before_unscaling(lab, fused=False)


def clipped_before_a_fused_step_unscales(lab: Lab) -> None:
    _before_unscaling(lab, fused=True)


def _before_unscaling(lab: Lab, fused: bool) -> None:
    """As Lightning does in manual optimization: the scale is in the gradients that are clipped."""
    net = mlp(dtype=torch.float32)
    optimizer, scaler = sgd(net, fused=fused), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    lab.attach(net)
    for i in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, i)).backward()
        lab.raw(scale=scaler.get_scale())
        clip_grad_norm_(net.parameters(), LOW)
        clip_grad_value_(net.parameters(), LOW / 8)
        with lab.by_update(optimizer):
            scaler.step(optimizer)
        scaler.update()


def each_micro_batch_is_clipped(lab: Lab) -> None:
    """Raw is what the last clipping found: what was clipped of the earlier ones, and all of the last."""
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    for i in range(6):
        loss_of(net, i).backward()
        if i % 2:
            lab.raw()
        clip_grad_norm_(net.parameters(), LOW)
        if i % 2:
            with lab.by_update(optimizer):
                optimizer.step()
            optimizer.zero_grad()


def of_one_buffer_layer_by_layer(lab: Lab) -> None:
    def clip(net: nn.Sequential) -> None:
        for layer in (net[0], net[2]):
            clip_grad_value_(layer.parameters(), LOW)

    _trained_in_one_buffer(lab, clip)


def _trained_in_one_buffer(lab: Lab, clip: Callable[[nn.Sequential], object]) -> None:
    net = mlp()
    optimizer = sgd(net)
    _in_one_buffer(list(net.parameters()))
    lab.attach(net)
    for i in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(net, i).backward()
        lab.raw()
        clip(net)
        with lab.by_update(optimizer):
            optimizer.step()


def _in_one_buffer(params: list[nn.Parameter]) -> None:
    sizes = [param.numel() for param in params]
    for param, part in zip(params, torch.zeros(sum(sizes), dtype=params[0].dtype).split(sizes), strict=True):
        param.grad = part.view_as(param)


WRITTEN = by_name(clipped_before_unscaling, clipped_before_a_fused_step_unscales, each_micro_batch_is_clipped, of_one_buffer_layer_by_layer)


@pytest.mark.parametrize("loop", WRITTEN.values(), ids=WRITTEN)
def test_the_books_agree_whatever_else_becomes_of_a_clipped_gradient(loop: Loop) -> None:
    lab = verify(loop, raw_gradients=True)
    assert (lab.watch.steps["clip_coef"] < 1).all()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "added to": lambda net: loss_of(net, 9).backward(),
    "copied into": lambda net: [param.grad.copy_(param.grad.flip(0)) for param in net.parameters()],
    "clipped, added to": lambda net: (clip_grad_value_(net.parameters(), LOW / 8), loss_of(net, 9).backward()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_of_a_gradient_that_somebody_else_wrote_after_its_clipping_the_raw_one_is_not_known(change: Callable[[nn.Module], object]) -> None:
    net = mlp()
    optimizer, watch = sgd(net), paramwatch.attach(net, raw_gradients=True)
    for i in range(3):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        if i != 1:
            clip_grad_norm_(net.parameters(), LOW)
            change(net)
        optimizer.step()

    for column in ("grad_raw_norm", "clip_coef"):
        assert watch.frame(column).isna().all(axis=1).tolist() == [True, False, True]
        assert watch.steps[column].isna().tolist() == [True, False, True]
