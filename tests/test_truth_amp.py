"""The truth harness over `torch.amp.GradScaler`, with and without `unscale_`, with optimizers that unscale themselves and that do not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, loss_of, mlp
from torch import nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

SCALE = 1024.0
STEPS = 5
OVERFLOW = 2

KINDS: dict[str, type[Optimizer]] = {"SGD": SGD, "AdamW": AdamW}

AFTER_UNSCALING: dict[str, Callable[[nn.Module], object] | None] = {
    "not unscaled": None,
    "unscaled": lambda net: None,
    "unscaled and clipped": lambda net: clip_grad_norm_(net.parameters(), 0.1),
}


def _scaler(**options: Any) -> GradScaler:
    """Doubles its scale after two steps without an infinity, and halves it after one with one."""
    return GradScaler("cpu", init_scale=SCALE, growth_interval=2, **options)


def _scaled(lab: Lab, kind: str, fused: bool, unscaled: str, overflows: bool) -> None:
    net = mlp(dtype=torch.float32)
    optimizer, scaler, then = KINDS[kind](net.parameters(), lr=LR, fused=fused), _scaler(), AFTER_UNSCALING[unscaled]
    lab.attach(net)
    for i in range(STEPS):
        optimizer.zero_grad()
        scale, skipped = scaler.get_scale(), overflows and i == OVERFLOW
        loss = loss_of(net, i)
        scaler.scale(loss).backward()
        lab.losses.append(loss.item())
        if skipped:
            net[0].weight.grad[1, 1] = float("inf")
        if then is not None:
            scaler.unscale_(optimizer)
            scale = 1.0
            # torch does not even call an ordinary optimizer that it lets skip a step
            if fused or not skipped:
                lab.raw()
            then(net)
        books = _of_a_skipped_step(lab, optimizer, scale) if skipped else _of_a_step(lab, optimizer, scale)
        with books:
            scaler.step(optimizer)
        scaler.update()


def _of_a_step(lab: Lab, optimizer: Optimizer, scale: float) -> contextlib.AbstractContextManager[None]:
    def unscale(model: nn.Module) -> None:
        for param in model.parameters():
            param.grad /= scale

    return lab.by_update(optimizer) if isinstance(optimizer, SGD) else lab.by_twin(optimizer, grads=unscale)


def _of_a_skipped_step(lab: Lab, optimizer: Optimizer, scale: float) -> contextlib.AbstractContextManager[None]:
    return lab.by_nothing(optimizer, scale=scale) if optimizer.defaults["fused"] else contextlib.nullcontext()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("overflows", [False, True], ids=["finite", "with an infinity"])
@pytest.mark.parametrize("unscaled", AFTER_UNSCALING)
@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_books_agree(kind: str, fused: bool, unscaled: str, overflows: bool, options: dict[str, Any]) -> None:
    steps = verify(partial(_scaled, kind=kind, fused=fused, unscaled=unscaled, overflows=overflows), **options).watch.steps

    assert list(steps["skipped"]) == ([i == OVERFLOW and overflows for i in range(STEPS)] if fused else [False] * (STEPS - overflows))
    if fused and unscaled == "not unscaled":
        halved = [SCALE, SCALE, 2 * SCALE, SCALE, SCALE]
        assert list(steps["amp_scale"]) == (halved if overflows else [SCALE, SCALE, 2 * SCALE, 2 * SCALE, 4 * SCALE])
    else:
        assert steps["amp_scale"].isna().all()


# ---- other loops under a scaler -------------------------------------------------------------


def accumulated(lab: Lab) -> None:
    net = mlp(dtype=torch.float32)
    optimizer, scaler = SGD(net.parameters(), lr=LR, fused=True), _scaler()
    lab.attach(net)
    for i in range(6):
        scaler.scale(loss_of(net, i) / 2).backward()
        if i % 2:
            with lab.by_update(optimizer):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def two_optimizers_with_one_scaler(lab: Lab) -> None:
    net = mlp(dtype=torch.float32)
    fused, ordinary, scaler = SGD(net[0].parameters(), lr=LR, fused=True), SGD(net[2].parameters(), lr=LR), _scaler()
    lab.attach(net)
    for i in range(5):
        net.zero_grad()
        scaler.scale(loss_of(net, i)).backward()
        with lab.by_update(fused, ordinary):
            scaler.step(fused)
            scaler.step(ordinary)
        scaler.update()


def with_autocast(lab: Lab) -> None:
    net = mlp(dtype=torch.float32)
    optimizer, scaler = AdamW(net.parameters(), lr=LR), _scaler()
    lab.attach(net)
    for i in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, i)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        with lab.by_twin(optimizer):
            scaler.step(optimizer)
        scaler.update()


def switched_off(lab: Lab) -> None:
    net = mlp(dtype=torch.float32)
    optimizer, scaler = AdamW(net.parameters(), lr=LR, fused=True), _scaler(enabled=False)
    lab.attach(net)
    for i in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, i)).backward()
        with lab.by_twin(optimizer):
            scaler.step(optimizer)
        scaler.update()


LOOPS: dict[str, Loop] = by_name(accumulated, two_optimizers_with_one_scaler, with_autocast, switched_off)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree_over_other_loops(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)
