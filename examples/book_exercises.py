"""Last stop of the tour: the chapter's exercises."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pandas as pd
import torch
from book_initialisation import WAYS
from book_pages import lesson, say, show, tell
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
    show(watch.frame(by="layer")[["param_norm", "grad_norm", "update_ratio"]])


def gradients_of_the_uses(net: FancyMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """What each use of the layer adds to its weight's gradient, which is left in the net: here each use gets a copy of its own."""
    first, second = copy.deepcopy(net.linear), copy.deepcopy(net.linear)
    net(x).backward()
    x = torch.relu(first(x) @ net.constant + 1)
    x = second(x)
    while x.abs().sum() > 1:
        x = x / 2
    x.sum().backward()
    return first.weight.grad, second.weight.grad


def initialisers_compared() -> None:
    lesson(
        "Exercise: initialisers, compared by their first ten steps",
        "One net 4-32-1, initialised in each of the ways above, on the iris data: its loss in the first and in the tenth step, and medians "
        "over the steps of the gradient's norm and of the update ratio (how far a step moves a weight, as a part of its norm), for the "
        "first weight, 0, and the last, 2.",
    )
    table = pd.DataFrame({title: first_ten_steps(title) for title in WAYS}).T
    show(table, digits=3)
    print()
    for sentence in learned_from(table):
        tell(sentence)


def learned_from(table: pd.DataFrame) -> Iterator[str]:
    """What the comparison shows, read off its numbers."""
    first, last, guess = table["loss 1"], table["loss 10"], math.log(2)
    wrong = ", ".join(map(repr, table.index[first > 2 * guess]))
    yield f"Guessing costs ln 2 = {guess:.3f}. Wrong, and sure of it (a first loss of more than twice that): {wrong or 'none'}."
    moved = (last / first - 1).abs()
    least = moved.idxmin()
    yield f"To the tenth step the loss changed least, by {moved[least]:.1%}, with {least!r}: {first[least]:.3g} became {last[least]:.3g}."
    ratios = table[["ratio 0", "ratio 2"]].stack()
    for adjective, (title, column) in (("longest", ratios.idxmax()), ("shortest", ratios.idxmin())):
        yield f"The {adjective} steps, {ratios[title, column]:.2g} of a weight's norm, are those of weight {column[-1]} with {title!r}."


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
