"""A training step with and without paramwatch: every step, default statistics, exact update, written to a run, one torch thread.

python benchmarks/monitored_step.py [--rounds N]

All take turns in one process; `bare again` is the control, and shows what differences mean nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import torch
from reporting import arguments, report
from workloads import TESTS, Workload, step_hooks, step_of, take_turns, workloads

import paramwatch

AIMS = {"shared MLP": "1.10, 30 µs", "CNN, ResNet-18 layout": "1.02", "GPT": "1.03"}


def rows_of(work: Workload, rounds: int) -> Iterator[str]:
    """Lines of the table."""
    nets = [work.make() for _ in range(3)]
    optimizers = [work.optimizer(net) for net in nets]
    steps = {
        name: step_of(work, net, optimizer)
        for name, net, optimizer in zip(("bare", "watched", "bare again"), nets, optimizers, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder, paramwatch.attach(nets[1], folder, update="exact") as watch:
        costs = take_turns(steps, work.block, rounds, {"watched": step_hooks()})
        own = watch.steps["overhead_us"].median()
        rows = len(watch.parameters)
    size = sum(param.numel() for param in nets[0].parameters())
    watched, again = costs["watched"], costs["bare again"]
    yield (
        f"| {work.name}, {rows} rows, {size:,} elements | {costs['bare'].step_us:,.0f} | **{watched.wall:.3f}** | {watched.cpu:.3f} "
        f"| {watched.more_us:,.0f} | {own:,.0f} | {again.wall:.3f} | {AIMS[work.name]} |"
    )


def table(rounds: int | None = None, tiny: bool = False) -> list[str]:
    """The table, as Markdown."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = [
        "| model | bare step, µs | watched, wall | CPU | CPU more, µs | `overhead_us` | bare again | aim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        for work in workloads(tiny):
            lines += rows_of(work, 1 if tiny else rounds or (200 if work.block > 1 else 15))
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="of each contestant; by default 200 for the MLP and 15 for the large models")
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.rounds, options.tiny))


if __name__ == "__main__":
    main()
