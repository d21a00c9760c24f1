"""Splits under what hostile loops do: each contribution is still that of a twin with a copy of the weight for each use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.checkpoint import checkpoint
from untied import assert_contributions, multiplied, multiplied_for
from used_models import other, shared_mlp

import paramwatch
from paramwatch import ParamWatchError, Watch, attached
from paramwatch.testing import ListSink

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def mlp(tied: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return shared_mlp(tied)[0]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def norms(watch: Watch, row: str = "2.weight", step: int = 0) -> dict[str, float]:
    """By use, of a gradient that was found in them."""
    assert not watch.recorder.splits.guard.failed  # type: ignore[union-attr]  # with `uses` there are splits
    assert watch.agreement().loc[(step, row), "residual"] < 1e-6
    return dict(watch.uses().loc[(step, row), "use_norm"])


def apart(*losses: Callable[[nn.Module], Tensor]) -> dict[str, float]:
    """Of the MLP's shared weight by use, summed over some losses."""
    twin = mlp(tied=False)
    for loss in losses:
        loss(twin).backward()
    return {name: float(twin[int(name)].weight.grad.norm()) for name in "24"}


def loss(net: nn.Module, x: Tensor = X) -> Tensor:
    return net(x).square().mean()


def near(truth: dict[str, float]) -> Any:
    return pytest.approx(truth, rel=1e-5)


# ---- what comes between -----------------------------------------------------------------------


def forgotten_by_zeros(net: nn.Module, optimizer: Any) -> None:
    """Batches that were thought better of."""
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for batch in (X[:8], X[:4]):
        (5 * loss(net, batch)).backward()
    optimizer.zero_grad(set_to_none=False)


def forgotten(net: nn.Module, optimizer: Any) -> None:
    (5 * loss(net, X[:8])).backward()
    optimizer.zero_grad()


def looked_at(net: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        net(X)
    with torch.inference_mode():
        net(X)
    net(X)


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("in the backward pass")


def left_by_an_exception(net: nn.Module, optimizer: Any) -> None:
    with pytest.raises(RuntimeError, match="in the backward pass"):
        loss(net[4:], Raises.apply(net[:4](X))).backward()
    with pytest.raises(KeyboardInterrupt):
        nn.Sequential(net, Interrupts())(X)
    optimizer.zero_grad()


def interrupted(net: nn.Module, optimizer: Any) -> None:
    """As a cell of a notebook is, in the middle of a forward pass."""

    def interrupt(module: nn.Module, inputs: Any) -> None:
        raise KeyboardInterrupt

    hook = net[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(X)
    hook.remove()


class Interrupts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def hooked(net: nn.Module, optimizer: Any) -> None:
    """Others' hooks, which put operations of their own around a module."""
    net[2].register_full_backward_hook(lambda module, before, after: None)
    net[4].register_full_backward_pre_hook(lambda module, grads: None)
    net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].clone(),))
    net[2].register_forward_hook(lambda module, inputs, output: output * 1)


@pytest.mark.parametrize("before", [forgotten_by_zeros, forgotten, looked_at, left_by_an_exception, interrupted, hooked])
def test_what_comes_before_a_backward_pass_is_none_of_its_uses(before: Callable[..., None]) -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        optimizer = sgd(net)
        before(net, optimizer)
        loss(net).backward()
        optimizer.step()

    assert norms(watch) == near(apart(loss))
    assert not torch_modules._global_forward_hooks


def test_two_losses_are_summed_by_name_and_in_one_backward_pass_told_apart() -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        one, two = net(X[:8]).square().mean(), net(X[8:]).abs().mean()
        one.backward()
        two.backward()
        optimizer.step()
        optimizer.zero_grad()
        (net(X[:8]).square().mean() + net(X[8:]).abs().mean()).backward()
        optimizer.step()

    first, second = (lambda net: loss(net, X[:8])), (lambda net: net(X[8:]).abs().mean())
    assert norms(watch) == near(apart(first, second))
    called = {f"call{i}:{use}": norm for i, each in enumerate((first, second)) for use, norm in apart(each).items()}
    assert norms(watch, step=1) == near(called)


def test_two_watches_of_one_model_both_see_all_of_its_calls(tmp_path: Path) -> None:
    net = mlp()
    one = paramwatch.attach(net, tmp_path / "one", uses=1)
    with attached.beside([one]), one, paramwatch.attach(net, tmp_path / "two", uses=1) as two:
        (loss(net, X[:8]) + loss(net, X[8:])).backward()
        sgd(net).step()

    assert len(norms(one)) == 4
    assert two.uses().equals(one.uses())


