"""Segments of a checkpoint within segments of another: each use has a name of its own, whatever else is recomputed around it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paramwatch

Part = Callable[[Tensor], Tensor]


def nested(parts: list[Part]) -> Part:
    """Two groups of two, each recomputed, and so is each part in them."""
    return chain([segment(chain([segment(part) for part in group])) for group in (parts[:2], parts[2:])])


def mixed(parts: list[Part]) -> Part:
    """In the groups is a part that is not recomputed by itself."""
    return chain([segment(chain([parts[0], segment(parts[1])])), segment(chain([segment(parts[2]), parts[3]]))])


def deep(parts: list[Part]) -> Part:
    """Nothing but a segment in a segment, before, between and behind others."""
    first, second, third, last = parts
    return chain([segment(segment(segment(first))), segment(second), segment(segment(third)), last])


def chain(parts: list[Part]) -> Part:
    def run(x: Tensor) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    return run


def segment(part: Part) -> Part:
    def run(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(part, x, use_reentrant=True)
        return out

    return run


class Stack(nn.Module):
    def __init__(self, way: Callable[[list[Part]], Part], tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, shared = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([shared if tied else copy.deepcopy(shared) for _ in range(4)])
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Part] = [lambda x, layer=layer: torch.tanh(layer(x)) + x for layer in self.layers]  # type: ignore[misc]
        return self.way(parts)(self.first(x))


def trained(net: Stack, passes: int, **options: int) -> paramwatch.Watch:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, **options) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            for x in batches(passes):
                net(x).square().mean().backward()
            optimizer.step()
    return watch


def batches(passes: int) -> list[Tensor]:
    return list(torch.randn(passes, 5, 8, generator=torch.Generator().manual_seed(1)))


# torch asks whether there is a gradient for what is in a segment of a segment
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("way", [nested, mixed, deep])
def test_uses_in_segments_of_segments_are_apart(way: Callable[[list[Part]], Part], passes: int) -> None:
    bare, net, twin = Stack(way, True), Stack(way, True), Stack(way, False)
    trained(bare, passes)

    watch = trained(net, passes, uses=1)

    assert all(map(torch.equal, bare.parameters(), net.parameters()))
    for x in batches(passes):
        twin(x).square().mean().backward()
    uses = watch.uses().loc[(0, "layers.0.weight")]
    truth = [float(layer.weight.grad.norm()) for layer in twin.layers]
    assert sorted(uses["use_norm"]) == pytest.approx(sorted(truth), rel=1e-5)
    if way is nested:
        assert list(uses["use_norm"]) == pytest.approx(truth, rel=1e-5)
    assert uses["backwards"].eq(passes).all()
    assert uses.index.is_unique
    assert watch.agreement()["residual"].lt(1e-5).all()
