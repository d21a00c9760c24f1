"""Models that use a parameter several times, each also as its untied twin: a copy of the parameter for each use, same numbers.

The twin's ordinary gradients are the truth: the gradient of a copy is the contribution of that use, and nothing of paramwatch is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Loss = Callable[[nn.Module], Tensor]
Copies = Callable[[nn.Module], list[Tensor]]
Made = tuple[nn.Module, Loss, Copies]

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """A way of using a parameter several times."""

    name: str
    make: Callable[[bool], Made]
    row: str
    uses: tuple[str, ...]
    """Their names in the order of the forward pass."""

    def build(self, tied: bool) -> Made:
        """The model, its loss, and of the twin the parameters that stand for the uses."""
        torch.manual_seed(0)
        return self.make(tied)


def case(row: str, *uses: str) -> Callable[[Callable[[bool], Made]], Callable[[bool], Made]]:
    def add(make: Callable[[bool], Made]) -> Callable[[bool], Made]:
        name = make.__name__
        CASES[name] = Case(name, make, row, uses)
        return make

    return add


def again(module: nn.Module, tied: bool) -> nn.Module:
    return module if tied else copy.deepcopy(module)


def other(parameter: nn.Parameter, tied: bool) -> nn.Parameter:
    return parameter if tied else nn.Parameter(parameter.detach().clone())


@case("2.weight", "2", "4")
def shared_mlp(tied: bool) -> Made:
    shared = nn.Linear(8, 8)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), again(shared, tied), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(16, 4)
    return net, lambda net: net(x).square().mean(), lambda net: [net[2].weight, net[4].weight]


class TwoInputs(nn.Module):
    def __init__(self, tied: bool, uses: int) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b = again(self.a, tied)
        self.c = again(self.a, tied) if uses == 3 else nn.Identity()
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.tanh(self.c(torch.tanh(self.a(x)) * torch.tanh(self.b(y)))))


def two_inputs(tied: bool, uses: int) -> Made:
    net, x, y = TwoInputs(tied, uses), torch.randn(16, 32), torch.randn(16, 32)
    return net, lambda net: net(x, y).square().mean(), lambda net: [layer.weight for layer in (net.a, net.b, net.c)[:uses]]


@case("a.weight", "a@0", "a@1")
def a_linear_with_two_inputs(tied: bool) -> Made:
    return two_inputs(tied, 2)


@case("a.weight", "a@0", "a@1", "a@2")
def a_linear_with_three_inputs(tied: bool) -> Made:
    return two_inputs(tied, 3)


class LanguageModel(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 32)
        self.body = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 200, bias=False)
        self.lm_head.weight = other(self.embed.weight, tied)

    def forward(self, words: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.body(self.embed(words))))


@case("embed.weight", "embed", "lm_head")
def tied_head(tied: bool) -> Made:
    net, words = LanguageModel(tied), torch.randint(0, 200, (9, 8))

    def loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(words[:-1]).flatten(0, 1), words[1:].flatten())

    return net, loss, lambda net: [net.embed.weight, net.lm_head.weight]


class Autoencoder(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.enc = nn.Linear(12, 5)
        self.dec = [other(self.enc.weight, tied)]
        if not tied:
            self.back = self.dec[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.enc(x)), (self.enc.weight if self.dec[0] is self.enc.weight else self.back).t())


@case("enc.weight", "enc", "(root):mm")
def tied_autoencoder(tied: bool) -> Made:
    net, x = Autoencoder(tied), torch.randn(9, 12)
    return net, lambda net: (net(x) - x).square().mean(), lambda net: [net.enc.weight, net.back]


class Unrolled(nn.Module):
    def __init__(self, tied: bool, steps: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(6, 16)
        if not tied:
            self.cells = nn.ModuleList(copy.deepcopy(self.cell) for _ in range(steps))
        self.steps, self.out = steps, nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[1], 16)
        for t in range(self.steps):
            h = (self.cells[t] if hasattr(self, "cells") else self.cell)(x[t], h)
        return self.out(h)


@case("cell.weight_hh", *(f"cell@{t}" for t in range(20)))
def rnn_cell(tied: bool) -> Made:
    net, x = Unrolled(tied, 20), torch.randn(20, 5, 6)
    return net, lambda net: net(x).square().mean(), lambda net: [cell.weight_hh for cell in net.cells]


class Blocks(nn.Module):
    def __init__(self, tied: bool, n: int = 4) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList(again(block, tied) for _ in range(n))
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


@case("blocks.0.self_attn.in_proj_weight", *(f"blocks.0.self_attn@{i}" for i in range(4)))
def shared_attention(tied: bool) -> Made:
    net, x = Blocks(tied), torch.randn(3, 7, 16)
    return net, lambda net: net(x).square().mean(), lambda net: [block.self_attn.in_proj_weight for block in net.blocks]


@case("blocks.0.norm1.weight", *(f"blocks.0.norm1@{i}" for i in range(4)))
def shared_layer_norm(tied: bool) -> Made:
    net, x = Blocks(tied), torch.randn(3, 7, 16)
    return net, lambda net: net(x).square().mean(), lambda net: [block.norm1.weight for block in net.blocks]


class Convolutions(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = again(self.a, tied)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


@case("a.weight", "a@0", "a@1")
def shared_convolution(tied: bool) -> Made:
    net, x = Convolutions(tied), torch.randn(2, 3, 6, 6)
    return net, lambda net: net(x).square().mean(), lambda net: [net.a.weight, net.b.weight]


class Twice(nn.Module):
    """Uses its weight twice; untied it has two."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, 24) * 0.2)
        if not tied:
            self.v = nn.Parameter(self.w.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ self.w) @ getattr(self, "v", self.w))


