"""What the compiled library says of a model's structure, against the lists of `sight`, which are its specification."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import shared_mlp
from torch import nn

from paramwatch.measure import native
from paramwatch.measure.structure import Structure
from paramwatch.sight import Sight

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler: there is no library that could be asked")


def tree() -> nn.Sequential:
    """Modules inside modules, one of them in two places, and a parameter beside them."""
    net = nn.Sequential(shared_mlp(), nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()), nn.BatchNorm1d(3))
    net.register_parameter("scale", nn.Parameter(torch.ones(2)))
    net[1].append(net[1][0])
    return net


def rename(net: nn.Sequential) -> None:
    net[1]._modules["other"] = net[1]._modules.pop("0")


def swap(net: nn.Sequential) -> None:
    net._modules["0"], net._modules["1"] = net[1], net[0]


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "nothing": lambda net: None,
    "frozen": lambda net: net[1][0][0].weight.requires_grad_(False),
    "data": lambda net: setattr(net[1][0][0].weight, "data", torch.zeros(2, 2)),
    "parameter replaced": lambda net: setattr(net[1][0][0], "weight", nn.Parameter(torch.zeros(2, 2))),
    "parameter gone": lambda net: setattr(net[2], "weight", None),
    "parameter added": lambda net: net[2].register_parameter("more", nn.Parameter(torch.zeros(1))),
    "parameter deleted": lambda net: delattr(net, "scale"),
    "parameter under another name": lambda net: net[2]._parameters.update(other=net[2]._parameters.pop("bias")),
    "module added to one that had none": lambda net: net[1][1].add_module("more", nn.ReLU()),
    "parameter added to one that had none": lambda net: net[1][1].register_parameter("more", nn.Parameter(torch.ones(1))),
    "module added": lambda net: net.append(nn.ReLU()),
    "module replaced by one like it": lambda net: net[1].__setitem__(1, nn.ReLU()),
    "module gone": lambda net: net.__delitem__(2),
    "module under another name": rename,
    "modules in another order": swap,
    "no dictionary": lambda net: object.__setattr__(net[2], "_parameters", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_says_what_the_lists_say(change: Callable[[nn.Sequential], object]) -> None:
    net = tree()
    sight, structure = Sight(net.modules(), [*net.parameters()]), Structure.of([*net.modules()])
    assert structure is not None
    assert structure.is_there()
    change(net)
    if net[-1]._parameters is not None:
        assert structure.is_there() == (sight.look_at_lists() is not None and not sight.has_grown())
    assert structure.is_there() == (change in (CHANGES["nothing"], CHANGES["frozen"], CHANGES["data"]))


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20), st.integers(0, 11), st.data())
def test_any_modules_inside_any_others_are_looked_at(edges: list[tuple[int, int]], last: int, data: st.DataObject) -> None:
    modules = [nn.Module() for _ in range(12)]
    for one, other in edges:
        if one < other:
            modules[one]._modules[str(other)] = modules[other]
    some = [module for module in modules if data.draw(st.booleans())]
    sight, structure = Sight(some, []), Structure.of(some)
    assert structure is not None
    modules[last]._modules["more"] = nn.ReLU()
    assert structure.is_there() == sight.is_there() == (modules[last] not in some)


def test_it_holds_nothing_and_what_is_gone_is_not_there() -> None:
    net = tree()
    structure = Structure.of([*net.modules()])
    counts = [gc.get_referrers(module) for module in net.modules()]
    assert structure is not None
    assert not any(other is structure._held or other is structure for referrers in counts for other in referrers)
    del counts
    below = net[1]
    part = Structure.of([*below.modules()])
    del net, below
    gc.collect()
    assert part is not None
    assert not structure.is_there()
    assert not part.is_there()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_no_dictionary_of_its_own_is_left_to_the_lists() -> None:
    class Shy(nn.Module):
        def __getattribute__(self, name: str) -> object:
            return {} if name == "_parameters" else super().__getattribute__(name)

    circle = nn.Sequential(nn.Sequential())
    circle[0]._modules["0"] = circle
    assert Structure.of([torch.jit.script(nn.Linear(1, 1))]) is None
    assert Structure.of([Shy()]) is None
    assert Structure.of([circle, circle[0]]) is None
