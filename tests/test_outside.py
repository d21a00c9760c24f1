"""What changes a parameter between its steps is said, and what an optimizer does is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Lab, verify
from loops import LR, loss_of, mlp, sgd
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import paramwatch
from paramwatch import Watch

Change = Callable[[Any, Any, int], object]
"""What a loop does to its model and its optimizer after step number i."""


def messages(watch: Watch | None) -> list[str]:
    """The messages, which name the row and the two steps; each finding is at the second of them."""
    assert watch is not None
    found = watch.findings[watch.findings["rule"] == "changed_outside"]
    for line in found.itertuples():
        assert line.message.startswith(repr(line.parameter))
        assert line.message.endswith(f" and {line.step}")
    return list(found["message"])


def loop_with(change: Change, make: Callable[..., Any] = sgd, expected: bool = True, steps: int = 4) -> Callable[[Lab], None]:
    def loop(lab: Lab) -> None:
        net = mlp(dtype=torch.float32)
        optimizer = make(net.parameters())
        lab.attach(net)
        lab.expected_findings = {"changed_outside"} if expected else set()
        for i in range(steps):
            optimizer.zero_grad()
            loss_of(net, i).backward()
            with lab.by_twin(optimizer):
                optimizer.step()
            with torch.no_grad():
                change(net, optimizer, i)

    return loop


def one_element_by_one_bit(net: Any) -> None:
    net[0].weight[1, 2] = torch.nextafter(net[0].weight[1, 2], torch.tensor(9.0))


def through_data(net: Any) -> None:
    net[0].weight.data = net[0].weight.data * 2


def loaded(net: Any) -> None:
    net.load_state_dict({name: x + (name == "0.weight") for name, x in net.state_dict().items()})


def assigned(net: Any) -> None:
    net[0].weight.copy_(net[0].weight.flip(0) * 2)


@pytest.mark.parametrize("change", [one_element_by_one_bit, through_data, loaded, assigned], ids=lambda change: change.__name__)
@pytest.mark.parametrize("update", ["exact", "auto"])
def test_a_row_that_something_else_changes_is_said_with_the_steps_around_it(update: str, change: Callable[[Any], None]) -> None:
    watch = verify(loop_with(lambda net, _, i: i == 1 and change(net)), update=update).watch

    assert messages(watch) == ["'0.weight' changed outside an optimizer step between 1 and 2"]


def test_a_global_hook_after_ours_that_changes_parameters_is_none_of_the_step() -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        handle = register_optimizer_step_post_hook(lambda *_: net[0].weight.detach().mul_(2))
        try:
            for i in range(3):
                optimizer.zero_grad()
                loss_of(net, i).backward()
                optimizer.step()
        finally:
            handle.remove()

    frame = watch.frame(parameters="0.weight")
    assert frame["update_norm"].tolist() == pytest.approx([LR * norm for norm in frame["grad_norm"]])
    assert messages(watch) == ["'0.weight' changed outside an optimizer step between 0 and 1"]


def test_an_extreme_is_compared_to_the_bit_where_sums_are_not() -> None:
    net = nn.Linear(3, 500, bias=False, dtype=torch.float64)
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for i in range(3):
            loss_of(net, i).backward()
            optimizer.step()
            if i == 1:
                largest = net.weight.data.view(-1)[net.weight.argmax()]
                largest.copy_(torch.nextafter(largest, torch.tensor(9.0, dtype=torch.float64)))

    assert messages(watch) == ["'weight' changed outside an optimizer step between 1 and 2"]


def test_rows_that_change_together_are_one_finding_that_names_the_first_and_counts_the_others() -> None:
    watch = verify(loop_with(lambda net, _, i: i == 2 and (net[0].reset_parameters(), net[2].reset_parameters()))).watch

    assert messages(watch) == ["'0.weight' and 3 other rows changed outside an optimizer step between 2 and 3"]


def test_each_row_is_said_once() -> None:
    def decay(net: Any, optimizer: Optimizer, i: int) -> None:
        net[2].weight.mul_(0.9)
        if i >= 2:
            net[2].bias.mul_(0.9)
            net[0].bias.mul_(0.9)

    assert messages(verify(loop_with(decay, steps=6)).watch) == [
        "'2.weight' changed outside an optimizer step between 0 and 1",
        "'0.bias' and 1 other row changed outside an optimizer step between 2 and 3",
    ]


def test_weights_that_are_clipped_after_each_step_are_said_where_clipping_first_changes_them() -> None:
    def clip(net: Any, optimizer: Optimizer, i: int) -> None:
        net[0].weight.clamp_(-2 if i < 2 else -0.1, 2)

    assert messages(verify(loop_with(clip)).watch) == ["'0.weight' changed outside an optimizer step between 2 and 3"]


def averaged(put_back: int) -> Change:
    def change(net: Any, optimizer: Optimizer, i: int) -> None:
        own = {name: x.clone() for name, x in net.state_dict().items()}
        net.load_state_dict({name: x * 0.5 for name, x in own.items()})
        if i != put_back:
            net.load_state_dict(own)

    return change


def test_averages_are_said_where_they_are_not_swapped_out_again() -> None:
    assert messages(verify(loop_with(averaged(put_back=2))).watch) == [
        "'0.weight' and 3 other rows changed outside an optimizer step between 2 and 3"
    ]


def test_a_row_that_rests_for_some_steps_is_compared_with_its_own_last_one() -> None:
    net = nn.ModuleDict({"a": mlp(0), "b": mlp(1)})
    a, b = sgd(net["a"]), sgd(net["b"])
    watch = paramwatch.attach(net)
    for i in range(7):
        (loss_of(net["a"], i) + loss_of(net["b"], i)).backward()
        a.step()
        if i % 3 == 0:
            b.step()
        if i == 4:
            net["b"][0].weight.data.mul_(2)
            net["c"] = nn.Linear(1, 1).requires_grad_(False)

    assert messages(watch) == ["'b.0.weight' changed outside an optimizer step between 3 and 6"]


def test_a_skipped_step_leaves_what_it_found() -> None:
    net = mlp()
    optimizer = sgd(net)
    with paramwatch.attach(net) as watch:
        for i in range(4):
            loss_of(net, i).backward()
            watch.recorder.skipped(optimizer) if i % 2 else optimizer.step()
            if i == 1:
                net[2].bias.data.add_(1)

    assert watch.steps["skipped"].to_list() == [False, True, False, True]
    assert messages(watch) == ["'2.bias' changed outside an optimizer step between 1 and 2"]
