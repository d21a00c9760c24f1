"""How the cost of a step grows with the number of rows, and that it does not with the number of steps.

python benchmarks/growth.py [--steps N]

Time is CPU time of the whole process, the background thread included, more than that of the same step bare.
"""

from __future__ import annotations

import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable

import torch
from reporting import arguments, report
from torch import nn
from workloads import TESTS

import paramwatch

ROWS, STEPS = (10, 100, 1000, 5000, 15_000), (1000, 10_000, 100_000)


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


def by_rows(sizes: Iterable[int], most: int) -> list[str]:
    lines = [
        "| rows | bare step, µs | CPU more, µs | of it, on the training thread | µs a row on the training thread |",
        "|---|---|---|---|---|",
    ]
    for rows in sizes:
        steps = max(3, most // rows)
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


def by_steps(lengths: Iterable[int]) -> list[str]:
    lines = ["| steps | `overhead_us` of the last tenth | memory, MiB |", "|---|---|---|"]
    net = model(6)
    optimizer = with_gradients(net)
    with tempfile.TemporaryDirectory() as folder, paramwatch.attach(net, folder, update="exact") as watch:
        done = 0
        for steps in lengths:
            while done < steps:
                optimizer.step()
                done += 1
            watch.flush()
            gc.collect()
            own = watch.steps["overhead_us"]
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            lines.append(f"| {steps:,} | {own[own.index >= steps * 9 // 10].median():,.0f} | {memory:,.0f} |")
    return lines


def table(most: int = STEPS[-1], tiny: bool = False) -> list[str]:
    """Both tables, as Markdown; memory is the largest of the process so far."""
    torch.set_num_threads(1)
    if tiny:
        return [*by_rows((10,), 30), "", *by_steps((20,))]
    return [*by_rows(ROWS, 3000), "", *by_steps(steps for steps in STEPS if steps <= most)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS[-1], help="the longest run")
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.steps, options.tiny))


if __name__ == "__main__":
    main()
