"""`paramwatch.summary` on 15,000 rows, processor and wall time, as a table: python benchmarks/summary_rows.py."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import init

import paramwatch

LAYERS, TIMES = 7500, 5


def mixture(w: Tensor) -> None:
    """U(-10, -5), 0 or U(5, 10), half of the elements zero."""
    w.data.uniform_(5, 10).mul_(torch.randint(0, 2, w.shape) * 2 - 1).mul_(torch.rand_like(w) < 0.5)


def rounded(w: Tensor) -> None:
    """A normal law on a grid: many elements are equal, some are zero."""
    w.data.normal_().mul_(20).round_().div_(1000)


FILLS: dict[str, Callable[[Tensor], object]] = {
    "PyTorch default": lambda w: None,
    "normal": lambda w: init.normal_(w, std=0.02),
    "truncated normal": lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
    "moved off its start": lambda w: w.data.add_(torch.randn_like(w), alpha=0.03),
    "Kaiming normal": lambda w: init.kaiming_normal_(w, nonlinearity="relu"),
    "orthogonal": init.orthogonal_,
    "a third zeros": lambda w: init.sparse_(w, 0.3),
    "constant": lambda w: init.constant_(w, 42),
    "normal, bfloat16": lambda w: init.normal_(w, std=0.02),
    "of no law": lambda w: w.data.exponential_(),
    "half zeros, else two-sided": mixture,
    "rounded": rounded,
}

IN_TURN = cycle([fill for name, fill in FILLS.items() if not name.endswith("bfloat16")])
FILLS["each of these in turn"] = lambda w: next(IN_TURN)(w)


def main() -> None:
    versions = f"paramwatch {paramwatch.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), {versions}; {LAYERS:,} layers of two rows each\n")
    print("| layer | weights | processor, best | processor, median | wall, best | wall, median |")
    print("|---|---|---|---|---|---|")
    for name, fill in FILLS.items():
        for width in (8, 16, 32, 64):
            net = net_of(width, fill)
            cpu, wall = times(net.to(torch.bfloat16) if name.endswith("bfloat16") else net)
            cells = [f"{of(spent):.2f} s" for spent in (cpu, wall) for of in (min, statistics.median)]
            print(f"| Linear({width}, {width}) | {name} | {' | '.join(cells)} |", flush=True)


def net_of(width: int, fill: Callable[[Tensor], object]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
    for layer in net:
        fill(layer.weight)
    return net


def times(net: nn.Module) -> tuple[list[float], list[float]]:
    cpu, wall = [], []
    for _ in range(TIMES):
        processor, start = time.process_time(), time.perf_counter()
        paramwatch.summary(net)
        cpu.append(time.process_time() - processor)
        wall.append(time.perf_counter() - start)
    return cpu, wall


if __name__ == "__main__":
    main()
