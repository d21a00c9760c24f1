"""Third stop of the tour: one tensor under several names, what follows from it, and what only looks like it."""

from __future__ import annotations

import textwrap

import torch
import torch.nn.functional as F
from book_pages import WIDTH, lesson, say
from torch import Tensor, nn

import paramwatch


class Autoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed: a tie that only the forward pass knows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x), self.encoder.weight.t())


def tying() -> None:
    torch.manual_seed(0)
    one_layer_twice()
    one_parameter_in_two_layers()
    lazily_sized_layers()
    equal_but_not_tied()
    why_sharing_is_a_good_idea()


def one_layer_twice() -> None:
    lesson("Tying: one layer at two places", "What is written through one name is read through the other: it is one tensor.")
    shared = nn.Linear(8, 8)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[2].weight[0, 0] = 100
    say("net[4].weight[0, 0], set to 100 through net[2]", net[4].weight[0, 0].item())
    for tie in paramwatch.tie_groups(net):
        print(tie)


def one_parameter_in_two_layers() -> None:
    lesson(
        "Tying: two layers that hold one Parameter",
        "Two layers, one set of tensors: the Gluon notebook's way, with `params=shared.params`.",
    )
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight, net[2].bias = net[0].weight, net[0].bias
    say("net[0] is net[2]", net[0] is net[2])
    print(*paramwatch.tie_groups(net), sep="\n")


def lazily_sized_layers() -> None:
    lesson(
        "Tying: before the shape is known",
        "Lazy layers are tied before their first forward; their row enters at the first step.",
    )
    net = nn.Sequential(nn.LazyLinear(8, bias=False), nn.ReLU(), nn.LazyLinear(8, bias=False))
    net[2].weight = net[0].weight
    with paramwatch.attach(net) as watch:
        say("rows before the first forward", len(watch.parameters))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(torch.rand(2, 8)).sum().backward()
        optimizer.step()
    say("rows after the first step", len(watch.parameters))
    print(*watch.ties, sep="\n")


def equal_but_not_tied() -> None:
    lesson("Tying: equal values are not a tie", "A copy has the same values, and goes its own way as soon as one of the two is changed.")
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].load_state_dict(net[0].state_dict())
    say("equal values", torch.equal(net[0].weight, net[2].weight))
    say("tie groups", paramwatch.tie_groups(net))
    with torch.no_grad():
        net[0].weight[0, 0] = 100
    say("net[0].weight[0, 0], set to 100", net[0].weight[0, 0].item())
    say("net[2].weight[0, 0]", f"{net[2].weight[0, 0].item():.4f}")
    net[2].weight.data = net[0].weight.data
    print("\nAnd one piece of memory under two parameters is another thing again:")
    print(textwrap.fill(str(paramwatch.tie_groups(net)[0]), WIDTH))


def why_sharing_is_a_good_idea() -> None:
    lesson(
        "Tying: why sharing is a good idea",
        "Fewer numbers to keep and to learn. A convolution uses one kernel at every place where a dense layer has a weight for each "
        "pair of pixels; a recurrent cell uses one weight at every time; a tied output layer or decoder uses one twice.",
    )
    language = nn.ModuleDict({"embed": nn.Embedding(1000, 64), "head": nn.Linear(64, 1000, bias=False)})
    language["head"].weight = language["embed"].weight
    cases: dict[str, tuple[nn.Module, int]] = {
        "CNN: Conv2d(3, 16, 3) on 32 x 32, or dense": (nn.Conv2d(3, 16, 3, bias=False), 3 * 32 * 32 * 16 * 30 * 30),
        "RNN: RNNCell(32, 64), or 20 cells": (nn.RNNCell(32, 64), 20 * 64 * (32 + 64 + 2)),
        "autoencoder 64-16-64, decoder = encoder^T": (Autoencoder(), 2 * 64 * 16),
        "language model, embedding = output": (language, 2 * 1000 * 64),
    }
    for case, (net, without) in cases.items():
        shared = paramwatch.summary(net).totals.parameters
        say(case, f"{shared:,} numbers for {without:,}: {4 * (without - shared):,} bytes saved")
    for net, _ in cases.values():
        print(f"\n{paramwatch.summary(net)}")
