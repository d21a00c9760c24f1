"""The truth harness over loops that few write: averages swapped in and out, copies beside the model, threads, tensors moved about."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import LR, Lab, verify
from loops import by_name, closure_of, loss_of, mlp, sgd
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, update_bn

from paramwatch import Watch

Between = Callable[[nn.Module, Optimizer, int], object]
"""What a loop does after a step."""


def train(lab: Lab, net: nn.Module, optimizer: Optimizer, between: Between = lambda net, optimizer, i: None, twin: bool = False) -> None:
    """Three steps."""
    for i in range(3):
        closure_of(net, optimizer, i)()
        with lab.by_twin(optimizer) if twin else lab.by_update(optimizer):
            optimizer.step()
        lab.losses.append(loss_of(net, i).item())
        between(net, optimizer, i)


def an_average_beside_the_model(lab: Lab) -> None:
    net = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.BatchNorm1d(4, dtype=torch.float64), nn.Linear(4, 1, dtype=torch.float64))
    average = AveragedModel(net)
    lab.attach(net)

    def between(net: nn.Module, optimizer: Optimizer, i: int) -> None:
        average.update_parameters(net)
        update_bn([torch.ones(5, 3, dtype=torch.float64)], average)

    train(lab, net, sgd(net), between)


def an_average_swapped_in_to_validate_and_out_again(lab: Lab) -> None:
    net = mlp()
    average = [param.detach().clone() for param in net.parameters()]
    lab.attach(net)

    def swap() -> None:
        with torch.no_grad():
            for param, mean in zip(net.parameters(), average, strict=True):
                param.data, mean.data = mean.data, param.data

    def between(net: nn.Module, optimizer: Optimizer, i: int) -> None:
        torch._foreach_lerp_(average, [param.detach() for param in net.parameters()], 0.5)
        swap()
        lab.losses.append(loss_of(net, i).item())
        swap()

    train(lab, net, sgd(net), between)


def an_average_that_stays(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)
    lab.expected_findings = {"changed_outside"}

    def between(net: nn.Module, optimizer: Optimizer, i: int) -> None:
        with torch.no_grad():
            torch._foreach_mul_(list(net.parameters()), 0.5)

    train(lab, net, sgd(net), between)


def copies_that_step_beside_it(lab: Lab) -> None:
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    lab.attach(net)

    def between(net: nn.Module, optimizer: Optimizer, i: int) -> None:
        other, its = copy.deepcopy((net, optimizer))
        closure_of(other, its, i + 7)()
        its.step()

    train(lab, net, optimizer, between, twin=True)


def steps_in_threads(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    with ThreadPoolExecutor(2) as pool:
        for i in range(4):
            pool.submit(closure_of(net, optimizer, i)).result()
            with lab.by_update(optimizer):
                pool.submit(optimizer.step).result()


def gradients_that_are_views_of_one_buffer(lab: Lab) -> None:
    net = mlp()
    buffer, start = torch.zeros(sum(param.numel() for param in net.parameters()), dtype=torch.float64), 0
    for param in net.parameters():
        param.grad = buffer[start : (start := start + param.numel())].view_as(param)
    optimizer = sgd(net)
    lab.attach(net)
    for i in range(3):
        buffer.zero_()
        loss_of(net, i).backward()
        buffer.mul_(0.25)
        with lab.by_update(optimizer):
            optimizer.step()


def parameters_whose_memory_moves(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)

    def between(net: nn.Module, optimizer: Optimizer, i: int) -> None:
        for param in net.parameters():
            param.data = param.data.clone()

    train(lab, net, sgd(net), between)


def tensors_that_are_swapped(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)

    def between(net: nn.Module, optimizer: Optimizer, i: int) -> None:
        net.zero_grad()
        for param in net.parameters():
            torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone()))

    train(lab, net, sgd(net), between)


class Own(torch.optim.SGD):
    """Has a step of its own, which does not call its parent's."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # it gives no loss
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)


def a_step_of_its_own(lab: Lab) -> None:
    net = mlp()
    optimizer = Own(net.parameters(), lr=LR)
    lab.attach(net)
    train(lab, net, optimizer)


def a_state_that_is_loaded_in_the_middle(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)

    def between(net: nn.Module, optimizer: Optimizer, i: int) -> None:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    train(lab, net, torch.optim.Adam(net.parameters(), lr=LR, amsgrad=True), between, twin=True)


LOOPS = by_name(
    an_average_beside_the_model,
    an_average_swapped_in_to_validate_and_out_again,
    an_average_that_stays,
    copies_that_step_beside_it,
    steps_in_threads,
    gradients_that_are_views_of_one_buffer,
    parameters_whose_memory_moves,
    tensors_that_are_swapped,
    a_step_of_its_own,
    a_state_that_is_loaded_in_the_middle,
)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Callable[[Lab], None]) -> None:
    verify(loop, detail="full")


def test_an_average_that_was_swapped_in_and_stays_is_said_once() -> None:
    watch = verify(an_average_that_stays).watch
    assert isinstance(watch, Watch)
    (message,) = watch.findings["message"]
    assert message == "'0.weight' and 3 other rows changed outside an optimizer step between 0 and 1"