def test_optimizers_that_step_in_the_backward_pass_are_split() -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(Steps(parameter))
        for _ in range(2):
            loss(net).backward()

    assert norms(watch) == near(apart(loss))
    assert len(norms(watch, step=1)) == 2


class Steps:
    def __init__(self, parameter: nn.Parameter) -> None:
        self.optimizer = torch.optim.SGD([parameter], lr=0.1)

    def __call__(self, parameter: Tensor) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


# of a cycle, which is cut by `zero_grad`
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_backward_passes_that_make_graphs_of_their_own_are_split() -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        for _ in range(2):
            for batch in X.chunk(2):
                loss(net, batch).backward(create_graph=True)
            optimizer.step()
            optimizer.zero_grad()

    first, second = (lambda net: loss(net, X[:8])), (lambda net: loss(net, X[8:]))
    assert list(watch.uses()["mode"].unique()) == ["full"]
    assert norms(watch, step=0) == norms(watch, step=1) == near(apart(first, second))


def test_a_validation_before_a_split_step_is_not_kept() -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        loss(net[:3]).backward()
        (calls,) = watch.recorder.splits._armed._calls.values()  # type: ignore[union-attr]  # armed, as `uses` asks
        noted = len(calls)
        with torch.no_grad():
            for _ in range(5):
                net(X)
                net[:3](X)
        assert len(calls) == noted == 3
        net.zero_grad()
        loss(net).backward()
        sgd(net).step()

    assert norms(watch) == near(apart(loss))


def test_of_forward_passes_whose_graph_is_gone_no_more_than_the_latest_calls_are_known() -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        value, known = loss(net), []
        (calls,) = watch.recorder.splits._armed._calls.values()  # type: ignore[union-attr]  # armed, as `uses` asks
        for _ in range(50):
            net(X)
            known.append(len(calls))
        watch.root(value)
        value.backward()
        sgd(net).step()

    assert known[-1] == known[20] == 18 * 8
    assert norms(watch) == near(apart(loss))


# ---- what a model may do ----------------------------------------------------------------------


class Chain(nn.Module):
    """Calls a layer many times, by calling itself."""

    def __init__(self, tied: bool, uses: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.copies = None if tied else nn.ModuleList(copy.deepcopy(self.layer) for _ in range(uses))
        self.uses = uses

    def forward(self, x: Tensor, i: int = 0) -> Tensor:
        layer = self.layer if self.copies is None else self.copies[i]
        x = x + 0.1 * torch.tanh(layer(x))
        return x if i + 1 == self.uses else self(x, i + 1)


@pytest.mark.parametrize("uses", [3, 70])
def test_a_module_may_call_itself_also_more_often_than_pairs_are_multiplied(uses: int) -> None:
    net, twin = Chain(True, uses), Chain(False, uses)
    with paramwatch.attach(net, uses=1, uses_of="*") as watch:
        loss(net).backward()
        sgd(net).step()
    loss(twin).backward()

    assert twin.copies is not None
    grads = torch.stack([layer.weight.grad.double().flatten() for layer in twin.copies])
    assert norms(watch, "layer.weight") == near({f"layer@{i}": float(grad.norm()) for i, grad in enumerate(grads)})
    cosines = torch.corrcoef(torch.cat([grads, -grads], 1))
    weights = torch.outer(grads.norm(dim=1), grads.norm(dim=1)).fill_diagonal_(0)
    expected = float((cosines * weights).sum() / weights.sum())
    assert watch.agreement().loc[(0, "layer.weight"), "agreement"] == pytest.approx(expected, rel=1e-5)
    if uses > 64:
        with pytest.raises(ParamWatchError, match="has 70 uses"):
            watch.use_cosines("layer.weight", 0)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "w + w": lambda w, v, x: x @ (w + v),
    "w * w": lambda w, v, x: x @ (w * v),
    "cat": lambda w, v, x: x @ torch.cat([w, v], 1),
    "slices": lambda w, v, x: x[:, :2] @ w[:2] + x[:, 2:] @ v[2:],
    "einsum": lambda w, v, x: torch.einsum("bi,ij,jk->bk", x, w, v),
    "in place": lambda w, v, x: (x @ w).add_(v.sum()),
    "rows of a transpose": lambda w, v, x: x[:, :2] @ w.t()[:2] + x[:, 2:] @ v.t()[2:],
    "two forms": lambda w, v, x: x @ w.t().contiguous() + torch.relu(x @ v.view(4, 4).mT),
}


