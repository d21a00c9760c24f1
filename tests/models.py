"""A menagerie of small models, one per difficulty, each with a maker of inputs and an optimizer that can train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

Optimizing = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

adam: Optimizing = partial(torch.optim.Adam, lr=0.01)
sgd: Optimizing = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """A model, an input for it, and what trains it."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    optimizer: Optimizing = adam

    def build(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The same model each time, and its optimizer, which holds all of its parameters."""
        torch.manual_seed(0)
        model = self.make()
        return model, self.optimizer(model.parameters())


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss that every model of the menagerie has: the mean square of its output, in float64."""
    out = model(batch)
    reals = torch.view_as_real(out) if out.is_complex() else out
    return reals.to(torch.float64).square().mean()


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """A maker of normal inputs."""
    return lambda: torch.randn(*shape, dtype=dtype)


def tokens() -> Tensor:
    """Ten of eleven words: the last one never occurs."""
    return torch.randint(0, 10, (5, 3))


def shared_mlp() -> nn.Sequential:
    """The book's MLP 4-8-8-8-1: one layer at two places."""
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1))


def one_parameter_in_two_modules() -> nn.Sequential:
    """Two layers with a weight in common and a bias each."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


class TiedHead(nn.Module):
    """A language model in small: the head has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.embed(words)))


def frozen_layer() -> nn.Sequential:
    """The first of two layers is not trained."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    return model


class Unused(nn.Module):
    """A layer that the forward pass leaves out: its gradient is never there."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Empty(nn.Module):
    """A parameter without elements, used and with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(x), self.nothing])


class ZeroDim(nn.Module):
    """A parameter that is one number, without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


def nested_with_spaces() -> nn.Sequential:
    """The book's nested blocks: `0.block 2.0.weight`."""
    inner = nn.Sequential()
    for i in range(3):
        inner.add_module(f"block {i}", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU()))
    return nn.Sequential(inner, nn.Linear(4, 1))


def plain(dtype: torch.dtype) -> nn.Sequential:
    """Two layers of one dtype."""
    return nn.Sequential(nn.Linear(9, 7, dtype=dtype), nn.Tanh(), nn.Linear(7, 3, dtype=dtype))


class SparseGradient(nn.Module):
    """An embedding whose gradient is sparse and, as words repeat, not coalesced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4, sparse=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.embed(words)


def channels_last() -> nn.Module:
    """Convolutions whose weights are dense and not contiguous."""
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 2)).to(memory_format=torch.channels_last)


def lazy() -> nn.Sequential:
    """Layers that get their shapes at the first forward."""
    return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2))


ODD_NAMES = ("a/b", "two\nlines", "größe λ 重み", "[0]", "a b", "ünï*?")


class OddNames(nn.Module):
    """Names that mean something to paths, patterns, tables or terminals."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.randn(4)) for name in ODD_NAMES})
        self.register_parameter("in/out\tput", nn.Parameter(torch.randn(4)))

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(self.parameters())


CASES = (
    Case("shared_mlp", shared_mlp, rows(16, 4)),
    Case("one_parameter_in_two_modules", one_parameter_in_two_modules, rows(8, 6)),
    Case("tied_head", TiedHead, tokens),
    Case("frozen_layer", frozen_layer, rows(8, 4)),
    Case("unused_layer", Unused, rows(8, 4)),
    Case("empty_tensor", Empty, rows(8, 4)),
    Case("zero_dim", ZeroDim, rows(8, 4)),
    Case("nested_with_spaces", nested_with_spaces, rows(8, 4)),
    Case("bfloat16", partial(plain, torch.bfloat16), rows(8, 9, dtype=torch.bfloat16), sgd),
    Case("float16", partial(plain, torch.float16), rows(8, 9, dtype=torch.float16), sgd),
    Case("float64", partial(plain, torch.float64), rows(8, 9, dtype=torch.float64)),
    Case("complex", partial(plain, torch.complex64), rows(8, 9, dtype=torch.complex64)),
    Case("sparse_gradient", SparseGradient, tokens, partial(torch.optim.SGD, lr=0.1)),
    Case("sparse_adam", SparseGradient, tokens, partial(torch.optim.SparseAdam, lr=0.1)),
    Case("channels_last", channels_last, lambda: torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)),
    Case("lazy", lazy, rows(8, 4)),
    Case("odd_names", OddNames, rows(8, 4)),
)
BY_NAME = {case.name: case for case in CASES}
