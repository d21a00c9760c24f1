"""Which steps are split: the N-th measured ones of each optimizer, as with histograms; and when hooks are there for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

import paramwatch
from paramwatch.uses import watched

X = torch.randn(8, 4, generator=torch.manual_seed(0))


def hooks() -> int:
    return len(torch_modules._global_forward_hooks) + len(torch_modules._global_forward_pre_hooks)


def twice(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.Tanh(), layer)


def two() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: twice(nn.Linear(4, 4, bias=False)) for name in "dg"})


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


@pytest.mark.parametrize(("every", "n"), [(1, 3), (2, 2), (3, 1)])
def test_splits_are_of_the_steps_that_have_histograms(every: int, n: int) -> None:
    torch.manual_seed(0)
    net = twice(nn.Linear(4, 4))
    watch = paramwatch.attach(net, every=every, uses=n, histograms=n, first_step=5)
    optimizer, armed = sgd(net), []
    for _ in range(13):
        armed.append(hooks() > 0)
        step(net, optimizer)

    split = watch.agreement().index.unique("step")
    assert list(split) == list(watch.histograms().index.unique("step")) == list(range(5, 18, every * n))
    assert armed == [i % (every * n) == 0 for i in range(13)]
    watch.close()


def test_optimizers_of_different_pace_are_counted_apart() -> None:
    nets = two()
    watch = paramwatch.attach(nets, uses=2, histograms=2)
    d, g = sgd(nets["d"]), sgd(nets["g"])
    for _ in range(6):
        for _ in range(3):
            step(nets["d"], d)
        step(nets["g"], g)

    split, binned = watch.agreement().reset_index(), watch.histograms().reset_index().query("kind == 'grad'")
    steps = {name: sorted(split[split["parameter"] == f"{name}.0.weight"]["step"].unique()) for name in "dg"}
    true = {name: sorted(binned[binned["parameter"] == f"{name}.0.weight"]["step"].unique()) for name in "dg"}
    assert steps["d"] == true["d"] == list(range(0, 18, 2))
    # that there is a second optimizer is not known before its first step
    assert steps["g"] == true["g"][1:] == [8, 14]
    assert watch.agreement()["residual"].lt(1e-6).all()
    watch.close()


def test_a_step_that_is_not_split_keeps_nothing_from_being_split_that_waits() -> None:
    """The backward pass of one optimizer comes before the steps of another."""
    nets = two()
    watch = paramwatch.attach(nets, uses=2)
    d, g = sgd(nets["d"]), sgd(nets["g"])
    for _ in range(3):
        g.zero_grad()
        nets["g"](X).square().mean().backward()
        step(nets["d"], d)
        g.step()

    assert sorted(watch.agreement().index) == [(number, f"{name}.0.weight") for number in (0, 2) for name in "dg"]
    watch.close()


def test_rows_of_no_optimizer_are_not_waited_for() -> None:
    nets = two()
    watch = paramwatch.attach(nets, uses=3)
    optimizer, armed = sgd(nets["d"]), []
    for _ in range(8):
        armed.append(hooks() > 0)
        step(nets["d"], optimizer)

    assert armed == [True, True, False, True, False, False, True, False]
    assert list(watch.agreement().index.unique("step")) == [0, 3, 6]
    watch.close()


def test_an_optimizer_that_is_gone_is_waited_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "PATIENCE", 4)
    nets = two()
    watch = paramwatch.attach(nets, uses=2)
    d, g = sgd(nets["d"]), sgd(nets["g"])
    for _ in range(2):
        step(nets["d"], d)
        step(nets["g"], g)
    del g
    armed = []
    for _ in range(10):
        armed.append(hooks() > 0)
        step(nets["d"], d)

    assert armed == [True] * 5 + [False, True, False, True, False]
    assert list(watch.agreement(parameters="d.*").index.unique("step")) == list(range(0, 12, 2))
    watch.close()


def test_at_every_step_what_is_gathered_with_does_not_pile_up() -> None:
    nets = two()
    watch = paramwatch.attach(nets, uses=1)
    d, g = sgd(nets["d"]), sgd(nets["g"])
    piled = []
    for _ in range(5):
        step(nets["d"], d)
        step(nets["g"], g)
        armed = watch.recorder.splits._armed
        piled.append(len(armed._on_nodes) + len(armed._calls))

    assert piled == [0] * 5
    watch.close()


def test_a_row_that_was_frozen_is_split_from_its_first_step_on() -> None:
    nets = two()
    net = nn.Sequential(*nets.values())
    nets["g"].requires_grad_(False)
    watch = paramwatch.attach(net, uses=1)
    optimizer = sgd(net)
    for i in range(4):
        nets["g"].requires_grad_(i >= 1)
        step(net, optimizer)

    assert list(watch.agreement(parameters="0.*").index.unique("step")) == [0, 1, 2, 3]
    assert list(watch.agreement(parameters="1.*").index.unique("step")) == [1, 2, 3]
    watch.close()