class Operation(nn.Module):
    def __init__(self, name: str, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.v = other(self.w, tied)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return OPERATIONS[self.name](self.w, self.v, x)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_takes_a_weight_twice_has_two_uses(name: str) -> None:
    net, twin = Operation(name, True), Operation(name, False)
    with paramwatch.attach(net, uses=1) as watch:
        loss(net).backward()
        sgd(net).step()
    loss(twin).backward()

    assert list(norms(watch, "w").values()) == pytest.approx([float(p.grad.norm()) for p in (twin.w, twin.v)], rel=1e-5)
    assert set(watch.uses()["mode"]) == {"full"}


def test_what_rounds_in_a_type_between_is_not_unattributed() -> None:
    """As where a weight is made coarse, once for two uses."""
    w = nn.Parameter(torch.randn(4, 4, generator=torch.manual_seed(0)))
    net = nn.ParameterDict({"w": w})
    with paramwatch.attach(net, uses=1, uses_of="*") as watch:
        coarse = w.bfloat16().float()
        value = (torch.tanh(X @ coarse) @ coarse).square().mean()
        watch.root(value)
        value.backward()
        sgd(net).step()

    assert 1e-5 < watch.agreement()["residual"].iloc[0] < 1e-2
    assert list(watch.uses().index.get_level_values("use")) == ["(outside)#0", "(outside)#1"]


class Recomputed(nn.Module):
    """A layer that is called twice in each of two checkpoints, with dropout, and once beside them."""

    def __init__(self, tied: bool, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.copies = None if tied else nn.ModuleList(copy.deepcopy(self.layer) for _ in range(5))
        self.drop, self.reentrant = nn.Dropout(0.5), reentrant

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.layer] * 5 if self.copies is None else self.copies
        h = self.first(x)
        for one, two in ((0, 1), (2, 3)):
            segment = lambda h, one=one, two=two: self.drop(torch.tanh(layers[two](self.drop(layers[one](h)))))  # noqa: E731
            h = checkpoint(segment, h, use_reentrant=self.reentrant)
        return self.last(layers[4](h))


@pytest.mark.parametrize(
    ("reentrant", "uses"),
    [
        (False, ["layer@0", "layer@1", "layer@2", "layer@3", "layer@4"]),
        # what is recomputed has names of its own, the last segment first
        (True, ["layer@4", "recompute1:layer", "recompute1:layer#1", "recompute0:layer", "recompute0:layer#1"]),
    ],
)
def test_checkpoints_with_dropout_beside_a_plain_call_are_split_and_draw_the_same(reentrant: bool, uses: list[str]) -> None:
    net, twin, bare = Recomputed(True, reentrant), Recomputed(False, reentrant), Recomputed(True, reentrant)
    with paramwatch.attach(net, uses=1, uses_of="layer.*") as watch:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            for each in (net, twin, bare):
                torch.manual_seed(1)
                each.zero_grad()
                loss(each).backward()
            optimizer.step()

    assert twin.copies is not None
    truth = [float(layer.weight.grad.norm()) for layer in twin.copies]
    truth = [truth[4], *truth[:4]] if reentrant else truth
    for step in range(2):
        assert norms(watch, "layer.weight", step) == near(dict(zip(uses, truth, strict=True)))
        assert list(watch.uses().loc[(step, "layer.weight"), "mode"].unique()) == ["full"]
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(net.parameters(), bare.parameters(), strict=True))


