"""Weights that are computed from parameters by what must run but once: training is as it was, and uses are apart where they can be."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import paramwatch

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Rounds(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return (w * 16).round() / 16

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Rounds.calls += 1
        return grad


class Rounded(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        out: Tensor = Rounds.apply(w)
        return out


class Scaled(nn.Module):
    """The parameter enters in two places."""

    def forward(self, w: Tensor) -> Tensor:
        return w / w.square().sum().sqrt()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, w: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda w: torch.tanh(w * 2).sin(), w, use_reentrant=self.use_reentrant)
        return out


def by(parametrization: nn.Module) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", parametrization)


def network(norm: Callable[[nn.Module], nn.Module], tied: bool, recomputed: bool, cached: bool) -> nn.Module:
    """A layer that is used twice, and an ordinary one as well."""
    torch.manual_seed(0)
    layer, plain = norm(nn.Linear(8, 8)), nn.Linear(8, 8)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = layer, layer if tied else copy.deepcopy(layer)
            self.c = self.d = plain

        def forward(self, x: Tensor) -> Tensor:
            if cached:
                with parametrize.cached():
                    return self.segments(x)
            return self.segments(x)

        def segments(self, x: Tensor) -> Tensor:
            for part in (self.a, self.b):
                segment = lambda x, part=part: torch.tanh(part(x))  # noqa: E731
                x = checkpoint(segment, x, use_reentrant=False) if recomputed else segment(x)
            out: Tensor = self.d(torch.tanh(self.c(x)))
            return out

    return Network()


def trained(net: nn.Module, steps: int = 2, **options: Any) -> tuple[list[Tensor], paramwatch.Watch]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, **options) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()], watch


def weights(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_parameters() if "original" in name]


APART = [
    ("weight_norm", parametrizations.weight_norm, True),
    ("orthogonal", parametrizations.orthogonal, True),
    ("entering twice", by(Scaled()), True),
    ("checkpoint inside", by(Checkpointed(False)), False),
    ("reentrant checkpoint inside", by(Checkpointed(True)), False),
    ("written in Python", by(Rounded()), False),
    ("written in Python, recomputed", by(Rounded()), True),
]


@pytest.mark.parametrize(("norm", "recomputed"), [case[1:] for case in APART], ids=[case[0] for case in APART])
def test_uses_of_what_must_be_run_but_once_are_apart_and_training_is_as_it_was(
    norm: Callable[[nn.Module], nn.Module], recomputed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    Rounds.calls = 0
    bare, _ = trained(network(norm, True, recomputed, False))
    calls, Rounds.calls = Rounds.calls, 0
    watched, watch = trained(network(norm, True, recomputed, False), uses=1)

    assert all(map(torch.equal, bare, watched))
    assert Rounds.calls == calls
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    twin = network(norm, False, recomputed, False)
    twin(X).square().mean().backward()
    for name in weights(twin.a):
        truth = [float(part.get_parameter(name).grad.norm()) for part in (twin.a, twin.b)]
        assert list(watch.uses().loc[(0, f"a.{name}"), "use_norm"]) == pytest.approx(truth, rel=1e-4)
    assert watch.agreement()["residual"].lt(1e-5).all()
    assert watch.agreement()["use_count"].eq(2).all()


TOGETHER = [
    ("weight_norm", parametrizations.weight_norm, True),
    ("entering twice", by(Scaled()), True),
    ("checkpoint inside", by(Checkpointed(False)), False),
    ("reentrant checkpoint inside", by(Checkpointed(True)), False),
    ("written in Python", by(Rounded()), False),
]


@pytest.mark.parametrize(("norm", "inside"), [case[1:] for case in TOGETHER], ids=[case[0] for case in TOGETHER])
def test_what_is_computed_once_for_several_uses_and_must_not_be_run_for_each_is_one_use_by_name(
    norm: Callable[[nn.Module], nn.Module], inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> nn.Module:
        net = network(norm, True, False, True)
        if inside:
            # all of it is one segment, in which the weight is computed once
            forward = net.forward
            net.forward = lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]
        return net

    bare, _ = trained(make())
    watched, watch = trained(make(), uses=1)

    assert all(map(torch.equal, bare, watched))
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "inside 'parametrization' cannot be told apart" in said
    assert "Without torch.nn.utils.parametrize.cached()" in said
    uses = watch.uses()
    for row in {row for _, row, _ in uses.index if "original" in row}:
        (name,) = uses.loc[(1, row)].index
        assert name.endswith(" [merged in parametrization]")
    assert len(uses.loc[(1, "c.weight")]) == 2
    assert watch.agreement()["residual"].lt(1e-5).all()


Made = Callable[..., Tensor]
Used = Callable[[Tensor, Tensor], Tensor]


class Computed(nn.Module):
    """What plain operations compute from a parameter, and perhaps two thin ones, is used twice."""

    def __init__(self, tied: bool, made: Made, used: Used) -> None:
        super().__init__()
        torch.manual_seed(0)
        thin = (torch.randn(8, 2), torch.randn(2, 8)) if made.__code__.co_argcount > 1 else ()
        self.first = nn.ParameterList((torch.rand(8, 8) + 0.1, *thin))
        self.second = self.first if tied else copy.deepcopy(self.first)
        self.made, self.used = made, used

    def forward(self, x: Tensor) -> Tensor:
        first = self.made(*self.first)
        second = first if self.first is self.second else self.made(*self.second)
        return self.used(torch.tanh(self.used(x, first)), second)


PLAIN: dict[str, Made] = {
    "normalized": lambda w: nn.functional.normalize(w, dim=1),
    "standardized": lambda w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True),
    "scaled": lambda w: w * 0.5,
    "layer_norm": lambda w: nn.functional.layer_norm(w, (8,)),
    "exp": lambda w: torch.exp(w),
    "square": lambda w: w * w,
}
PRODUCTS: dict[str, Made] = {
    "low rank": lambda w, b, a: w + 0.5 * b @ a,
    "low rank, scaled later": lambda w, b, a: torch.addmm(w, b, a) * 0.5,
    "w @ w": lambda w: w @ w,
}
LINEAR: Used = lambda x, w: nn.functional.linear(x, w)  # noqa: E731
ELEMENTS: Used = lambda x, w: (x[:, None] * w).mean(1)  # noqa: E731
LEFT: Used = lambda x, w: (w @ x.t()).t()  # noqa: E731

SEEN = [
    *((f"{name} as a weight", made, LINEAR, False) for name, made in (PLAIN | PRODUCTS).items()),
    *((f"{name} by elements", made, ELEMENTS, False) for name, made in PLAIN.items()),
    ("scaled on the left", PLAIN["scaled"], LEFT, False),
    ("low rank under autocast", PRODUCTS["low rank"], LINEAR, True),
]


TELLS = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"),
    reason="this torch does not tell what is saved through hooks: the uses of what is computed once are one, which is said",
)


def used_twice(made: Made, used: Used, cast: bool = False) -> tuple[paramwatch.Watch, Computed]:
    net, twin = Computed(True, made, used), Computed(False, made, used)
    with paramwatch.attach(net, uses=1) as watch:
        for each in (net, twin):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                found = each(X)
            found.float().square().mean().backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    return watch, twin


@TELLS
@pytest.mark.parametrize(("made", "used", "cast"), [case[1:] for case in SEEN], ids=[case[0] for case in SEEN])
def test_uses_of_what_plain_operations_compute_once_are_apart(made: Made, used: Used, cast: bool, caplog: pytest.LogCaptureFixture) -> None:
    watch, twin = used_twice(made, used, cast)

    uses = watch.uses()
    for i, pair in enumerate(zip(twin.first, twin.second, strict=True)):
        assert uses.loc[(0, f"first.{i}"), "use_norm"].tolist() == pytest.approx([float(w.grad.norm()) for w in pair], rel=1e-4)
    assert not caplog.records


@TELLS
@pytest.mark.parametrize("used", [ELEMENTS, LEFT])
@pytest.mark.parametrize("made", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_of_parameters_that_is_used_several_times_and_not_as_a_weight_is_said(
    made: Made, used: Used, caplog: pytest.LogCaptureFixture
) -> None:
    watch, _ = used_twice(made, used)

    (said,) = [record.getMessage() for record in caplog.records]
    assert "inside 'product' cannot be told apart" in said
    assert "Computed anew for each use they can" in said
    assert watch.uses().index.get_level_values("use").str.contains(r" \[merged in product\]").all()
    assert watch.agreement()["residual"].lt(1e-5).all()


class Ordinary(nn.Module):
    """A layer on learned inputs, on data, and on what came of both; a scale, and a place for each moment."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.places, self.scale = (nn.Parameter(torch.randn(size)) for size in ((1, 16, 8), (1, 16, 8), (8,)))
        self.layer = self.again = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        learned = self.layer(self.inputs)
        learned = learned + torch.tanh(self.again(learned))
        x = torch.stack([x, 2 * x]) * self.scale + self.places
        for _ in range(2):
            h = self.layer(x)
            x = x + nn.functional.scaled_dot_product_attention(h, learned.expand_as(h), learned.expand_as(h))
        return x


