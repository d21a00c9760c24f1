"""Third stop of the tour: one tensor under several names, what follows from it, and what only looks like it."""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from book_pages import lesson, say, show, tell
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
    what_becomes_of_the_gradient()
    one_parameter_in_two_layers()
    lazily_sized_layers()
    equal_but_not_tied()
    why_sharing_is_a_good_idea()
    what_a_tied_decoder_makes_of_its_encoder()


def one_layer_twice() -> None:
    lesson("Tying: one layer at two places", "What is written through one name is read through the other: it is one tensor.")
    net = with_one_layer_twice()
    say("net[2].weight is net[4].weight", net[2].weight is net[4].weight)
    set_to_100(net[2])
    say("net[4].weight[0, 0], 100 set through net[2]", net[4].weight[0, 0].item())
    for tie in paramwatch.tie_groups(net):
        tell(tie)


def with_one_layer_twice() -> nn.Sequential:
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1))


def set_to_100(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[0, 0] = 100


def what_becomes_of_the_gradient() -> None:
    lesson(
        "Tying: what becomes of the gradient",
        "What each use contributes is added to the one gradient. `attach(net, uses=1)` keeps the terms: the norm of each, its share of the "
        "sum, and whether they pull the same way (agreement +1) or fight (-1).",
    )
    net = with_one_layer_twice()
    with paramwatch.attach(net, uses=1) as watch:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(torch.rand(2, 4)).sum().backward()
        optimizer.step()
    show(watch.uses()[["use_norm", "use_share"]].loc[0])
    print()
    show(watch.agreement()[["agreement"]].loc[0].assign(grad_norm=watch.frame("grad_norm").loc[0]))


def one_parameter_in_two_layers() -> None:
    lesson(
        "Tying: two layers that hold one Parameter",
        "Two layers, one set of tensors: the Gluon notebook's way, with `params=shared.params`.",
    )
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight, net[2].bias = net[0].weight, net[0].bias
    say("net[0] is net[2]", net[0] is net[2])
    say("net[0].weight is net[2].weight", net[0].weight is net[2].weight)
    set_to_100(net[0])
    say("net[2].weight[0, 0], 100 set through net[0]", net[2].weight[0, 0].item())
    for tie in paramwatch.tie_groups(net):
        tell(tie)


def lazily_sized_layers() -> None:
    lesson(
        "Tying: before the shape is known",
        "The same, in a net whose layers get their sizes from the first input, as in that notebook. They are tied before; "
        "their rows enter at the first step.",
    )
    shared, other = nn.LazyLinear(8), nn.LazyLinear(8)
    other.weight, other.bias = shared.weight, shared.bias
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), shared, nn.ReLU(), other, nn.ReLU(), nn.LazyLinear(10))
    with paramwatch.attach(net) as watch:
        say("rows before the first forward", len(watch.parameters))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(torch.rand(2, 20)).sum().backward()
        optimizer.step()
    say("rows after the first step", len(watch.parameters))
    set_to_100(net[2])
    say("net[4].weight[0, 0], 100 set through net[2]", net[4].weight[0, 0].item())
    for tie in watch.ties:
        tell(tie)


def equal_but_not_tied() -> None:
    lesson("Tying: equal values are not a tie", "A copy has the same values, and goes its own way as soon as one of the two is changed.")
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].load_state_dict(net[0].state_dict())
    say("equal values", torch.equal(net[0].weight, net[2].weight))
    say("tie groups", paramwatch.tie_groups(net))
    set_to_100(net[0])
    say("net[0].weight[0, 0], set to 100", net[0].weight[0, 0].item())
    say("net[2].weight[0, 0]", f"{net[2].weight[0, 0].item():.4f}")
    net[2].weight.data = net[0].weight.data
    print()
    tell("And one piece of memory under two parameters is another thing again:")
    tell(paramwatch.tie_groups(net)[0])


def why_sharing_is_a_good_idea() -> None:
    lesson(
        "Tying: why sharing is a good idea",
        "Fewer numbers to keep and to learn. A convolution looks for the same thing at every place with one kernel, where a dense layer "
        "has a weight for each pair of pixels; a recurrent cell uses one weight at every time, however long the sequence; a tied "
        "decoder or output layer uses one twice. The numbers to learn, shared or separate:",
    )
    language = nn.ModuleDict({"embed": nn.Embedding(1000, 64), "head": nn.Linear(64, 1000, bias=False)})
    language["head"].weight = language["embed"].weight
    cases: dict[str, tuple[nn.Module, int]] = {
        "CNN: Conv2d(3, 16, 3) on 32x32, or dense": (nn.Conv2d(3, 16, 3, bias=False), 3 * 32 * 32 * 16 * 30 * 30),
        "RNN: RNNCell(32, 64), or 20 cells": (nn.RNNCell(32, 64), 20 * 64 * (32 + 64 + 2)),
        "autoencoder: decoder = encoder, or own": (Autoencoder(), 2 * 64 * 16),
        "language model: output = embedding, or own": (language, 2 * 1000 * 64),
    }
    lines = {}
    for case, (net, without) in cases.items():
        shared = paramwatch.summary(net).totals.parameters
        lines[case] = {"shared": f"{shared:,}", "separate": f"{without:,}", "bytes saved": f"{4 * (without - shared):,}"}
    show(pd.DataFrame(lines).T)
    for net, _ in cases.values():
        print(f"\n{paramwatch.summary(net)}")


def what_a_tied_decoder_makes_of_its_encoder() -> None:
    lesson(
        "Tying: what a tied decoder makes of its encoder",
        "A linear autoencoder whose decoder is its encoder, transposed, reproduces most where the rows of that one weight are orthogonal "
        "and of length 1. With a decoder of its own the encoder need not be so. Both trained alike; off I is the largest element, in "
        "size, of W W^T - I:",
    )
    own = nn.Sequential(nn.Linear(64, 16, bias=False), nn.Linear(16, 64, bias=False))
    lines = {}
    for case, net in {"decoder = encoder": Autoencoder(), "decoder of its own": own}.items():
        loss = trained(net)
        weight = next(net.parameters()).detach()
        off = (weight @ weight.t() - torch.eye(16)).abs().max().item()
        lines[case] = {"loss": f"{loss:.2f}", "off I": f"{off:.0e}", "its encoder": paramwatch.summary(net).frame["looks_like"].iloc[0]}
    show(pd.DataFrame(lines).T)


def trained(net: nn.Module, steps: int = 100) -> float:
    """The squared error of an autoencoder for the unit vectors, which are as many as there are inputs; 48 of 64 cannot be reproduced."""
    units, optimizer = torch.eye(64), torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(units) - units).square().sum()
        loss.backward()
        optimizer.step()
    return loss.item()