class Nested(nn.Module):
    """A checkpoint in a checkpoint."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.copies = None if tied else nn.ModuleList(copy.deepcopy(self.layer) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = [self.layer] * 3 if self.copies is None else self.copies

        def outer(h: Tensor) -> Tensor:
            inner = checkpoint(lambda h: torch.tanh(two(h)), torch.tanh(one(h)), use_reentrant=True)
            return torch.tanh(three(inner))

        return checkpoint(outer, self.first(x), use_reentrant=True)


# the part that is run first has nothing to compute a gradient for yet
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_checkpoint_in_a_checkpoint_has_uses_of_its_own() -> None:
    net, twin = Nested(True), Nested(False)
    with paramwatch.attach(net, uses=1, uses_of="layer.*") as watch:
        loss(net).backward()
        sgd(net).step()
    loss(twin).backward()

    assert twin.copies is not None
    one, two, three = (float(layer.weight.grad.norm()) for layer in twin.copies)
    assert norms(watch, "layer.weight") == near({"recompute1:layer": two, "recompute0:layer": one, "recompute0:layer#1": three})


@pytest.mark.parametrize("kind", ["spectral_norm", "orthogonal"])
def test_a_weight_that_enters_what_it_is_computed_from_twice_has_one_use_in_each_call(kind: str) -> None:
    torch.manual_seed(0)
    layer = getattr(nn.utils.parametrizations, kind)(nn.Linear(4, 4))
    # without power iterations, which would differ from copy to copy
    net, twin = (nn.Sequential(layer, nn.Tanh(), other).eval() for other in (layer, copy.deepcopy(layer)))
    assert_parametrized_as_untied(net, twin)


def assert_parametrized_as_untied(net: nn.Sequential, twin: nn.Sequential) -> None:
    """The two uses of a computed weight contribute what the two weights of the twin get."""
    loss(twin).backward()
    truth = {name: float(twin[int(name)].parametrizations.weight.original.grad.norm()) for name in "02"}
    twin.zero_grad()
    with paramwatch.attach(net, uses=1) as watch:
        loss(net).backward()
        sgd(net).step()

    assert norms(watch, "0.parametrizations.weight.original") == near(truth)


class Powers(nn.Module):
    """Enters what is computed from it in 2^30 ways."""

    def forward(self, w: Tensor) -> Tensor:
        for _ in range(30):
            w = w @ w / (w.norm() + 1) + 0.1 * w
        return w


def test_a_weight_that_enters_in_very_many_ways_takes_no_longer_than_in_one() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Powers())
    net, twin = (nn.Sequential(layer, nn.Tanh(), other) for other in (layer, copy.deepcopy(layer)))
    assert_parametrized_as_untied(net, twin)


@dataclass(slots=True)
class Output:
    """What some models return: a dataclass without a `__dict__`, and an object that leads back to itself."""

    hidden: Any
    me: Any = None


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


def circular(y: Tensor) -> Output:
    found = Output({"y": [y]})
    found.me = [found] * 50
    return found


def test_outputs_are_found_in_whatever_holds_them() -> None:
    net = Returns(circular)
    with paramwatch.attach(net, uses=1) as watch:
        net(X).hidden["y"][0].square().mean().backward()
        sgd(net).step()

    assert norms(watch, "inner.2.weight") == near({f"inner.{use}": norm for use, norm in apart(loss).items()})


# ---- what comes after the model ---------------------------------------------------------------


class Lends(nn.Module):
    """Hands out its weight: transposed, or computed from another."""

    def __init__(self, way: str, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        if way == "computed":
            nn.utils.parametrize.register_parametrization(self.layer, "weight", nn.Tanh())
        self.again = self.layer if tied else copy.deepcopy(self.layer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.again.weight.t()


@pytest.mark.parametrize("way", ["transposed", "computed"])
@pytest.mark.parametrize("named", [True, False])
def test_a_weight_that_a_model_hands_out_is_used_by_who_uses_it(way: str, named: bool) -> None:
    net, twin = Lends(way, True), Lends(way, False)
    row = "layer.weight" if way == "transposed" else "layer.parametrizations.weight.original"
    with paramwatch.attach(net, uses=1) as watch:
        for each in (net, twin):
            y, w = each(X)
            # outside of any call
            value = y.square().mean() + w.square().mean() + each.again.weight.sum()
            if named and each is net:
                watch.root(value)
            value.backward()
        sgd(net).step()

    inside, outside = (each.get_parameter(row.removeprefix("layer.")).grad for each in (twin.layer, twin.again))
    uses = watch.uses().loc[(0, row)]
    assert list(uses.index) == ["layer", *(["(outside)#0", "(outside)#1"] if named else ["(unattributed)"])]
    assert uses["use_norm"].iloc[0] == pytest.approx(float(inside.norm()), rel=1e-5)
    share = float((outside * (inside + outside)).sum() / (inside + outside).square().sum())
    assert uses["use_share"].iloc[1:].sum() == pytest.approx(share, rel=1e-4)


def test_what_one_call_makes_of_a_weight_for_another_is_used_there() -> None:
    net = nn.ModuleDict({"lends": Lends("transposed", True), "uses": nn.Bilinear(4, 4, 1)})
    with paramwatch.attach(net, uses=1, uses_of="lends.*") as watch:
        y, w = net["lends"](X[:4])
        net["uses"](y, w).sum().backward()
        sgd(net).step()

    assert list(norms(watch, "lends.layer.weight")) == ["lends.layer", "uses:trilinear"]


def test_names_are_not_told_by_the_order_of_a_forward_that_was_put_in_place_of_its_own() -> None:
    net = mlp()
    net.forward = lambda x: net[6](net[2](torch.tanh(net[4](net[0](x)))))  # type: ignore[method-assign]
    with paramwatch.attach(net, uses=1) as watch:
        loss(net).backward()
        sgd(net).step()

    assert list(norms(watch)) == ["2@0", "2@1"]


class Through(torch.autograd.Function):
    """A layer whose backward pass has a weight of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(x, back)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, back = ctx.saved_tensors
        return grad @ back, grad.t() @ x, grad.sum(0), None


