"""First stop of the tour: reaching parameters, by layer, by target, all at once, and in nested blocks."""

from __future__ import annotations

import torch
from book_pages import lesson, say, show, tell
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

    lesson("Access: one layer", "A layer's parameters are its state: names and tensors. This is net[2].state_dict():")
    tell(net[2].state_dict())

    lesson("Access: one target", "A parameter is an object with a value and a gradient; before the first backward there is no gradient.")
    say("type(net[2].bias)", type(net[2].bias).__name__)
    say("net[2].bias", net[2].bias)
    say("net[2].bias.data", net[2].bias.data)
    say("net[2].weight.grad", net[2].weight.grad)

    lesson("Access: all at once", "One line for each tensor, below the module that holds it; and each tensor by its name.")
    print(paramwatch.summary(net))
    print()
    for name, parameter in net.named_parameters():
        say(name, tuple(parameter.shape))
    say("net.state_dict()['2.bias']", net.state_dict()["2.bias"])

    lesson("Access: nested blocks", "Names follow the nesting, spaces and all; an index and a row name lead to the same tensor.")
    rgnet = nested()
    inputs = torch.rand(2, 4)
    before = rgnet[0][1][0].bias.detach().clone()
    with paramwatch.attach(rgnet) as watch:
        optimizer = torch.optim.SGD(rgnet.parameters(), lr=0.1)
        rgnet(inputs).sum().backward()
        optimizer.step()
    bias = rgnet[0][1][0].bias
    say("rows", len(watch.parameters))
    say("the first", repr(watch.parameters.index[0]))
    say("the last", repr(watch.parameters.index[-1]))
    say("rgnet[0][1][0].bias.data", bias.data)
    row = watch.frame(parameters="0.block 1.0.bias").iloc[0]
    print()
    tell("One step of gradient descent, seen through both:")
    print()
    say("norm of rgnet[0][1][0].bias before", f"{before.norm():.6f}")
    say("param_norm of '0.block 1.0.bias'", f"{row['param_norm']:.6f}")
    say("norm of rgnet[0][1][0].bias.grad", f"{bias.grad.norm():.6f}")
    say("grad_norm of '0.block 1.0.bias'", f"{row['grad_norm']:.6f}")
    say("how far the bias moved", f"{(bias - before).norm():.6f}")
    say("update_norm of '0.block 1.0.bias'", f"{row['update_norm']:.6f}")
    say("lr in optimizer.state_dict()", optimizer.state_dict()["param_groups"][0]["lr"])
    say("lr of '0.block 1.0.bias'", row["lr"])
    print()
    tell("Gradient norms by block, from watch.frame('grad_norm', by=2):")
    print()
    show(watch.frame("grad_norm", by=2).T)
