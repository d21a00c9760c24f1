"""The truth harness over several optimizers: one record a round, however they take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import OPTIONS, by_name, loss_of, mlp, sgd
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

# ---- adversarial training -------------------------------------------------------------------


def _adversaries() -> nn.ModuleDict:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return nn.ModuleDict({"generator": generator, "critic": critic}).double()


def _critic_step(lab: Lab, both: nn.ModuleDict, optimizer: Optimizer, i: int) -> None:
    numbers = torch.Generator().manual_seed(i)
    real = torch.randn(5, 3, generator=numbers, dtype=torch.float64)
    fake = both["generator"](torch.randn(5, 2, generator=numbers, dtype=torch.float64)).detach()
    optimizer.zero_grad()
    (both["critic"](fake) - both["critic"](real)).mean().backward()
    lab.raw(optimizer)
    clip_grad_norm_(both["critic"].parameters(), 0.1)
    optimizer.step()


def _generator_step(both: nn.ModuleDict, optimizer: Optimizer, i: int) -> None:
    """Leaves gradients in the critic, which are not used."""
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    optimizer.zero_grad()
    (1 - both["critic"](both["generator"](noise))).mean().backward()
    optimizer.step()


def _adversarial(lab: Lab, rounds: Sequence[str]) -> None:
    """Each string is a round: which of the two, critic (c) and generator (g), step in it."""
    both = _adversaries()
    critic, generator = sgd(both["critic"]), sgd(both["generator"])
    lab.attach(both)
    for i, who in enumerate(rounds):
        with lab.by_update(*(critic if letter == "c" else generator for letter in who)):
            for letter in who:
                if letter == "c":
                    _critic_step(lab, both, critic, i)
                else:
                    _generator_step(both, generator, i)


def adversaries(lab: Lab) -> None:
    _adversarial(lab, ["cg"] * 4)


def five_critic_steps_for_each_of_the_generator(lab: Lab) -> None:
    _adversarial(lab, ["c", "c", "c", "c", "cg"] * 2)


def two_generator_steps_for_each_of_the_critic(lab: Lab) -> None:
    _adversarial(lab, ["gc", "g"] * 3)


def a_generator_that_starts_late(lab: Lab) -> None:
    _adversarial(lab, ["c", "c", "cg", "cg"])


def adversaries_that_are_frozen_in_turns(lab: Lab) -> None:
    both = _adversaries()
    critic, generator = sgd(both["critic"]), sgd(both["generator"])
    lab.attach(both)
    for i in range(4):
        with lab.by_update(critic, generator):
            both["generator"].requires_grad_(False)
            _critic_step(lab, both, critic, i)
            both["generator"].requires_grad_(True)
            both["critic"].requires_grad_(False)
            _generator_step(both, generator, i)
            both["critic"].requires_grad_(True)


# ---- optimizers for different kinds of parameters, and for each layer -----------------------


def _matrices_and_vectors(lab: Lab, make: Callable[[list[nn.Parameter], list[nn.Parameter]], list[Optimizer]]) -> None:
    net = mlp()
    matrices = [param for param in net.parameters() if param.ndim == 2]
    optimizers = make(matrices, [param for param in net.parameters() if param.ndim < 2])
    lab.attach(net)
    for i in range(4):
        net.zero_grad()
        loss_of(net, i).backward()
        lab.raw()
        clip_grad_norm_(net.parameters(), 0.1)
        with lab.by_twin(*optimizers):
            for optimizer in optimizers:
                optimizer.step()


def muon_and_adamw(lab: Lab) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    _matrices_and_vectors(lab, lambda matrices, vectors: [torch.optim.Muon(matrices, lr=LR), AdamW(vectors, lr=LR)])


def adamw_and_sgd_with_nesterov(lab: Lab) -> None:
    _matrices_and_vectors(
        lab,
        lambda matrices, vectors: [AdamW(vectors, lr=LR), SGD(matrices, lr=LR, momentum=0.5, nesterov=True, foreach=True)],
    )


def one_for_each_layer(lab: Lab) -> None:
    net = mlp()
    optimizers = [sgd(net[0]), sgd(net[2])]
    lab.attach(net)
    for i in range(4):
        net.zero_grad()
        loss_of(net, i).backward()
        with lab.by_update(*optimizers):
            for optimizer in optimizers:
                optimizer.step()


def one_for_each_layer_inside_backward(lab: Lab) -> None:
    net = mlp()
    layers, optimizers = [net[0], net[2]], [sgd(net[0]), sgd(net[2])]
    lab.attach(net)

    def step_when_complete(layer: nn.Module, optimizer: Optimizer) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if all(param.grad is not None for param in layer.parameters()):
                optimizer.step()
                optimizer.zero_grad()

        return hook

    for layer, optimizer in zip(layers, optimizers, strict=True):
        for param in layer.parameters():
            param.register_post_accumulate_grad_hook(step_when_complete(layer, optimizer))
    for i in range(4):
        with lab.by_update(*optimizers):
            loss_of(net, i).backward()


def one_for_each_parameter_inside_backward(lab: Lab) -> None:
    net = mlp()
    optimizers = {param: sgd([param]) for param in net.parameters()}
    lab.attach(net)

    def step_now(param: Tensor) -> None:
        optimizers[param].step()
        param.grad = None

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(step_now)
    for i in range(4):
        with lab.by_update(*optimizers.values()):
            loss_of(net, i).backward()


# ---- optimizers that change -----------------------------------------------------------------


def _plain_round(lab: Lab, i: int, *optimizers: Optimizer) -> None:
    lab.model.zero_grad()
    loss_of(lab.model, i).backward()
    with lab.by_update(*optimizers):
        for optimizer in optimizers:
            optimizer.step()


def groups_added_later(lab: Lab) -> None:
    net = mlp()
    optimizer = sgd([net[2].weight])
    lab.attach(net)
    for i in range(6):
        if i == 2:
            optimizer.add_param_group({"params": [net[2].bias]})
        if i == 4:
            optimizer.add_param_group({"params": list(net[0].parameters())})
        _plain_round(lab, i, optimizer)


def groups_added_to_one_of_two(lab: Lab) -> None:
    net = mlp()
    first, second = sgd([net[0].weight]), sgd([net[2].weight])
    lab.attach(net)
    for i in range(5):
        if i == 2:
            second.add_param_group({"params": [net[0].bias, net[2].bias]})
        _plain_round(lab, i, first, second)


def made_anew(lab: Lab) -> None:
    lab.attach(mlp())
    for i in range(6):
        if i % 2 == 0:
            optimizer = sgd(lab.model)
        _plain_round(lab, i, optimizer)


def a_second_one_made_later(lab: Lab) -> None:
    net = mlp()
    optimizers = [sgd(net[2])]
    lab.attach(net)
    for i in range(5):
        if i == 2:
            optimizers.append(sgd(net[0]))
        _plain_round(lab, i, *optimizers)


def one_replaced_by_two(lab: Lab) -> None:
    net = mlp()
    optimizers = [sgd(net)]
    lab.attach(net)
    for i in range(5):
        if i == 2:
            optimizers = [sgd(net[0]), sgd(net[2])]
        _plain_round(lab, i, *optimizers)


def two_replaced_by_one(lab: Lab) -> None:
    net = mlp()
    optimizers = [sgd(net[0]), sgd(net[2])]
    lab.attach(net)
    for i in range(5):
        if i == 2:
            optimizers = [sgd(net)]
        _plain_round(lab, i, *optimizers)


def a_layer_replaced_with_an_optimizer_of_its_own(lab: Lab) -> None:
    """The first optimizer goes on with the layers that stayed, and with tensors that are gone."""
    net = mlp()
    optimizers = [sgd(net)]
    lab.attach(net)
    lab.expected_findings = {"dead_optimizer", "changed_outside"}
    for i in range(5):
        if i == 2:
            net[2] = nn.Linear(4, 1, dtype=torch.float64)
            optimizers.append(sgd(net[2]))
        _plain_round(lab, i, *optimizers)


def two_that_take_turns_over_the_same(lab: Lab) -> None:
    lab.attach(mlp())
    optimizers = [sgd(lab.model), sgd(lab.model)]
    for i in range(5):
        _plain_round(lab, i, optimizers[i % 2])


def two_that_share_a_parameter(lab: Lab) -> None:
    net = mlp()
    optimizers = [sgd([net[0].weight, net[0].bias]), sgd([net[0].bias, *net[2].parameters()])]
    lab.attach(net)
    for i in range(4):
        for optimizer in optimizers:
            _plain_round(lab, i, optimizer)


def one_of_all_in_turns_with_one_of_a_part(lab: Lab) -> None:
    """After both parts had one of their own, whose places the one of all spans."""
    net = mlp()
    body, head, whole = sgd(net[0]), sgd(net[2]), sgd(net)
    lab.attach(net)
    for i, optimizers in enumerate([(body, head), (body, head), *[(whole,), (head,)] * 3, (body, head), (whole,)]):
        _plain_round(lab, i, *optimizers)


def one_of_parts_of_two(lab: Lab) -> None:
    """It shares a parameter with each, of which the second comes after the first."""
    net = mlp()
    first, second, across = sgd(net[0]), sgd(net[2]), sgd([net[0].bias, net[2].bias])
    lab.attach(net)
    for i, optimizers in enumerate([(first, second), (across,), (second,), (first, second), (across,), (second,)]):
        _plain_round(lab, i, *optimizers)


def given_what_another_holds(lab: Lab) -> None:
    """By `add_param_group`, and into the list."""
    net = mlp()
    first, second = sgd(net[0]), sgd(net[2])
    lab.attach(net)
    for i in range(8):
        if i == 2:
            second.add_param_group({"params": [net[0].weight]})
        if i == 5:
            first.param_groups[0]["params"].append(net[2].bias)
        for each in [(first, second)] if i < 2 else [(first,), (second,)]:
            _plain_round(lab, i, *each)


def given_what_a_later_one_was_made_of(lab: Lab) -> None:
    """What was given to an optimizer came with no place, and one that is made of it steps after it."""
    net = mlp()
    first, second = sgd([net[0].weight]), sgd([net[2].weight])
    lab.attach(net)
    _plain_round(lab, 0, first, second)
    second.add_param_group({"params": [net[2].bias]})
    third = sgd([net[2].bias])
    for i in range(1, 4):
        _plain_round(lab, i, first, second)
        _plain_round(lab, i, third)


LOOPS: dict[str, Loop] = by_name(
    adversaries,
    five_critic_steps_for_each_of_the_generator,
    two_generator_steps_for_each_of_the_critic,
    a_generator_that_starts_late,
    adversaries_that_are_frozen_in_turns,
    muon_and_adamw,
    adamw_and_sgd_with_nesterov,
    one_for_each_layer,
    one_for_each_layer_inside_backward,
    one_for_each_parameter_inside_backward,
    groups_added_later,
    groups_added_to_one_of_two,
    made_anew,
    a_second_one_made_later,
    one_replaced_by_two,
    two_replaced_by_one,
    a_layer_replaced_with_an_optimizer_of_its_own,
    two_that_take_turns_over_the_same,
    two_that_share_a_parameter,
    one_of_all_in_turns_with_one_of_a_part,
    one_of_parts_of_two,
    given_what_another_holds,
    given_what_a_later_one_was_made_of,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_books_agree(loop: Loop, options: dict[str, Any]) -> None:
    verify(loop, **options)
