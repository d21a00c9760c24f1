"""A training step with and without paramwatch, side by side in one process: interleaved blocks of steps, median of paired ratios.

python benchmarks/monitored_step.py [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

import paramwatch

STEPS = 50
"""Steps in a block: watched and bare blocks take turns."""


def shared_mlp() -> nn.Sequential:
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1))


def twenty_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), *(nn.Linear(8, 8) for _ in range(18)), nn.Linear(8, 1))


def block(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    """Microseconds a step."""
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return (time.perf_counter() - start) / STEPS * 1e6


def compare(make: Callable[[], nn.Module], rounds: int) -> None:
    x = torch.randn(64, 4)
    nets = make(), make()
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in nets]
    with tempfile.TemporaryDirectory() as folder, paramwatch.attach(nets[1], folder) as watch:
        for net, optimizer in zip(nets, optimizers, strict=True):
            block(net, optimizer, x)
        pairs = [(block(nets[0], optimizers[0], x), block(nets[1], optimizers[1], x)) for _ in range(rounds)]
        own = watch.steps["overhead_us"].median()
    bare = statistics.median(pair[0] for pair in pairs)
    ratio = statistics.median(watched / alone for alone, watched in pairs)
    print(f"{make.__name__:14} {len(watch.parameters):4} rows  bare {bare:7.0f} us  watched {ratio:5.2f} x  overhead_us {own:6.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of blocks")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, every step, default statistics, exact update, written to a run")
    for make in (shared_mlp, twenty_layers):
        compare(make, rounds)


if __name__ == "__main__":
    main()