def test_a_layer_on_learned_inputs_is_used_where_it_is_called(caplog: pytest.LogCaptureFixture) -> None:
    _, watch = trained(Ordinary(), steps=1, uses=1, uses_of="*")

    uses = watch.uses()
    assert list(uses.loc[(0, "layer.weight")].index) == [f"layer@{i}" for i in range(4)]
    assert set(uses.index.get_level_values("parameter")) == {"layer.weight", "layer.bias"}
    assert not caplog.records


class Temperature(nn.Module):
    """A number that is trained, as in CLIP."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.layer = nn.Parameter(torch.tensor(0.3)), nn.Linear(8, 8)
        self.second = self.first if tied else nn.Parameter(torch.tensor(0.3))
        nn.init.eye_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first.exp()
        second = first if self.first is self.second else self.second.exp()
        return torch.cat([first * self.layer(x), second * x.sin()])


@TELLS
def test_uses_of_a_single_number_are_apart() -> None:
    net, twin = Temperature(True), Temperature(False)
    twin.load_state_dict(net.state_dict())
    _, watch = trained(net, steps=1, uses=1)
    twin(X).square().mean().backward()

    assert watch.uses()["use_norm"].tolist() == pytest.approx([float(w.grad.norm()) for w in (twin.first, twin.second)])
