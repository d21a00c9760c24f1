"""The truth harness over plain loops: one optimizer, no closure; which gradients are there, and which rows step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, loss_of, mlp, sgd
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode


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
    frame = verify(owned_in_part).watch.frame("param_norm")

    assert {name: list(column.index[column.notna()]) for name, column in frame.items()} == {
        "0.weight": [0, 1, 2, 4, 8, 11],
        "0.bias": [0, 1, 2, 4, 8, 11],
        "2.weight": list(range(12)),
        "2.bias": list(range(12)),
    }


# ---- a large frozen base with small adapters ------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear map, with a product of two thin matrices beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
        self.down = nn.Linear(inputs, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, outputs, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Reads(TorchDispatchMode):
    """Counts the operations that are given one of these tensors, or a view of one."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.n = 0
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        self.n += any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self._memory for x in given)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_only_the_adapters_of_a_frozen_base_are_read_at_each_step(options: dict[str, Any]) -> None:
    reads: list[int] = []

    def adapters(lab: Lab) -> None:
        torch.manual_seed(0)
        # what is small is measured together, what is large by itself
        net = nn.Sequential(Adapted(3, 300), nn.Tanh(), Adapted(300, 300), nn.Tanh(), Adapted(300, 1))
        base = [param for param in net.parameters() if not param.requires_grad]
        optimizer = sgd(param for param in net.parameters() if param.requires_grad)
        lab.attach(net)
        reads.clear()
        for i in range(11):
            optimizer.zero_grad()
            (loss_of(net, i) / 256).backward()
            with lab.by_update(optimizer), Reads(base) as seen:
                optimizer.step()
            reads.append(seen.n)

    frame = verify(adapters, **options).watch.frame("param_norm")
    base = frame.loc[:, frame.columns.str.contains("base")]
    assert [step for step, n in enumerate(reads) if n] == [0, 1, 2, 4, 8]
    assert list(base.index[base.notna().all(axis=1)]) == list(base.index[base.notna().any(axis=1)]) == [0, 1, 2, 4, 8, 10]
    assert frame.drop(columns=base.columns).notna().all(axis=None)
