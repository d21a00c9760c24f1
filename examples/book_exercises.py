"""Last stop of the tour: the chapter's exercises."""

from __future__ import annotations

import copy

import pandas as pd
import torch
from book_initialisation import WAYS
from book_pages import lesson, say
from shared_mlp import batches, loss_of
from torch import Tensor, nn

import paramwatch


class FancyMLP(nn.Module):
    """A constant weight that is not a parameter, one layer used twice, and control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.rand(20, 20))
        self.linear = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = torch.relu(x @ self.constant + 1)
        x = self.linear(x)
        while x.abs().sum() > 1:
            x = x / 2
        return x.sum()


def exercises() -> None:
    all_layers_of_a_fancy_net()
    initialisers_compared()
    lesson("Exercise: a net with a shared layer, trained and observed", "That is the first example: python examples/01_shared_mlp.py")


def all_layers_of_a_fancy_net() -> None:
    lesson(
        "Exercise: access the parameters of every layer",
        "The constant is a buffer and no parameter; the layer that is used twice is one module with one name, so it is no tie: "
        "its gradient is nevertheless the sum over both uses.",
    )
    torch.manual_seed(0)
    net = FancyMLP()
    print(paramwatch.summary(net))
    first, second = gradients_of_the_uses(net, torch.rand(2, 20))
    print()
    say("gradient norm of the first use", f"{first.norm():.4f}")
    say("gradient norm of the second use", f"{second.norm():.4f}")
    say("gradient norm of their sum", f"{(first + second).norm():.4f}")
    say("gradient norm of linear.weight", f"{net.linear.weight.grad.norm():.4f}")
    with paramwatch.attach(net) as watch:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.rand(2, 20)).backward()
            optimizer.step()
    print()
    print(watch.frame(by="layer")[["param_norm", "grad_norm", "update_ratio"]].to_string())


def gradients_of_the_uses(net: FancyMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """What each use of the layer adds to its weight's gradient: the uses get a copy each, and the net its own gradient."""
    net(x).backward()
    uses = [copy.deepcopy(net.linear), copy.deepcopy(net.linear)]
    x = torch.relu(uses[0](x) @ net.constant + 1)
    x = uses[1](x)
    while x.abs().sum() > 1:
        x = x / 2
    x.sum().backward()
    # the copies were made with the gradient that was there
    return uses[0].weight.grad - net.linear.weight.grad, uses[1].weight.grad - net.linear.weight.grad


def initialisers_compared() -> None:
    lesson(
        "Exercise: initialisers, compared by their first ten steps",
        "The same net 4-32-1 on the iris data. Ten steps tell the initialisers apart: with tiny weights hardly anything has happened; "
        "with far too large ones the first loss is out of range, and single steps change a weight by a fifth. Medians over the steps:",
    )
    lines = {title: first_ten_steps(title) for title in WAYS}
    print(pd.DataFrame(lines).T.to_string(float_format="{:.3g}".format))


def first_ten_steps(title: str) -> dict[str, float]:
    """First and last loss; median gradient norm and update ratio of the first and the last weight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    WAYS[title][1](net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    with paramwatch.attach(net) as watch:
        for _, (measurements, answers) in zip(range(10), batches(), strict=False):
            optimizer.zero_grad()
            loss = loss_of(net(measurements), answers)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    gradients, ratios = watch.frame("grad_norm", parameters="*.weight"), watch.frame("update_ratio", parameters="*.weight")
    return {
        "loss 1": losses[0],
        "loss 10": losses[-1],
        "grad 0": gradients["0.weight"].median(),
        "grad 2": gradients["2.weight"].median(),
        "ratio 0": ratios["0.weight"].median(),
        "ratio 2": ratios["2.weight"].median(),
    }
