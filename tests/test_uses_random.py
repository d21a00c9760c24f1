"""Steps made of whatever comes: passes, checkpoints, clipping, noise, zeros, failures, in any order. Uses are those of the untied twin."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_uses_edges import Raises
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paramwatch

USES = 3
ROW = "layer.weight"


class Net(nn.Module):
    """A layer that is called three times, in float64; untied there are three."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.last = (nn.Linear(n, m, dtype=torch.float64) for n, m in ((4, 6), (6, 6), (6, 2)))
        self.copies = None if tied else nn.ModuleList(copy.deepcopy(self.layer) for _ in range(USES))
        self.recomputes = self.raises = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in [self.layer] * USES if self.copies is None else self.copies:
            part = lambda h, layer=layer: torch.tanh(layer(h)) + 0.3 * h  # noqa: E731
            h = checkpoint(part, h, use_reentrant=False) if self.recomputes else part(h)
            h = Raises.apply(h) if self.raises and layer is self.layer else h
        return self.last(h)

    def parts(self) -> list[Tensor]:
        assert self.copies is not None
        return [layer.weight.grad.clone() for layer in self.copies]


def backward(net: Net, x: Tensor, **options: Any) -> None:
    net(x).square().mean().backward(**options)


def recompute(net: Net, x: Tensor) -> None:
    net.recomputes = True
    backward(net, x)
    net.recomputes = False


def twice(net: Net, x: Tensor) -> None:
    value = net(x).square().mean()
    value.backward(retain_graph=True)
    value.backward()


def fail(net: Net, x: Tensor) -> None:
    """In the tied net nothing of the layer is delivered by then."""
    net.raises = True
    if net.copies is None:
        with pytest.raises(RuntimeError, match="in the backward pass"):
            backward(net, x)
    net.raises = False


def look(net: Net, x: Tensor) -> None:
    net(x)
    with torch.no_grad():
        net(x)
    torch.autograd.grad(net(x).sum(), net.first.weight)


def clip(net: Net, x: Tensor) -> None:
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.detach() * 0.3


def add(net: Net, x: Tensor) -> None:
    """To the gradient as a whole, and so to no part of it."""
    if net.copies is None and net.layer.weight.grad is not None:
        net.layer.weight.grad.data.add_(0.01)


def zero(net: Net, x: Tensor) -> None:
    net.zero_grad(set_to_none=False)


PASSES: list[Callable[[Net, Tensor], None]] = [backward, recompute, twice]
HARMLESS: list[Callable[[Net, Tensor], None]] = [fail, look]
# not two of them in a row: what comes to a gradient that is zeroed looks like what comes to one that is not
CHANGES: list[Callable[[Net, Tensor], None]] = [clip, add, zero, look]


def train(
    net: Net, program: list[list[Callable[[Net, Tensor], None]]], twin: Net | None, zeroes: list[bool]
) -> list[tuple[list[Tensor], Tensor]]:
    """The parts and the gradient of each step."""
    optimizer, found = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    inputs = torch.randn(4, 10, 5, 4, dtype=torch.float64, generator=torch.manual_seed(1))
    for step, operations in enumerate(program):
        if zeroes[step]:
            optimizer.zero_grad()
        if twin is not None:
            for mine, other in ((net.first, twin.first), *((net.layer, layer) for layer in twin.copies), (net.last, twin.last)):  # type: ignore[union-attr]  # it is untied
                other.load_state_dict(mine.state_dict())
            twin.zero_grad()
        for operation, x in zip(operations, inputs[step], strict=False):
            operation(net, x)
            if twin is not None:
                operation(twin, x)
        if twin is not None:
            assert net.layer.weight.grad is not None
            found.append((twin.parts(), net.layer.weight.grad.clone()))
        optimizer.step()
    return found


@pytest.mark.parametrize("seed", range(12))
def test_whatever_a_step_is_made_of_its_parts_are_those_of_the_untied_twin_and_training_stays_the_same(seed: int) -> None:
    chance = random.Random(seed)
    program = [
        [
            *chance.choices(PASSES, k=1),
            *chance.choices(HARMLESS, k=chance.randint(0, 2)),
            *chance.choices(CHANGES, k=1),
            *chance.choices(HARMLESS + PASSES, k=chance.randint(0, 2)),
            backward,
        ]
        for _ in range(4)
    ]
    zeroes = [chance.random() < 0.7 for _ in program]
    net, bare = Net(True), Net(True)
    with paramwatch.attach(net, uses=1, uses_of="layer.*") as watch:
        found = train(net, program, Net(False), zeroes)
    train(bare, program, None, zeroes)

    assert not watch.recorder.splits.guard.failed  # type: ignore[union-attr]  # with `uses` there are splits
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), bare.parameters(), strict=True))
    for step, (parts, used) in enumerate(found):
        frame, missing = watch.uses().loc[(step, ROW)], used - sum(parts)
        # the first step with several passes that count, after one that had not, which the mode says
        if step and (frame["mode"] == "full, last backward").all() and (watch.uses(steps=slice(step))["backwards"] == 1).all():
            continue
        norms = [float(part.norm()) for part in parts]
        norms += [float(missing.norm())] * bool(missing.norm() > 1e-9 * used.norm())
        assert list(frame["use_norm"]) == pytest.approx(norms, rel=1e-6), (step, [each.__name__ for each in program[step]])
        assert frame["use_share"].sum() == pytest.approx(1, abs=1e-9)
        assert frame["mode"].str.startswith("full").all()
