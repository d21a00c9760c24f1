"""How the cost of a step grows with the number of rows, and that it does not with the number of steps.

python benchmarks/growth.py [--steps N]

Time is CPU time of the whole process, the background thread included, more than that of the same step bare.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time

import torch
from torch import nn

import paramwatch

ROWS = (10, 100, 1000, 5000, 15_000)


def model(rows: int) -> nn.Module:
    return nn.ModuleList(nn.Linear(8, 7) for _ in range(rows // 2))


def seconds(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Of CPU, for one step."""
    start = time.process_time()
    for _ in range(steps):
        optimizer.step()
    return (time.process_time() - start) / steps


def with_gradients(net: nn.Module) -> torch.optim.Optimizer:
    for param in net.parameters():
        param.grad = torch.full_like(param, 1e-6)
    return torch.optim.SGD(net.parameters(), lr=1e-6)


def by_rows() -> list[str]:
    lines = [
        "| rows | bare step, µs | CPU more, µs | of it, on the training thread | µs a row on the training thread |",
        "|---|---|---|---|---|",
    ]
    for rows in ROWS:
        steps = max(3, 3000 // rows)
        net = model(rows)
        optimizers = with_gradients(model(rows)), with_gradients(net)
        with tempfile.TemporaryDirectory() as folder, paramwatch.attach(net, folder, update="exact") as watch:
            for _ in range(40):
                optimizers[1].step()
            pairs = [(seconds(optimizers[0], steps), seconds(optimizers[1], steps)) for _ in range(9)]
            own = watch.steps["overhead_us"].iloc[40:].median()
        bare, more = statistics.median(one for one, _ in pairs), statistics.median(two - one for one, two in pairs)
        lines.append(f"| {rows:,} | {bare * 1e6:,.0f} | {more * 1e6:,.0f} | {own:,.0f} | {own / rows:.2f} |")
    return lines


def by_steps(most: int) -> list[str]:
    lines = ["| steps | `overhead_us` of the last tenth | memory, MiB |", "|---|---|---|"]
    net = model(6)
    optimizer = with_gradients(net)
    with tempfile.TemporaryDirectory() as folder, paramwatch.attach(net, folder, update="exact") as watch:
        done = 0
        for steps in [each for each in (1000, 10_000, 100_000) if each <= most]:
            while done < steps:
                optimizer.step()
                done += 1
            watch.flush()
            gc.collect()
            own = watch.steps["overhead_us"]
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            lines.append(f"| {steps:,} | {own[own.index >= steps * 9 // 10].median():,.0f} | {memory:,.0f} |")
    return lines


def table(most: int = 100_000) -> list[str]:
    """Both tables, as Markdown; memory is the largest of the process so far."""
    torch.set_num_threads(1)
    return [*by_rows(), "", *by_steps(most)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    print("\n".join(table(parser.parse_args().steps)))


if __name__ == "__main__":
    main()
