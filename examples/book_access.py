"""First stop of the tour: reaching parameters, by layer, by target, all at once, and in nested blocks."""

from __future__ import annotations

import textwrap

import torch
from book_pages import WIDTH, lesson, say
from torch import nn

import paramwatch


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())


def nested() -> nn.Sequential:
    """Four blocks, called `block 0` to `block 3`, and a layer on top."""
    blocks = nn.Sequential()
    for i in range(4):
        blocks.add_module(f"block {i}", block())
    return nn.Sequential(blocks, nn.Linear(4, 1))


def access() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    lesson("Access: one layer", "A layer's parameters are its state: names and tensors.")
    print(textwrap.fill(str(net[2].state_dict()), WIDTH))

    lesson("Access: one target", "A parameter is an object with a value and a gradient; before the first backward there is no gradient.")
    say("type(net[2].bias)", type(net[2].bias).__name__)
    say("net[2].bias.data", net[2].bias.data)
    say("net[2].weight.grad", net[2].weight.grad)

    lesson("Access: all at once", "One line for each tensor, below the module that holds it.")
    print(paramwatch.summary(net))

    lesson("Access: nested blocks", "Names follow the nesting, spaces and all; an index and a row name lead to the same tensor.")
    rgnet = nested()
    inputs = torch.rand(2, 4)
    with paramwatch.attach(rgnet) as watch:
        optimizer = torch.optim.SGD(rgnet.parameters(), lr=0.1)
        rgnet(inputs).sum().backward()
        optimizer.step()
    say("rows", len(watch.parameters))
    say("names", ", ".join(map(repr, watch.parameters.index[:2])) + ", ...")
    row = watch.frame(parameters="0.block 1.0.bias").iloc[0]
    say("norm of rgnet[0][1][0].bias.grad", f"{rgnet[0][1][0].bias.grad.norm():.6f}")
    say("grad_norm of '0.block 1.0.bias'", f"{row['grad_norm']:.6f}, and the step moved it by {row['update_norm']:.6f}")
    table = watch.frame("grad_norm", by=2).round(6)
    print("\nThe gradient norm of each block, from watch.frame('grad_norm', by=2):\n")
    print(table.to_string())
