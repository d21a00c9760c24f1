"""The truth harness over models that change in the middle of a run: the books agree before and after, and rows follow their names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from changing import MLP, Forms, assert_rows, assign, conversion, step, train
from harness import LR, Lab, verify
from loops import by_name, loss_of, mlp, sgd
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import paramwatch
from paramwatch import Watch

# ---- layers ---------------------------------------------------------------------------------


def a_layer_of_another_shape(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    net[0], net[2] = nn.Linear(3, 7, dtype=torch.float64), nn.Linear(7, 2, dtype=torch.float64)
    train(lab, net, sgd(net), first=2)
    if lab.watched:
        assert_rows(lab, (0, MLP), (2, {"0.weight": (7, 3), "0.bias": (7,), "2.weight": (2, 7), "2.bias": (2,)}))


def a_layer_added_with_a_group(lab: Lab) -> None:
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    lab.attach(net)
    train(lab, net, optimizer, first=0)
    net.insert(0, nn.Linear(3, 3, dtype=torch.float64))
    optimizer.add_param_group({"params": net[0].parameters(), "lr": LR / 2})
    train(lab, net, optimizer, first=2)
    if lab.watched:
        shifted: Forms = {"0.weight": (3, 3), "0.bias": (3,), "1.weight": (4, 3), "1.bias": (4,), "3.weight": (1, 4), "3.bias": (1,)}
        assert_rows(lab, (0, MLP), (2, shifted))


def a_layer_removed(lab: Lab) -> None:
    net = mlp()
    net.add_module("last", nn.Linear(1, 1, dtype=torch.float64))
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    del net.last
    train(lab, net, sgd(net), first=2)
    if lab.watched:
        assert_rows(lab, (0, MLP | {"last.weight": (1, 1), "last.bias": (1,)}), (2, MLP))


def a_layer_without_its_bias(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    net[0].bias = None
    train(lab, net, sgd(net), first=2)
    if lab.watched:
        assert_rows(lab, (0, MLP), (2, {name: MLP[name] for name in MLP if name != "0.bias"}))


def layers_thawed_one_by_one(lab: Lab) -> None:
    net = mlp()
    net[0].requires_grad_(False)
    optimizer = sgd(net[2])
    lab.attach(net)
    train(lab, net, optimizer, first=0)
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": net[0].parameters()})
    train(lab, net, optimizer, first=2)
    if lab.watched:
        assert_rows(lab, (0, MLP))


def layers_and_their_optimizers_one_after_the_other(lab: Lab) -> None:
    net = mlp()
    body, head = sgd(net[0]), sgd(net[2])
    lab.attach(net)
    train(lab, net, body, head, first=0)
    net[2] = nn.Linear(4, 2, dtype=torch.float64)
    train(lab, net, body, head := sgd(net[2]), first=2)
    net[0] = nn.Linear(3, 4, dtype=torch.float64)
    # of the same shape, with other elements
    lab.expected_findings = {"changed_outside"}
    train(lab, net, sgd(net[0]), head, first=4)


def a_layer_in_front_with_an_optimizer_beside_two(lab: Lab) -> None:
    net = mlp()
    two = sgd(net[0]), sgd(net[2])
    lab.attach(net)
    train(lab, net, *two, first=0)
    net.insert(0, nn.Linear(3, 3, dtype=torch.float64))
    train(lab, net, *two, sgd(net[0]), first=2)


def a_layer_trained_by_itself(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    net.requires_grad_(False)
    net.append(nn.Linear(1, 1, dtype=torch.float64))
    train(lab, net, sgd(net[3]), first=2)


def a_lazy_layer(lab: Lab) -> None:
    net = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh())
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    net.append(nn.LazyLinear(1, dtype=torch.float64))
    loss_of(net)
    train(lab, net, sgd(net), first=2)
    if lab.watched:
        assert_rows(lab, (0, {name: MLP[name] for name in ("0.weight", "0.bias")}), (2, MLP))


def from_meta(lab: Lab) -> None:
    with torch.device("meta"):
        net = mlp()
    lab.attach(net)
    net.to_empty(device="cpu")
    for layer in (net[0], net[2]):
        layer.reset_parameters()
    train(lab, net, torch.optim.Adam(net.parameters(), lr=LR), first=0)
    if lab.watched:
        assert_rows(lab, (0, MLP))


# ---- loading and converting -----------------------------------------------------------------


def loaded_by_assignment(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    assign(net)
    train(lab, net, sgd(net), first=2)


def loaded_by_assignment_in_another_dtype(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    net.load_state_dict({name: tensor.float() for name, tensor in net.state_dict().items()}, assign=True)
    train(lab, net, sgd(net), first=2)


def converted(mode: str, remade: bool) -> Callable[[Lab], None]:
    def loop(lab: Lab) -> None:
        net = mlp()
        optimizer = sgd(net)
        lab.attach(net)
        train(lab, net, optimizer, first=0)
        net.zero_grad()
        with conversion(mode):
            net.to(torch.float32)
        train(lab, net, sgd(net) if remade else optimizer, first=2)

    loop.__name__ = f"converted_by_{mode}{'_for_another_optimizer' if remade else ''}"
    return loop


# ---- parametrizations, adapters, embeddings -------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def a_parametrization_added_and_removed(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd(net)
    lab.attach(net)
    train(lab, net, optimizer, first=0)
    parametrize.register_parametrization(net[0], "weight", Doubled())
    train(lab, net, optimizer, first=2)
    parametrize.remove_parametrizations(net[0], "weight")
    train(lab, net, optimizer, first=4)
    if lab.watched:
        original: Forms = {"0.bias": (4,), "0.parametrizations.weight.original": (4, 3), "2.weight": (1, 4), "2.bias": (1,)}
        assert_rows(lab, (0, MLP), (2, original), (4, MLP))


def weight_norm(lab: Lab) -> None:
    net = mlp()
    lab.attach(net)
    train(lab, net, sgd(net), first=0)
    parametrizations.weight_norm(net[0])
    train(lab, net, sgd(net), first=2)
    if lab.watched:
        two = {"0.parametrizations.weight.original0": (4, 1), "0.parametrizations.weight.original1": (4, 3)}
        assert_rows(lab, (0, MLP), (2, {"0.bias": (4,), **two, "2.weight": (1, 4), "2.bias": (1,)}))


def an_embedding_grown(lab: Lab) -> None:
    net = nn.Sequential(nn.Embedding(5, 3, dtype=torch.float64), *mlp())
    lab.attach(net)
    for size in (5, 8):
        old = net[0].weight.detach()
        net[0].weight = nn.Parameter(torch.cat([old, torch.zeros(size - len(old), 3, dtype=torch.float64)]))
        optimizer = sgd(net)
        for i in range(2):
            net.zero_grad()
            net(torch.tensor([i, size - 1])).square().mean().backward()
            with lab.by_update(optimizer):
                optimizer.step()
    if lab.watched:
        rest: Forms = {f"{int(name[0]) + 1}{name[1:]}": shape for name, shape in MLP.items()}
        assert_rows(lab, (0, {"0.weight": (5, 3), **rest}), (2, {"0.weight": (8, 3), **rest}))


LOOPS = by_name(
    a_layer_of_another_shape,
    a_layer_added_with_a_group,
    a_layer_removed,
    a_layer_without_its_bias,
    layers_thawed_one_by_one,
    layers_and_their_optimizers_one_after_the_other,
    a_layer_in_front_with_an_optimizer_beside_two,
    a_layer_trained_by_itself,
    a_lazy_layer,
    from_meta,
    loaded_by_assignment,
    loaded_by_assignment_in_another_dtype,
    converted("data", remade=False),
    converted("data", remade=True),
    converted("swap", remade=False),
    converted("swap", remade=True),
    converted("overwrite", remade=True),
    a_parametrization_added_and_removed,
    weight_norm,
    an_embedding_grown,
)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree_before_and_after(loop: Callable[[Lab], None]) -> None:
    verify(loop)


def by_all_rows(net: nn.Module, watch: Watch) -> None:
    net.zero_grad()
    loss_of(net).backward()
    with watch.step(), torch.no_grad():
        for p in net.parameters():
            p -= LR * p.grad


def after_a_stranger(net: nn.Module, watch: Watch) -> None:
    other = mlp(1)
    step(other, sgd(other))
    step(net, sgd(net))


@pytest.mark.parametrize("make_step", [by_all_rows, after_a_stranger], ids=lambda make_step: make_step.__name__)
def test_a_row_that_came_is_there_from_the_step_that_first_has_it(make_step: Callable[[nn.Module, Watch], None]) -> None:
    net = mlp()
    with paramwatch.attach(net) as watch:
        for _ in range(3):
            make_step(net, watch)
        net[2] = nn.Linear(4, 2, dtype=torch.float64)
        make_step(net, watch)

    assert watch.parameters["from_step"].to_dict() == {"0.weight": 0, "0.bias": 0, "2.weight": 3, "2.bias": 3}
    assert list(watch.steps.index) == [0, 1, 2, 3]
