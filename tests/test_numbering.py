"""Which steps of several optimizers make one round."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from loops import mlp, sgd
from torch.optim import Optimizer

from paramwatch.numbering import Rounds

TENSORS = 6


@pytest.mark.parametrize("seed", range(20))
def test_no_optimizer_and_no_tensor_steps_twice_in_a_round(seed: int) -> None:
    draw = random.Random(seed)
    tensors = [torch.zeros(1) for _ in range(TENSORS)]
    rounds, quick = (Rounds(0, set(map(id, tensors)).__contains__) for _ in range(2))
    optimizers = [sgd([tensor]) for tensor in tensors[:2]]
    stepped: list[dict[Optimizer, set[int]]] = []
    for _ in range(200):
        happens, optimizer = draw.random(), draw.choice(optimizers)
        held = optimizer.param_groups[0]["params"]
        if happens < 0.02:
            optimizers.append(sgd(draw.sample(tensors, draw.randint(1, TENSORS))))
        elif happens < 0.04:
            held.extend(tensor for tensor in draw.sample(tensors, 1) if id(tensor) not in map(id, held))
        else:
            due, _ = rounds.due(optimizer, [*map(id, held)])
            number = rounds.take(optimizer)
            assert due == number
            assert len(stepped) - 1 <= number <= len(stepped)
            # as a streak counts
            if stepped and stepped[-1].keys() == {optimizer}:
                quick.again(quick.known(optimizer))
            else:
                quick.take(optimizer)
            assert quick.step == number
            if number == len(stepped):
                stepped.append({})
            assert optimizer not in stepped[-1]
            assert all(ids.isdisjoint(map(id, held)) for ids in stepped[-1].values())
            stepped[-1][optimizer] = {*map(id, held)}


def test_what_is_known_of_optimizers_and_tensors_that_are_gone_does_not_pile_up() -> None:
    net = mlp()
    rounds = Rounds(0, {id(param) for param in net.parameters()}.__contains__)
    kept = []
    for i in range(20):
        strangers = [torch.zeros(1) for _ in range(5)]
        kept.append(strangers)
        rounds.take(sgd([*net.parameters(), *strangers]))
        # each time would take seconds in a process that holds much else
        if i % 10 == 8:
            gc.collect()

    assert len(rounds._known) <= 2
    assert len(rounds._place_of) <= 4 + 2 * 5
    assert rounds.step == 19
