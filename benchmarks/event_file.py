"""What the TensorBoard event file takes of a training: of the training thread, and of a loop of pure Python beside the background thread.

python benchmarks/event_file.py [--pairs N]

Real rounds of a real model are recorded once and then handed, with new step numbers, to two background threads, of which one has the event
file as its only sink and the other none, at the rate of a training: interleaved stretches, medians of paired ratios. It prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from paramwatch import steps
from paramwatch.columns import LAYOUTS
from paramwatch.guard import Guard
from paramwatch.inventory import LiveInventory
from paramwatch.recorder import Recorder
from paramwatch.rounds import Round
from paramwatch.tensorboard.events import EventFile
from paramwatch.worker import Worker

STEP_MS = 10.0
"""A step of the pure Python loop, about: what a training step of 300 tensors takes at the very least."""

STRETCH = 200
"""Steps of one variant before the other has its turn."""


def rounds_of(rows: int) -> list[Round]:
    """A few rounds of a model with so many rows, in blocks of a plain transformer's size."""
    net = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))) for _ in range(-(-rows // 10)))})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found: list[Round] = []
    live = LiveInventory(net, ["*"], [], LAYOUTS["default"])
    recorder = Recorder(live, Guard("", lambda: None), found.append, every=1, update="exact")
    steps.register(recorder)
    try:
        for _ in range(8):
            for param in net.parameters():
                param.grad = torch.randn_like(param)
            optimizer.step()
    finally:
        steps.unregister(recorder)
    recorder.finish()
    return [done for done in found if done.optimizer_steps]


def handed_over(rounds: list[Round]) -> Iterator[Round]:
    """The same rounds over and over, each with a number of its own."""
    step = 0
    while True:
        for done in rounds[1:]:
            yield replace(done, step=step)
            step += 1


def turn(n: int) -> int:
    """Work for the interpreter alone."""
    total = 0
    for i in range(n):
        total += i * i & 7
    return total


def stretch(worker: Worker, rounds: Iterator[Round], n: int) -> tuple[float, list[float]]:
    """Seconds that the loop's own work took, and microseconds of handing each round over."""
    own, handing = 0.0, []
    for _ in range(STRETCH):
        start = time.perf_counter()
        turn(n)
        middle = time.perf_counter()
        worker.submit(next(rounds), "exact")
        handing.append((time.perf_counter() - middle) * 1e6)
        own += middle - start
    worker.flush()
    return own, handing


def compare(rows: int, pairs: int) -> str:
    """A line of the table."""
    n = 10_000
    start = time.perf_counter()
    turn(n)
    n = int(n * STEP_MS / 1e3 / (time.perf_counter() - start))
    with tempfile.TemporaryDirectory() as folder:
        guard = Guard("", lambda: None)
        workers = [Worker(sinks, [], lambda findings: None, guard) for sinks in ([], [EventFile(Path(folder))])]
        feeds = [handed_over(rounds_of(rows)) for _ in workers]
        measured = [[stretch(worker, feed, n) for worker, feed in zip(workers, feeds, strict=True)] for _ in range(pairs + 1)][1:]
        for worker in workers:
            worker.stop(wait=True)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    kept = statistics.median(bare[0] / beside[0] for bare, beside in measured)
    handing = statistics.median(took for _, (_, all_) in measured for took in all_)
    return f"| {rows} | {handing:.1f} | {kept:.1%} | {size / STRETCH / (pairs + 1):,.0f} |"


def table(pairs: int = 12) -> list[str]:
    torch.set_num_threads(1)
    return [
        f"TensorBoard {version('tensorboard')}; steps of {STEP_MS:.0f} ms of pure Python, {pairs} pairs of {STRETCH} steps.",
        "",
        "| rows | handing a step over, us of the training thread | speed the loop keeps beside the event file | bytes a step |",
        "|---|---|---|---|",
        *(compare(rows, pairs) for rows in (8, 300, 1500)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12, help="pairs of stretches")
    print("\n".join(table(parser.parse_args().pairs)))


if __name__ == "__main__":
    main()
