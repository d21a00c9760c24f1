"""Models that are no longer what they were when a split step was prepared: what is called then is split all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_uses_edges import X, loss, near, sgd
from torch import nn

import paramwatch


def lazy() -> nn.Sequential:
    shared = nn.LazyLinear(8)
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), shared, nn.Tanh(), shared, nn.LazyLinear(1))


def plain() -> nn.Sequential:
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(8, 1))


def gives_shapes(net: nn.Sequential) -> None:
    with torch.no_grad():
        net(X)


def replaces(net: nn.Sequential) -> None:
    net[2] = net[4] = nn.Linear(8, 8)


def converts(net: nn.Sequential) -> None:
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    net[4].weight, net[4].bias = net[2].weight, net[2].bias


def thaws(net: nn.Sequential) -> None:
    net[2].requires_grad_(True)


def frozen() -> nn.Sequential:
    net = plain()
    net[2].requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("make", "change"),
    [(lazy, gives_shapes), (lazy, lambda net: None), (plain, replaces), (plain, converts), (frozen, thaws)],
    ids=["lazy", "lazy, at once", "replaced", "assigned", "thawed"],
)
def test_a_model_that_changes_before_a_split_step_is_split_in_it(
    make: Callable[[], nn.Sequential], change: Callable[[nn.Sequential], None], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net = make()
    watch = paramwatch.attach(net, uses=1)
    change(net)
    value = loss(net)
    twin = copy.deepcopy(net)
    twin[4] = copy.deepcopy(net[2])
    loss(twin).backward()
    value.backward()
    sgd(net).step()
    watch.close()

    assert watch.uses().loc[(0, "2.weight"), "use_norm"].to_dict() == near(
        {name: float(twin[int(name)].weight.grad.norm()) for name in "24"}
    )
    assert watch.agreement()["residual"].lt(1e-6).all()
    assert not [line for line in caplog.messages if "split" in line]


def test_what_was_gathered_before_a_layer_was_replaced_is_kept() -> None:
    """A model may change between two forward passes of one step."""
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(4, 1))
    watch = paramwatch.attach(net, uses=1, uses_of="*")
    twin = copy.deepcopy(net)
    twin[2] = copy.deepcopy(twin[0])
    for model in (net, twin):
        loss(model).backward()
        model[3] = nn.Identity()
        loss(model).backward()
    sgd(net).step()
    watch.close()

    assert watch.uses().loc[(0, "0.weight"), "use_norm"].to_dict() == near(
        {name: float(twin[int(name)].weight.grad.norm()) for name in "02"}
    )
    assert set(watch.uses()["backwards"]) == {2}


@pytest.mark.parametrize("uses_of", ["*", "tied"])
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize(("n", "freed"), [(3, 0), (3, 1), (3, 2), (4, 1)], ids=str)
def test_a_tie_that_loses_a_member_before_a_split_step_is_split_rightly_in_it(n: int, freed: int, uses: int, uses_of: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(n)))
    for layer in net[1:]:
        layer.weight = net[0].weight
    optimizer = sgd(net)
    watch = paramwatch.attach(net, uses=uses, uses_of=uses_of)
    for step in range(3):
        if step == 2:
            net[freed].weight = nn.Parameter(net[freed].weight.detach().clone())
            optimizer.add_param_group({"params": [net[freed].weight]})
        apart = [layer.weight.detach().clone().requires_grad_() for layer in net]
        out = X
        for weight in apart:
            out = out @ weight.T
        true = torch.autograd.grad(out.square().mean(), apart)
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    watch.close()

    left = [i for i in range(n) if i != freed]
    found = watch.uses()["use_norm"].loc[2, f"{left[0]}.weight"]
    assert found.index.tolist() == [str(i) for i in left]
    assert found.tolist() == pytest.approx([true[i].norm().item() for i in left], rel=1e-5)
    assert watch.findings["rule"].tolist() == ["tie_broken"]
