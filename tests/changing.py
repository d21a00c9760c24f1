"""What the tests of models that change in the middle of a run share: changes, steps before and after, what was said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from harness import Lab
from loops import loss_of
from torch import nn
from torch.optim import Optimizer

from paramwatch import Watch

Forms = dict[str, tuple[int, ...]]
"""The shape of each row."""

MLP: Forms = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (1, 4), "2.bias": (1,)}
"""Those of `mlp()`."""


def train(lab: Lab, net: nn.Module, *optimizers: Optimizer, first: int, n: int = 2) -> None:
    """So many rounds, each with its entry in the books."""
    for i in range(first, first + n):
        net.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        lab.losses.append(loss.item())
        with lab.by_twin(*optimizers):
            for optimizer in optimizers:
                optimizer.step()


def assert_rows(lab: Lab, *expected: tuple[int, Forms]) -> None:
    """The shapes of the rows of each stretch of steps, by its first step; each stretch after the first is an epoch of the store."""
    assert lab.watch is not None
    blocks = lab.watch._read().blocks
    for (first, forms), (end, _) in zip(expected, [*expected[1:], (len(lab.rounds), {})], strict=True):
        for step in range(first, end):
            block = [block for block in blocks if step in block.step][-1]
            assert {row.name: row.shape for row in block.inventory.rows} == forms, f"step {step}"


def step(net: nn.Module, *optimizers: Optimizer, i: int = 0) -> None:
    """The gradients of batch number i from zero, and a step of each."""
    net.zero_grad()
    loss_of(net, i).backward()
    for optimizer in optimizers:
        optimizer.step()


def assign(net: nn.Module) -> None:
    """Load copies of what is there, as new parameters."""
    net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True)


@contextmanager
def conversion(mode: str) -> Iterator[None]:
    """Torch's three ways to convert a module."""
    setters = {"overwrite": torch.__future__.set_overwrite_module_params_on_conversion}
    setters["swap"] = torch.__future__.set_swap_module_params_on_conversion
    switch = setters.get(mode, bool)
    switch(True)
    try:
        yield
    finally:
        switch(False)


def overwrite(net: nn.Module) -> None:
    """Convert to float32, by new parameters."""
    net.zero_grad()
    with conversion("overwrite"):
        net.to(torch.float32)


def said(watch: Watch | None, rule: str) -> list[tuple[int, str, str]]:
    """What a rule said: step, parameter, message."""
    assert watch is not None
    found = watch.findings[watch.findings["rule"] == rule]
    return [(line.step, line.parameter, line.message) for line in found.itertuples()]