@case("0.w", "0#0", "0#1", "1#0", "1#1")
def a_weight_used_twice_in_a_module_called_twice(tied: bool) -> Made:
    block = Twice(tied)
    net, x = nn.Sequential(block, again(block, tied)), torch.randn(8, 24)
    return net, lambda net: net(x).square().mean(), lambda net: [net[0].w, net[0].v, net[1].w, net[1].v]


class Squared(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6) * 0.3)
        if not tied:
            self.v = nn.Parameter(self.w.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w @ getattr(self, "v", self.w))


@case("w", "(root)#0", "(root)#1")
def both_operands_of_one_operation(tied: bool) -> Made:
    net, x = Squared(tied), torch.randn(4, 6)
    return net, lambda net: net(x).square().mean(), lambda net: [net.w, net.v]


class Checkpointed(nn.Module):
    def __init__(self, tied: bool, reentrant: bool) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = again(self.a, tied)
        self.first, self.last, self.reentrant = nn.Linear(4, 16), nn.Linear(16, 1), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in (self.a, self.b):
            h = checkpoint(lambda h, layer=layer: torch.tanh(layer(h)), h, use_reentrant=self.reentrant)
        return self.last(h)


def checkpointed(tied: bool, reentrant: bool) -> Made:
    net, x = Checkpointed(tied, reentrant), torch.randn(6, 4)
    return net, lambda net: net(x).square().mean(), lambda net: [net.a.weight, net.b.weight]


@case("a.weight", "a@0", "a@1")
def checkpoint_without_reentry(tied: bool) -> Made:
    return checkpointed(tied, reentrant=False)


@case("a.weight", "recompute1:a", "recompute0:a")
def checkpoint_with_reentry(tied: bool) -> Made:
    return checkpointed(tied, reentrant=True)


@case("a.weight", "a@0", "a@1", "a@2")
def autocast(tied: bool) -> Made:
    net, loss, copies = two_inputs(tied, 3)

    def cast(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(net).float()

    return net, cast, copies


class Normed(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        layer = nn.Linear(8, 8)
        if tied:
            self.a = self.b = nn.utils.parametrizations.weight_norm(layer)
        else:
            self.a, self.b = (nn.utils.parametrizations.weight_norm(copy.deepcopy(layer)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def normed(tied: bool) -> Made:
    net, x = Normed(tied), torch.randn(5, 8)
    copies: Copies = lambda net: [layer.parametrizations.weight.original1 for layer in (net.a, net.b)]  # noqa: E731
    return net, lambda net: net(x).square().mean(), copies


@case("a.parametrizations.weight.original1", "a@0", "a@1")
def weight_norm(tied: bool) -> Made:
    return normed(tied)


@case("a.parametrizations.weight.original1", "a@0", "a@1")
def weight_norm_cached(tied: bool) -> Made:
    net, loss, copies = normed(tied)

    def cached(net: nn.Module) -> Tensor:
        with nn.utils.parametrize.cached():
            return loss(net)

    return net, cached, copies


@case("0.weight", "call0:0", "call1:0")
def a_network_called_twice(tied: bool) -> Made:
    net, x, y = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(5, 8), torch.randn(5, 8)
    if tied:
        return net, lambda net: (net(x) - net(y)).square().mean(), lambda net: []
    twins = nn.ModuleList((net, copy.deepcopy(net)))
    return twins, lambda twins: (twins[0](x) - twins[1](y)).square().mean(), lambda twins: [twin[0].weight for twin in twins]


class LateAlias(nn.Module):
    """A transpose that is made before the first use, and used after it, twice."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24, bias=False)
        self.copies = nn.ParameterList() if tied else nn.ParameterList(other(self.layer.weight, tied) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        w = self.layer.weight.t()
        second, third, fourth = (lambda h: h @ w, self.layer, lambda h: h @ w) if not self.copies else self._apart()
        return fourth(torch.tanh(third(torch.tanh(second(torch.tanh(self.layer(x)))))))

    def _apart(self) -> list[Callable[[Tensor], Tensor]]:
        one, two, three = self.copies
        return [lambda h: h @ one.t(), lambda h: F.linear(h, two), lambda h: h @ three.t()]


@case("layer.weight", "layer@0", "(root):mm#0", "layer@1", "(root):mm#1")
def a_transpose_that_is_used_twice(tied: bool) -> Made:
    net, x = LateAlias(tied), torch.randn(8, 24)
    return net, lambda net: net(x).square().mean(), lambda net: [net.layer.weight, *net.copies]


class OverTime(nn.Module):
    def __init__(self, kind: str, tied: bool, steps: int) -> None:
        super().__init__()
        layer: nn.Module = getattr(nn, kind)(6, 12)
        self.layer, self.out = layer, nn.Linear(12, 1)
        if not tied:
            self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "layers"):
            return self.out(self.layer(x)[0][-1])
        h = torch.zeros(1, x.shape[1], 12)
        for t, layer in enumerate(self.layers):
            _, h = layer(x[t : t + 1], h)
        return self.out(h[0])


def over_time(kind: str, tied: bool) -> Made:
    net, x = OverTime(kind, tied, 7), torch.randn(7, 4, 6)
    return net, lambda net: net(x).square().mean(), lambda net: [layer.weight_hh_l0 for layer in net.layers]


@case("layer.weight_hh_l0", *(f"layer#{t}" for t in range(7)))
def recurrent_layer(tied: bool) -> Made:
    return over_time("RNN", tied)


@case("layer.weight_hh_l0", *(f"layer#{t}" for t in range(7)))
def gated_layer(tied: bool) -> Made:
    return over_time("GRU", tied)
