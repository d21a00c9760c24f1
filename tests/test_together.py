"""Tensors of one shape are asked together: each verdict is the one that the tensor alone gets, and a row more costs little."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pandas as pd
import pytest
import torch
from dispatched import Dispatched
from torch import Tensor, nn
from torch.nn import init

from paramwatch import sampling, summary


def broken(w: Tensor) -> None:
    w[0, 0], w[-1, -1] = float("nan"), float("inf")


FILLS: dict[str, Callable[[Tensor], object]] = {
    "default": lambda w: None,
    "normal": lambda w: init.normal_(w, std=0.02),
    "truncated": lambda w: init.trunc_normal_(w, std=0.02, a=-0.03, b=0.03),
    "cut near its centre": lambda w: init.trunc_normal_(w, std=0.02, a=-0.01, b=0.01),
    "moved off its start": lambda w: w.add_(torch.randn_like(w), alpha=0.1),
    "orthogonal": init.orthogonal_,
    "two-sided": lambda w: w.uniform_(5, 10).mul_(torch.randint(0, 2, w.shape) * 2 - 1),
    "zeros beside a law": lambda w: init.sparse_(w, 0.3),
    "half of them zero": lambda w: w.uniform_(5, 10).mul_(torch.randint(0, 2, w.shape) * 2 - 1).mul_(torch.rand_like(w) < 0.5),
    "zeros for what is negative": lambda w: w.normal_().relu_(),
    "constant": lambda w: init.constant_(w, 42),
    "clipped": lambda w: w.normal_().clamp_(-1, 1),
    "few values": lambda w: w.normal_().round_(),
    "one apart": lambda w: w[0, :1].fill_(42),
    "of no law": lambda w: w.exponential_(),
    "not finite": broken,
    "too large to square": lambda w: w.normal_().mul_(1e30),
}


def filled(fill: Callable[[Tensor], object], width: int, dtype: torch.dtype) -> list[nn.Linear]:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(8)]
    for layer in layers:
        fill(layer.weight.data)
    return [layer.to(dtype) for layer in layers]


def verdicts(*layers: nn.Module) -> pd.DataFrame:
    return summary(nn.ModuleList(layers)).frame.drop(columns=["module"]).reset_index(drop=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trained_tensors_of_half_precision_with_zeros_are_looked_at_without_a_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = summary(nn.Embedding(1000, 16, padding_idx=0).to(dtype)).frame

    assert list(found["looks_like"]) == ["PyTorch default (normal(0, 1))"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_as_many_elements_in_several_shapes_are_asked_together(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False), nn.Conv1d(8, 16, 4, bias=False)]
    alone = pd.concat([verdicts(layer.to(dtype)) for layer in layers], ignore_index=True)

    pd.testing.assert_frame_equal(verdicts(*layers), alone)


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_in_company_is_seen_as_it_is_alone(fill: Callable[[Tensor], object], dtype: torch.dtype) -> None:
    for width in (8, 20, 40):
        layers = filled(fill, width, dtype)
        together, alone = verdicts(*layers), pd.concat([verdicts(layer) for layer in layers], ignore_index=True)
        pd.testing.assert_frame_equal(together, alone)


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_of_a_sample_the_same_is_seen(fill: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    limits = sampling.Limits(1024, 1024)
    monkeypatch.setattr(sampling.Limits, "of", classmethod(lambda cls, sizes: limits))
    layers = filled(fill, 48, torch.float32)
    together, alone = verdicts(*layers), pd.concat([verdicts(layer) for layer in layers], ignore_index=True)

    pd.testing.assert_frame_equal(together, alone)
    assert together["exact"].all() == (fill is broken) or not together["exact"][0]


def operations(net: nn.Module) -> int:
    with Dispatched() as dispatched:
        summary(net)
    return len(dispatched)


def calls(net: nn.Module) -> int:
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        summary(net)
    finally:
        sys.setprofile(before)
    return count


def for_one_row(cost: Callable[[nn.Module], int], fill: Callable[[Tensor], object], width: int, wider: int = 0) -> float:
    """What a row more costs, each layer being so much wider than the one before."""
    torch.manual_seed(0)
    few, many = (nn.ModuleList(nn.Linear(width + wider * i, width) for i in range(layers)) for layers in (100, 300))
    for layer in (*few, *many):
        fill(layer.weight.data)
    # what is worked out once for a shape is not counted
    summary(many)
    return (cost(many) - cost(few)) / 400


COMMON = ("default", "normal", "truncated", "moved off its start", "two-sided", "orthogonal")


@pytest.mark.parametrize(("width", "wider", "most"), [(8, 0, 325), (32, 0, 355), (32, 1, 370)])
@pytest.mark.parametrize("fill", [*COMMON, "of no law", "zeros beside a law", "half of them zero"])
def test_a_row_more_costs_few_operations_and_calls(fill: str, width: int, wider: int, most: int) -> None:
    # whether columns have as many zeros, all elements are asked
    assert for_one_row(operations, FILLS[fill], width, wider) <= (6.5 if fill == "zeros beside a law" else 5)
    assert for_one_row(calls, FILLS[fill], width, wider) <= (most + 40 if "zero" in fill else most)
