"""What the Triton kernels are tried on."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")


FEW = re.split(
    r",\s+",
    """empty, 513, bfloat16 1025, float64 with all of them, misaligned with all of them, subnormal, outlier first, by a sign,
    bfloat16 with a float32 gradient""",
)
"""Cases of every suite; the interpreter takes its time."""


def most(names: Iterable[Any], few: Container[Any] = FEW) -> list[Any]:
    """Parameters of a test, of which only a few are tried in every suite."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.thorough) for name in names]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def holding(x: Tensor, at: dict[int, float]) -> Tensor:
    """A copy with some elements replaced."""
    x = x.clone()
    for position, value in at.items():
        x.view(-1)[position] = value
    return x


def some(x: Tensor, *values: float) -> Tensor:
    """A copy with values strewn over it, some in each chunk."""
    return holding(x, {(7 + 311 * i) % x.numel(): values[i % len(values)] for i in range(max(len(values), x.numel() // 311))})


@cache
def cases() -> dict[str, Tensor]:
    """Everything a tensor can be that the kernels take."""
    sizes = (31, 32, 33, 255, 257, 511, 512, 513, 1537)
    return {
        "0-dim": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "1 element": noise(1),
        **{str(n): noise(n) for n in sizes},
        **{f"bfloat16 {n}": noise(n).bfloat16() for n in (1, 255, 257, 1023, 1025)},
        "float16": noise(2100).half(),
        "float64": noise(450, dtype=torch.float64),
        "parameter": torch.nn.Parameter(noise(9)),
        "transposed": noise(24, 30).t(),
        "channels last": noise(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "misaligned": noise(1101)[1:],
        "misaligned bfloat16": noise(1303).bfloat16()[3:],
        "misaligned float16": noise(1302).half()[2:],
        "misaligned float64": noise(301, dtype=torch.float64)[1:],
        "NaN": some(noise(1200), NAN),
        "+inf": holding(noise(600), {0: INF}),
        "-inf": holding(noise(600), {599: -INF}),
        "NaN, +inf and -inf": some(noise(1700), NAN, INF, -INF, 0.0),
        "bfloat16 with all of them": some(noise(1700).bfloat16(), NAN, INF, -INF, 0.0),
        "float16 with inf": holding(noise(700).half(), {5: INF}),
        "float64 with all of them": some(noise(400, dtype=torch.float64), NAN, INF, -INF, 0.0),
        "misaligned with all of them": some(noise(1301), NAN, INF, -INF, 0.0)[1:],
        "all NaN": torch.full((1100,), NAN),
        "first chunk all NaN": torch.cat((torch.full((512,), NAN), 100 + noise(600))),
        "all +inf": torch.full((3,), INF),
        "all zero": torch.zeros(1600),
        "-0.0": torch.full((10,), -0.0),
        "mostly zero": noise(1500) * (noise(1500, seed=1) > 1),
        "subnormal": noise(600) * 1e-40,
        "float16 subnormal": noise(600).half() * 2e-6,
        "bfloat16 subnormal": (noise(600) * 1e-40).bfloat16(),
        "1e30": noise(900) * 1e30,
        "largest": holding(noise(600), {3: 3.4e38, 4: -3.4e38, 500: 3.4e38}),
        "1e-25": noise(900) * 1e-25,
        "1e-19": noise(900) * 1e-19,
        "1e-21": noise(900) * 1e-21,
        "float64 1e200": noise(300, dtype=torch.float64) * 1e200,
        "float64 1e-200": noise(300, dtype=torch.float64) * 1e-200,
        "1 + 1e-4 noise": 1 + 1e-4 * noise(3000),
        "1000 + 1e-3 noise": 1000 + 1e-3 * noise(1500),
        "outlier first": holding(noise(1900) * 1e-3, {0: 100.0}),
        "forty outliers first": torch.cat((torch.full((40,), 100.0), noise(900) * 1e-3)),
        "rising": torch.arange(1400.0),
        "two levels": torch.cat((torch.full((700,), 0.1), torch.full((700,), 0.2))),
        "constant": torch.full((1777,), 0.1),
        "constant, 7": torch.full((7,), 0.1),
        "constant, 1001 bfloat16": torch.full((1001,), 0.1).bfloat16(),
        "all but one are equal": holding(torch.full((1500,), 0.1), {1000: 0.1 + 1e-8}),
    }


def not_read_once() -> dict[str, Tensor]:
    """One chunk each, whose first elements say nothing of the others."""
    rest = (1 << 15) - 32
    return {
        "a far pivot": torch.cat((torch.full((32,), 100.0), noise(rest) * 1e-3)),
        "no pivot": torch.cat((noise(32) * 100, 50 + 1e-3 * noise(rest))),
        "a pivot larger than most": 3.14159 * torch.cat((torch.ones(32), torch.arange(rest) % 7 == 3)),
    }


@cache
def large() -> dict[str, Tensor]:
    """What shows only in a chunk of the size that they have outside of the tests."""
    return {
        "noise": noise(40_000),
        "bfloat16 noise": noise(70_000).bfloat16(),
        "1 + 1e-4 noise": 1 + 1e-4 * noise(40_000),
        "one in a hundred": noise(40_000) * (noise(40_000, seed=1) > 2.33),
        "only the first row": torch.cat((noise(768), torch.zeros(32_000))),
        "heavy tails": noise(40_000) / noise(40_000, seed=1),
        "rising": torch.arange(40_000.0),
        "two values": 3.14159 * (torch.arange(40_000) % 5 < 2),
        **not_read_once(),
    }


@cache
def steps() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Before and after a step, and the gradient: of many cases, and what only an update can be."""
    made = {}
    names = """0-dim, empty, 1 element, 33, 257, 513, 1537, bfloat16 257, bfloat16 1025, float16, float64, parameter, transposed,
        channels last, misaligned, misaligned bfloat16, NaN, bfloat16 with all of them, float64 with all of them,
        misaligned with all of them, all NaN, mostly zero, subnormal, 1e30, 1e-25, float64 1e200, 1 + 1e-4 noise, outlier first, constant"""
    for name in re.split(r",\s+", names):
        x = cases()[name]
        after, grad = torch.empty_like(x), torch.empty_like(x)
        if x.storage_offset():
            after, grad = (torch.empty(x.numel() + x.storage_offset(), dtype=x.dtype)[x.storage_offset() :] for _ in range(2))
        after.copy_(x.detach().double() * 1.01 + 0.003 * noise(*x.shape, seed=2))
        grad.copy_(noise(*x.shape, seed=3))
        made[name] = (x.detach(), after, grad)
    x, far = noise(1400), torch.full((700,), 3e38)
    made["nothing moved"] = (x, x.clone(), noise(1400, seed=3))
    made["inf minus inf"] = (some(x, INF, -INF), some(x, INF, INF, -INF), x)
    made["farther than float32"] = (far, -far, noise(700))
    made["all by the same"] = (torch.zeros(1400), torch.full((1400,), -1e-3), x)
    made["by a sign"] = (torch.zeros(1400), -1e-3 * x.sign(), x)
    made["gradient with all of them"] = (x, x * 1.01, some(x, NAN, INF, -INF))
    made["gradient all zero"] = (x, x * 1.01, torch.zeros(1400))
    made["tiny times tiny"] = (torch.zeros(900), noise(900) * 1e-18, noise(900, seed=3) * 1e-18)
    made["huge times huge"] = (torch.zeros(900), noise(900) * 1e18, noise(900, seed=3) * 1e30)
    made["gradient of another dtype"] = (x, x * 1.01, x.double())
    made["bfloat16 with a float32 gradient"] = (noise(1400).bfloat16(), noise(1400, seed=1).bfloat16(), x)
    made["float32 with a bfloat16 gradient"] = (x, x * 1.01, x.bfloat16())
    made["float64 with a float16 gradient"] = (noise(300).double(), noise(300, seed=1).double(), noise(300, seed=2).half())
    made["misaligned before"] = (noise(1401)[1:], x, x)
    made["misaligned gradient"] = (x, x * 1.01, noise(1401)[1:])
    half = x.bfloat16()
    made["misaligned bfloat16 before and gradient"] = (noise(1401).bfloat16()[1:], half, noise(1403).bfloat16()[3:])
    return made
