"""Second stop of the tour: how tensors look initialised. Each way the chapter shows is applied, and `summary` says what it sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from book_pages import lesson, say, tell
from torch import nn

import paramwatch

Way: TypeAlias = Callable[[nn.Sequential], None]


def fresh() -> nn.Sequential:
    """Wider than the book's net: a distribution cannot be told from a handful of numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))


def default(net: nn.Sequential) -> None:
    pass


def gluon(net: nn.Sequential) -> None:
    for layer in (net[0], net[2]):
        nn.init.uniform_(layer.weight, -0.07, 0.07)
        nn.init.zeros_(layer.bias)


def unasked(net: nn.Sequential) -> None:
    nn.init.uniform_(net[0].weight)
    nn.init.normal_(net[2].weight)


def normal(net: nn.Sequential) -> None:
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight, mean=0, std=0.01)
        nn.init.zeros_(layer.bias)


def constant(net: nn.Sequential) -> None:
    for layer in (net[0], net[2]):
        nn.init.constant_(layer.weight, 1)
        nn.init.zeros_(layer.bias)


def xavier_and_42(net: nn.Sequential) -> None:
    nn.init.xavier_uniform_(net[0].weight)
    nn.init.constant_(net[2].weight, 42)


def custom(net: nn.Sequential) -> None:
    """U(-10, -5) or U(5, 10), each with probability 1/4, else 0."""
    with torch.no_grad():
        for layer in (net[0], net[2]):
            nn.init.uniform_(layer.weight, -10, 10)
            layer.weight *= layer.weight.abs() >= 5


def by_hand(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[0].weight += 1
        net[0].weight[0, 0] = 42


WAYS: dict[str, tuple[str, Way]] = {
    "PyTorch's default": ("What a layer draws when it is made.", default),
    "Gluon's default": ("U(-0.07, 0.07) and zero biases, whatever the shape.", gluon),
    "nn.init's defaults": ("uniform_ on one layer and normal_ on the other, asked for nothing else: U(0, 1) and N(0, 1).", unasked),
    "normal(0, 0.01)": ("Small random weights and zero biases: symmetry is broken, but signals shrink from layer to layer.", normal),
    "constant 1": (
        "All units of the hidden layer compute the same; as their biases and outgoing weights are equal, too, they get the same gradient "
        "and stay the same. The outputs start the same as well, but they are the last layer: they part if their targets differ.",
        constant,
    ),
    "Xavier and 42": ("Each layer may be initialised in its own way; not every way is a good one.", xavier_and_42),
    "a way of your own": ("Half zeros, the rest far from zero: still a distribution that can be named.", custom),
    "set by hand": ("Everything moved by 1, and one element set to 42: no standard initialisation looks like that.", by_hand),
}


def initialisation() -> None:
    lesson("Initialisation: the net", "Two layers, wider than the book's: a distribution cannot be told from a handful of numbers.")
    for name, parameter in fresh().named_parameters():
        say(name, tuple(parameter.shape))
    for title, (learned, apply) in WAYS.items():
        lesson(f"Initialisation: {title}", learned)
        net = fresh()
        apply(net)
        seen = paramwatch.summary(net)
        for name, row in seen.frame.iterrows():
            expected = "" if math.isnan(row["theoretical_std"]) else f", expected {row['theoretical_std']:.3g}"
            say(f"{name}  std {row['std']:.3g}{expected}", row["looks_like"], column=39)
        for name, warning in seen.warnings.items():
            tell(f"{name}: {warning}", indent="  ")
