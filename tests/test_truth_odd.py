"""The truth harness over models whose parameters or gradients are of an odd kind, or at the ends of what their dtype holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import LR, Lab, Loop, verify
from loops import mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import paramwatch

Gradients = Callable[[int], None]


class Case:
    """A model, and how the gradients of a batch come about; `alone` where a copy of it would be another."""

    def __init__(self, model: nn.Module, gradients: Gradients, alone: bool = False) -> None:
        self.model = model
        self.gradients = gradients
        self.alone = alone


def holding(*tensors: Tensor) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(tensor) for tensor in tensors)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_backward(model: nn.Module, loss: Callable[[int], Tensor], alone: bool = False) -> Case:
    def gradients(i: int) -> None:
        model.zero_grad()
        loss(i).backward()

    return Case(model, gradients, alone)


def by_hand(model: nn.Module, gradient: Callable[[Tensor, int], Tensor], alone: bool = False) -> Case:
    def gradients(i: int) -> None:
        for param in model.parameters():
            param.grad = gradient(param, i)

    return Case(model, gradients, alone)


# ---- gradients --------------------------------------------------------------------------------


def sparse_gradients_that_are_not_coalesced() -> Case:
    net = nn.Embedding(11, 4, sparse=True)
    words = torch.tensor([[1, 1, 3], [3, 3, 1]])
    return by_backward(net, lambda i: (net(words + i) * (i + 1)).square().sum())


def sparse_gradients_with_nothing_in_them() -> Case:
    net = nn.Embedding(11, 4, sparse=True)
    return by_backward(net, lambda i: net(torch.zeros(i % 2, dtype=torch.int64)).sum())


def sparse_and_dense_gradients_in_turn() -> Case:
    net = nn.Embedding(11, 4, sparse=True)
    return by_hand(net, lambda param, i: numbers(11, 4, seed=i).relu().to_sparse() if i % 2 else numbers(11, 4, seed=i))


def expanded_gradients() -> Case:
    return by_hand(mlp(), lambda param, i: torch.full((), 0.5 + i, dtype=param.dtype).expand_as(param))


def gradients_that_overlap() -> Case:
    shared = numbers(64, dtype=torch.float64)
    return by_hand(mlp(), lambda param, i: shared[i : i + param.numel()].view_as(param))


def transposed_gradients() -> Case:
    return by_hand(holding(numbers(4, 6), numbers(6, 4).t()), lambda param, i: numbers(6, 4, seed=i).t())


def gradients_of_a_sum() -> Case:
    net = holding(numbers(4, 6), numbers(3))
    return by_backward(net, lambda i: sum((param.sum() for param in net), torch.zeros(())))


def complex_numbers() -> Case:
    net = nn.Sequential(nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 1, dtype=torch.complex64))
    return by_backward(net, lambda i: net(numbers(5, 3, seed=i, dtype=torch.complex64)).abs().square().mean())


def conjugate_gradients() -> Case:
    return by_hand(holding(numbers(4, dtype=torch.complex128)), lambda param, i: numbers(4, seed=i, dtype=torch.complex128).conj())


def wider_gradients() -> Case:
    net = holding(numbers(4, 6).bfloat16())
    if not hasattr(net[0], "grad_dtype"):
        pytest.skip("in this torch a gradient has the dtype of its parameter")
    net[0].grad_dtype = torch.float32
    return by_hand(net, lambda param, i: numbers(4, 6, seed=i), alone=True)


# ---- parameters -------------------------------------------------------------------------------


def no_dimension_and_no_element() -> Case:
    net = holding(torch.tensor(0.5), torch.empty(0, 3), torch.ones(1), numbers(2))
    return by_backward(net, lambda i: (net[0] * net[2] * net[3]).square().sum() + net[1].sum())


def channels_last() -> Case:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 2, 2)).to(memory_format=torch.channels_last)
    return by_backward(net, lambda i: net(numbers(2, 3, 6, 6, seed=i)).square().mean())


class Tagged(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def subclass() -> Case:
    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(numbers(2, 3).as_subclass(Tagged))
    assert type(net.weight) is Tagged
    return by_backward(net, lambda i: net(numbers(5, 3, seed=i)).square().mean().as_subclass(Tensor), alone=True)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def parametrized() -> Case:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    parametrizations.weight_norm(net[1])
    parametrizations.spectral_norm(net[2])
    prune.l1_unstructured(net[3], "weight", 0.5)
    return by_backward(net, lambda i: net(numbers(5, 4, seed=i)).square().mean(), alone=True)


def bfloat16_at_both_ends() -> Case:
    net = holding(torch.tensor([3e38, -3e38, 1e-38, 9.2e-41, 0.0]).bfloat16())
    return by_hand(net, lambda param, i: torch.tensor([1e38, -1e38, 1e-38, 9.2e-41, -0.0]).bfloat16())


def float16_at_both_ends() -> Case:
    net = holding(torch.full((5000,), 60000.0).half(), torch.full((5000,), 6e-8).half())
    return by_hand(net, lambda param, i: param.detach() / 2)


def float32_at_both_ends() -> Case:
    # below 1e-38 parts, which are held as float32, have fewer digits
    net = holding(numbers(300).clamp(-3, 3) * 1e38, numbers(300) * 1e-34)
    return by_hand(net, lambda param, i: param.detach() / 4)


CASES = (
    sparse_gradients_that_are_not_coalesced,
    sparse_gradients_with_nothing_in_them,
    sparse_and_dense_gradients_in_turn,
    expanded_gradients,
    gradients_that_overlap,
    transposed_gradients,
    gradients_of_a_sum,
    complex_numbers,
    conjugate_gradients,
    wider_gradients,
    no_dimension_and_no_element,
    channels_last,
    subclass,
    parametrized,
    bfloat16_at_both_ends,
    float16_at_both_ends,
    float32_at_both_ends,
)


@pytest.mark.parametrize("make", CASES)
def test_the_books_agree(make: Callable[[], Case]) -> None:
    verify(loop_of(make))


@pytest.mark.parametrize("make", CASES)
def test_the_books_agree_in_full_detail(make: Callable[[], Case]) -> None:
    verify(loop_of(make), detail="full")


def loop_of(make: Callable[[], Case]) -> Loop:
    def loop(lab: Lab) -> None:
        case = make()
        optimizer = torch.optim.SGD(case.model.parameters(), lr=LR, foreach=False)
        lab.attach(case.model)
        for i in range(3):
            case.gradients(i)
            with lab.by_update(optimizer) if case.alone else lab.by_twin(optimizer):
                optimizer.step()

    return loop


def test_subnormal_numbers_are_measured_to_the_last_digit_that_float32_has() -> None:
    net = holding(numbers(300) * 1e-40)
    reals = net[0].detach().double()
    with paramwatch.attach(net) as watch, watch.step():
        pass
    line = watch.frame().loc[(0, "0")]

    digit = 2.0**-149
    for statistic, true in (("mean", reals.mean()), ("rms", reals.square().mean().sqrt()), ("abs_max", reals.abs().max())):
        assert line[f"param_{statistic}"] == pytest.approx(float(true), abs=digit, rel=0)
    assert line["param_norm"] == pytest.approx(float(reals.norm()), abs=digit * 300**0.5, rel=0)
