"""What an optimizer does is not taken for a change from outside, nor is what cannot be known."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import LR, Lab, verify
from loops import closure_of, loss_of, mlp, sgd
from test_outside import averaged, loop_with, messages
from torch import Tensor, nn
from torch.optim import Optimizer

import paramwatch


class TwoPasses(Optimizer):
    """Goes uphill, asks for gradients there, comes back but for rounding, and lets another optimizer step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base = torch.optim.SGD(self.param_groups, lr=LR)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        uphill = [p.grad * 0.3 for group in self.param_groups for p in group["params"]]
        self._move(uphill, 1)
        with torch.enable_grad():
            closure()
        self._move(uphill, -1)
        self.base.step()

    def _move(self, by: list[Tensor], sign: int) -> None:
        for p, step in zip((p for group in self.param_groups for p in group["params"]), by, strict=True):
            p.add_(step, alpha=sign)


@pytest.mark.parametrize("make", [TwoPasses, lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3)], ids=["two passes", "lbfgs"])
def test_optimizers_that_move_parameters_inside_their_step_are_no_one_else(make: Callable[..., Optimizer]) -> None:
    def loop(lab: Lab) -> None:
        net = mlp(dtype=torch.float32)
        optimizer = make(net.parameters())
        lab.attach(net)
        for i in range(4):
            with lab.by_closure(optimizer, lambda net, optimizer, i=i: closure_of(net, optimizer, i)):
                optimizer.step(closure_of(net, optimizer, i))

    verify(loop)


def test_what_is_put_back_to_the_same_bits_has_not_changed() -> None:
    verify(loop_with(averaged(put_back=-1), expected=False))


def test_a_parameter_that_is_not_a_number_is_equal_to_itself() -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for i in range(4):
            loss_of(net, i).backward()
            if i == 1:
                net[0].weight.grad.fill_(torch.nan)
            optimizer.step()

    assert watch.frame("param_nan")["0.weight"].to_list() == [0, 0, 12, 12]
    assert messages(watch) == []


def test_a_row_that_changes_its_form_is_a_change_of_the_inventory() -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for i, dtype in enumerate([torch.float64, torch.bfloat16, torch.float32]):
            net.to(dtype)
            loss_of(net, i).backward()
            optimizer.step()

    assert len(watch.steps) == 3
    assert watch.findings.empty


def test_elements_that_come_to_lie_in_another_order_have_not_changed() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3, dtype=torch.float64))
    with paramwatch.attach(net) as watch:
        for order in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
            net.to(memory_format=order)
            net(torch.randn(1, 16, 4, 4, dtype=torch.float64)).square().mean().backward()
            sgd(net).step()
            net.zero_grad()

    assert len(watch.steps) == 3
    assert watch.findings.empty


@pytest.mark.parametrize("options", [{"update": "sampled"}, {"update": "off"}, {"every": 2}], ids=str)
def test_where_the_end_of_a_step_is_not_known_nothing_is_said(options: dict[str, Any]) -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net, **{"update": "exact", **options}) as watch:
        for i in range(6):
            loss_of(net, i).backward()
            optimizer.step()
            net[0].weight.data.mul_(0.9)

    assert watch.findings.empty


def test_rows_of_no_optimizer_may_change_unsaid() -> None:
    net = mlp()
    optimizer = sgd(net[2])
    with paramwatch.attach(net) as watch:
        for i in range(6):
            loss_of(net, i).backward()
            optimizer.step()
            net[0].weight.data.mul_(0.9)

    assert watch.findings.empty


def test_rows_on_one_memory_are_changed_by_the_steps_of_each_other() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight.data = net[0].weight.data
    optimizers = sgd(net[0]), sgd(net[1])
    with paramwatch.attach(net) as watch:
        for i in range(3):
            loss_of(net, i).backward()
            for optimizer in optimizers:
                optimizer.step()

    assert list(watch.findings["rule"]) == ["shared_storage"]


def test_schedule_free_optimizers_move_parameters_between_their_steps_themselves() -> None:
    schedulefree = pytest.importorskip("schedulefree")

    def evaluate(net: Any, optimizer: Any, i: int) -> None:
        optimizer.eval()
        optimizer.train()

    def make(params: Any) -> Any:
        optimizer = schedulefree.AdamWScheduleFree(params, lr=LR)
        optimizer.train()
        return optimizer

    verify(loop_with(evaluate, make, expected=False))


class Moves(torch.optim.SGD):
    """Evaluates at another place than it trains at, as the schedule-free do, without their flag."""

    def eval(self) -> None:
        torch._foreach_add_([p.detach() for group in self.param_groups for p in group["params"]], 1.1)

    def train(self) -> None:
        torch._foreach_sub_([p.detach() for group in self.param_groups for p in group["params"]], 1.1)


def test_so_do_optimizers_that_can_be_set_to_train_and_to_evaluate() -> None:
    def evaluate(net: Any, optimizer: Any, i: int) -> None:
        before = net[0].weight.detach().clone()
        optimizer.eval()
        optimizer.train()
        assert not torch.equal(before, net[0].weight)

    verify(loop_with(evaluate, lambda params: Moves(params, lr=LR), expected=False))


def test_steps_that_are_none_of_the_run_change_parameters_unsaid() -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for i in range(8):
            watch.recorder.idle = lambda i=i: 2 <= i < 5
            loss_of(net, i).backward()
            optimizer.step()
        net[0].weight.data.mul_(2)
        loss_of(net).backward()
        optimizer.step()

    assert messages(watch) == ["'0.weight' changed outside an optimizer step between 4 and 5"]


@pytest.mark.parametrize("collected", [False, True])
def test_a_step_that_raises_has_changed_what_it_changed(collected: bool) -> None:
    net = mlp()
    with paramwatch.attach(net) as watch:
        for i in range(6):
            optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)
            evaluate, left = closure_of(net, optimizer, i), 2 if i % 3 == 1 else 99

            def failing(evaluate: Callable[[], Tensor] = evaluate) -> Tensor:
                nonlocal left
                left -= 1
                if left < 0:
                    raise ZeroDivisionError
                return evaluate()

            before = net[0].weight.detach().clone()
            with contextlib.suppress(ZeroDivisionError):
                optimizer.step(failing)
            assert not before.equal(net[0].weight)
            if collected:
                del optimizer, evaluate, failing
                gc.collect()

    assert len(watch.steps) == 4
    assert watch.findings.empty


class Slow(torch.optim.SGD):
    """Changes its parameters, then waits before its step is over."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=LR)
        self.changed, self.go_on = threading.Event(), threading.Event()

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.changed.set()
        assert self.go_on.wait(10)
        return result


def test_an_optimizer_that_steps_the_same_rows_in_another_thread_is_no_one_else() -> None:
    net = mlp()
    mine, slow = sgd(net), Slow(net.parameters())
    with paramwatch.attach(net) as watch:
        loss_of(net).backward()
        mine.step()
        thread = threading.Thread(target=slow.step)
        thread.start()
        assert slow.changed.wait(10)
        for _ in range(2):
            mine.step()
        slow.go_on.set()
        thread.join()
        for _ in range(2):
            mine.step()

    assert watch.findings.empty


def test_optimizers_that_share_rows_and_take_turns_are_no_one_else() -> None:
    net = mlp()
    optimizers = sgd(net), sgd(net[0]), torch.optim.Adam(net.parameters())
    with paramwatch.attach(net) as watch:
        for i in range(3):
            loss_of(net, i).backward()
            for optimizer in optimizers:
                optimizer.step()

    assert watch.findings.empty
