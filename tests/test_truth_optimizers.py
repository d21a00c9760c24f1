"""The truth harness over every optimizer of torch, each in every way that runs here."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from harness import LR, Lab, verify
from loops import OPTIONS, loss_of, mlp
from torch import nn
from torch.optim import Optimizer

KINDS: dict[str, type[Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
}

WITH_A_CLOSURE = {"LBFGS"}
"""These need one, and are in `test_truth_closures`."""

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "one by one": {"foreach": False},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "differentiable": {"differentiable": True},
    "maximize": {"maximize": True},
    "maximize, foreach": {"maximize": True, "foreach": True},
    "maximize, fused": {"maximize": True, "fused": True},
    "decay": {"weight_decay": 0.25},
    "decay, foreach": {"weight_decay": 0.25, "foreach": True},
    "decay, fused": {"weight_decay": 0.25, "fused": True},
    "momentum": {"momentum": 0.5},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "nesterov, foreach": {"momentum": 0.5, "nesterov": True, "foreach": True},
    "nesterov, fused": {"momentum": 0.5, "nesterov": True, "fused": True},
    "amsgrad": {"amsgrad": True},
    "centered": {"centered": True},
    "rate is a tensor": {"lr": torch.tensor(LR)},
}


NO_ARGUMENT = "has no such argument"


def _net(name: str) -> nn.Module:
    """What this optimizer can train."""
    torch.manual_seed(0)
    if name == "SparseAdam":
        return nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)).double() if name == "Muon" else mlp()


def _backward(net: nn.Module, optimizer: Optimizer, i: int) -> None:
    if isinstance(net, nn.Embedding):
        (net(torch.tensor([i, i, 4])) - 1).square().sum().backward()
    elif optimizer.defaults.get("differentiable"):
        # torch steps such an optimizer with autograd on, which no leaf that requires a gradient can stand
        params = list(net.requires_grad_(True).parameters())
        grads = torch.autograd.grad(loss_of(net, i), params)
        net.requires_grad_(False)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
    else:
        loss_of(net, i).backward()


def _train(lab: Lab, name: str, options: dict[str, Any], steps: int = 3) -> None:
    net = _net(name)
    optimizer = KINDS[name](net.parameters(), **{"lr": LR} | options)
    lab.attach(net)
    before = [param.detach().clone() for param in net.parameters()]
    for i in range(steps):
        optimizer.zero_grad()
        _backward(net, optimizer, i)
        with lab.by_twin(optimizer):
            optimizer.step()
    assert not any(torch.equal(param, old) for param, old in zip(net.parameters(), before, strict=True))


def _refused(name: str, options: dict[str, Any]) -> str:
    """Why torch itself does not run an optimizer this way, if it does not."""
    if not inspect.signature(KINDS[name]).parameters.keys() >= options.keys():
        return NO_ARGUMENT
    try:
        _train(Lab(watched=False, options={}), name, options, steps=1)
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


REFUSED = {(name, way): _refused(name, options) for name in KINDS.keys() - WITH_A_CLOSURE for way, options in WAYS.items()}
TRIED = sorted(pair for pair, reason in REFUSED.items() if not reason)
OFTEN = ("default", "fused")
"""Ways that are tried with all options of `attach`; the others with all details."""


@pytest.mark.parametrize("name", sorted(KINDS.keys() - WITH_A_CLOSURE))
def test_torch_itself_leaves_out_nothing_but_what_needs_a_gpu(name: str) -> None:
    refused = {way: reason for way in WAYS if (reason := REFUSED[name, way]) not in ("", NO_ARGUMENT)}

    assert not REFUSED[name, "default"]
    assert refused.keys() <= {"capturable"}, refused


@pytest.mark.parametrize(
    ("name", "way", "options"),
    [
        pytest.param(name, way, options, id=f"{name}, {way}, {watched}")
        for name, way in TRIED
        for watched, options in OPTIONS.items()
        if watched == "full" or way in OFTEN
    ],
)
def test_the_books_agree(name: str, way: str, options: dict[str, Any]) -> None:
    verify(partial(_train, name=name, options=WAYS[way]), **options)
