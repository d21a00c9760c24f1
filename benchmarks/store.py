"""What the store costs: python benchmarks/store.py [--steps N]. Prints Markdown tables.

In the background: the processor time in which the store takes a step, compresses it and writes it, and the bytes of a value. On the
training thread: from when a round is closed until the background thread has it. Nothing is copied there; what measuring takes is in
`monitored_step.py`. Times are medians over steps, of the processor time of one thread. And memory over a long run.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from records import inventory

import paramwatch
from paramwatch.batch import Batch
from paramwatch.columns import PARTS
from paramwatch.record import Changes, Inventory
from paramwatch.store import DiskFolder, MemoryFolder, Store

NUMEL = (589_824, 768, 589_824, 768, 589_824, 768, 589_824, 768, 2_359_296, 3072, 2_359_296, 768)
"""Elements of the rows: what a block of a transformer has, again and again."""


def noisy(net: Inventory, first: int, n: int) -> Batch:
    """Steps in which all real numbers are noise, and whole ones stay as they are."""
    rows, random = len(net.rows), np.random.default_rng(first)
    shape = n, len(net.kinds), rows
    values = {}
    for part in dict.fromkeys(PARTS[name] for _, name in net.layout):
        whole = np.resize(NUMEL, rows) if part.name == "count" else 0
        # numpy's zeros are in no memory yet, and it is not the store that has to find some
        values[part.name] = np.full(shape, whole) if part.integer else random.standard_normal(shape, np.float32).astype(part.dtype)
    steps = {"skipped": [False] * n, "evaluations": [1] * n, "update_mode": ["exact"] * n, "overhead_us": [10.0] * n}
    lr, state = np.full((n, rows), 0.1), np.zeros((n, rows), np.int8)
    return Batch(net, range(first, first + n), [0.0] * n, steps, values, np.ones(rows, bool), lr, state, [Changes()] * n)


def writing(rows: int, steps: int) -> tuple[float, float]:
    """Milliseconds of the background thread for a step, and bytes for a value."""
    size, net = max(1, min(256, 4_000_000 // (700 * rows))), inventory(*map(str, range(rows)))
    spent = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(DiskFolder(Path(folder)), max_bytes=10**12)
        store.write(noisy(net, 0, 1).record(0))
        # the first batch of a process takes a second of imports
        store.flush()
        # as many steps as are written at once
        together = -(-store._kept_steps.most // size) * size
        for first in range(1, max(steps, 8 * together), together):
            # noise anew: what is the same again would compress
            given = [noisy(net, each, size) for each in range(first, first + together, size)]
            start = time.thread_time()
            for each in given:
                store.write_batch(each)
            spent.append((time.thread_time() - start) / together * 1e3)
        store.close()
        taken, written = sum(file.stat().st_size for file in Path(folder).iterdir()), len(spent) * together + 1
    # counts that do not change are known after the first of them
    return statistics.median(spent[1:]), taken / (written * rows * len(net.layout))


def handing_over(rows: int, steps: int = 12) -> float:
    """Milliseconds of the training thread for a step, to hand it over to the store's thread."""
    net = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1)) for _ in range(rows)])
    for param in net:
        param.grad = torch.ones(1)
    optimizer, spent = torch.optim.SGD(net.parameters(), lr=0.1), list[float]()
    with tempfile.TemporaryDirectory() as folder, paramwatch.attach(net, folder) as watch:
        # a step by itself, or many that followed each other
        for owner in (watch.recorder._open, watch.recorder.streaks):
            owner._publish = _timed(owner._publish, spent)
        for _ in range(steps):
            optimizer.step()
    return sum(spent) / steps * 1e3


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            spent.append(time.thread_time() - start)

    return call


def growth(steps: int) -> tuple[float, float]:
    """Resident megabytes after a tenth of the steps, and after all of them."""
    store, batch, seen = Store(MemoryFolder(), max_bytes=64_000_000), noisy(inventory(*"abcdefgh"), 0, 256), []
    store.write(batch.record(0))
    for first in range(1, steps, 256):
        store.write_batch(replace(batch, step=range(first, first + 256)))
        if first // 256 == steps // 2560 or first + 256 >= steps:
            seen.append(_resident())
    return seen[0], seen[-1]


def _resident() -> float:
    if os.path.exists("/proc/self/statm"):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="of the long run in memory")
    options = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"numpy {np.__version__}, pyarrow {pa.__version__}; every value noise, {len(inventory('a').layout)} values a row\n")
    print("| rows | values a step | background ms a step | training thread ms a step | bytes a value |\n|---|---|---|---|---|")
    # 11,250 rows have as many values as 15,000 rows of 12 numbers for two tensors each
    for rows, steps in ((6, 4096), (150, 2048), (1500, 512), (11_250, 64), (15_000, 48)):
        (spent, taken), handed = writing(rows, steps), handing_over(rows)
        print(f"| {rows:,} | {rows * len(inventory('a').layout):,} | {spent:.3f} | {handed:.4f} | {taken:.2f} |")
    early, late = growth(options.steps)
    print(f"\n{options.steps:,} steps of 8 rows in memory, 64 MB: {early:.0f} MB resident after a tenth of them, {late:.0f} MB at the end")


if __name__ == "__main__":
    main()