class Apart(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.back = copy.deepcopy(layer), nn.Parameter(layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Through.apply(x, self.layer.weight, self.layer.bias, self.back)
        return found


def smooth(tied: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    one, other = (layer, layer) if tied else (Apart(layer), Apart(layer))
    return nn.Sequential(one, nn.Tanh(), other, nn.Tanh(), nn.Linear(4, 1))


def penalised(net: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    out = net(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + (slope.norm() - 1).square()


def test_uses_of_a_gradient_penalty_are_those_of_a_twin_with_weights_of_their_own_for_the_slope() -> None:
    net, twin, sink = smooth(True), smooth(False), ListSink()
    with multiplied() as seen, paramwatch.attach(net, uses=1, sinks=[sink]) as watch:
        found = penalised(net)
        watch.root(found)
        found.backward()
        sgd(net).step()
    penalised(twin).backward()

    # the slope is computed from the last layer on
    forward, slope = [twin[0].layer, twin[2].layer], [twin[2].back, twin[0].back]
    (record,) = sink.records
    truth = {"0.weight": [*(layer.weight.grad for layer in forward), *(w.grad for w in slope)], "0.bias": [b.bias.grad for b in forward]}
    assert record.uses["0.weight"].uses == ("0", "2", "(outside)#0", "(outside)#1")
    for row, parts in truth.items():
        gradient = net.get_parameter(row).grad
        assert_contributions(record.uses[row], *multiplied_for(gradient, seen), parts, gradient)


class Cut(nn.Module):
    """A cell over ten moments, its graph cut after five of them; the state before the cut is returned or only kept."""

    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.cell, self.returns = nn.RNNCell(4, 4), returns

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [torch.zeros(len(x), 4)]
        for i in range(10):
            states.append(self.cell(x, states[-1].detach() if i == 5 else states[-1]))
        self.kept = states[5]
        return (states[-1], self.kept) if self.returns else (states[-1],)


def test_what_only_a_root_leads_to_comes_in_the_order_of_the_forward_pass_and_is_called_as_its_call_is() -> None:
    found = []
    for returns in (True, False):
        torch.manual_seed(0)
        net = Cut(returns)
        watch = paramwatch.attach(net, uses=1, uses_of="cell.weight_hh")
        value = torch.zeros(())
        for x in (X, 2 * X):
            value = value + net(x)[0].square().mean() + net.kept.square().mean()
        watch.root(value)
        value.backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        found.append((watch.uses(), watch.agreement()))
        watch.close()

    (uses, agreement), (by_root, agreement_by_root) = found
    assert list(uses.index.get_level_values("use")) == [f"call{call}:cell@{i}" for call in (0, 1) for i in range(10)]
    pd.testing.assert_frame_equal(by_root, uses)
    pd.testing.assert_frame_equal(agreement_by_root, agreement)


@pytest.mark.parametrize("calls", [(1, 2), (2, 1)])
def test_a_pass_in_which_a_parameter_is_used_once_is_counted(calls: tuple[int, int]) -> None:
    net = nn.Linear(4, 4)
    watch = paramwatch.attach(net, uses=1, uses_of="*")
    for times in calls:
        x = X
        for _ in range(times):
            x = net(x).tanh()
        x.square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()

    assert set(watch.uses()["backwards"]) == {2}
    watch.close()


def test_of_forward_passes_whose_graph_is_gone_no_handle_is_kept() -> None:
    net = mlp()
    with paramwatch.attach(net, uses=1) as watch:
        armed = watch.recorder.splits._armed  # type: ignore[union-attr]  # armed, as `uses` asks
        kept = []
        for _ in range(4):
            found = net(X)
            kept.append(len(armed._on_nodes))
        del found

    # the last one is gone only after the next one is there
    assert 0 < kept[0] < kept[1]
    assert kept[1:] == [kept[1]] * 3
