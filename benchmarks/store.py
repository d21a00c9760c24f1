"""What the store costs.

python benchmarks/store.py [--steps N]

In the background: the processor time in which the store takes a step, compresses it and writes it, and the bytes of a value. On the
training thread: from when a round is closed until the background thread has it. Nothing is copied there; what measuring takes is in
`monitored_step.py`. Times are medians over steps, of the processor time of one thread. And memory over a long run, and the two sizes that
docs/format.md states.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from reporting import arguments, report

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from records import inventory

import paramwatch
from paramwatch.batch import Batch
from paramwatch.columns import PARTS
from paramwatch.handover import Handover
from paramwatch.record import Changes, Inventory
from paramwatch.store import BATCH_BYTES, BATCH_STEPS, DiskFolder, MemoryFolder, Store

TESTS = ("test_store.py", "test_batching.py", "test_worker.py")

SIZES = ((6, 4096), (150, 2048), (1500, 512), (11_250, 64), (15_000, 48))
"""Rows and steps. 11,250 rows have as many values as 15,000 rows of 12 numbers for two tensors each."""

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
        # about as many steps as are written at once
        together = ceil(min(BATCH_STEPS, ceil(BATCH_BYTES / (4 * rows * len(net.layout)))) / size) * size
        for first in range(1, max(steps, 8 * together), together):
            # noise anew: what is the same again would compress
            given = [noisy(net, each, size) for each in range(first, first + together, size)]
            start = time.thread_time()
            for each in given:
                store.write_batch(each)
            store.flush()
            spent.append((time.thread_time() - start) / together * 1e3)
        store.close()
        taken, written = sum(file.stat().st_size for file in Path(folder).iterdir()), len(spent) * together + 1
    # counts that do not change are known after the first of them
    return statistics.median(spent[1:]), taken / (written * rows * len(net.layout))


def unchanging(rows: int, batches: int = 4, steps: int = 8) -> float:
    """Bytes for a float32, of real numbers that are all different and never change: of 15,000 rows eight steps are a batch."""
    net = inventory(*map(str, range(rows)))
    one = noisy(net, 0, 1)
    same = replace(
        one,
        time=[0.0] * steps,
        steps={key: list(column) * steps for key, column in one.steps.items()},
        values={name: np.repeat(values, steps, axis=0) for name, values in one.values.items()},
        lr=np.repeat(one.lr, steps, axis=0),
        grad_state=np.repeat(one.grad_state, steps, axis=0),
        changes=[Changes()] * steps,
    )
    following = [replace(same, step=range(1 + i * steps, 1 + (i + 1) * steps)) for i in range(batches)]
    return _bytes(net, following) / (batches * steps * rows * sum(not PARTS[part].integer for _, part in net.layout))


def of_a_batch(rows: int, batches: int = 20) -> float:
    """Bytes of a batch of one step, as is written after 5 s if there was no other step."""
    net = inventory(*map(str, range(rows)))
    return _bytes(net, [noisy(net, 1 + i, 1) for i in range(batches)]) / batches


def _bytes(net: Inventory, batches: Sequence[Batch]) -> int:
    """What batches that are written one by one take beside one that is there."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(DiskFolder(Path(folder)), max_bytes=10**12)
        store.write(noisy(net, 0, 1).record(0))
        store.flush()
        before = sum(file.stat().st_size for file in Path(folder).iterdir())
        for batch in batches:
            store.write_batch(batch)
            store.flush()
        taken = sum(file.stat().st_size for file in Path(folder).iterdir()) - before
        store.close()
    return taken


def handing_over(rows: int, steps: int = 12) -> float:
    """Milliseconds of the training thread for a step, to hand it over to the store's thread."""
    net = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1)) for _ in range(rows)])
    for param in net:
        param.grad = torch.ones(1)
    optimizer, spent = torch.optim.SGD(net.parameters(), lr=0.1), list[float]()
    timed = mock.patch.object(Handover, "take", _timed(Handover.take, spent))
    with timed, tempfile.TemporaryDirectory() as folder, paramwatch.attach(net, folder):
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


def table(steps: int = 1_000_000, tiny: bool = False) -> Iterator[str]:
    """The table, as Markdown, and a line on memory."""
    yield f"pyarrow {pa.__version__}; every value noise, {len(inventory('a').layout)} values a row."
    yield ""
    yield "| rows | values a step | background ms a step | training thread ms a step | bytes a value |"
    yield "|---|---|---|---|---|"
    for rows, count in ((6, 1),) if tiny else SIZES:
        (spent, taken), handed = writing(rows, count), handing_over(rows)
        yield f"| {rows:,} | {rows * len(inventory('a').layout):,} | {spent:.3f} | {handed:.4f} | {taken:.2f} |"
    steps = 512 if tiny else steps
    early, late = growth(steps)
    yield ""
    yield f"{steps:,} steps of 8 rows in memory, 64 MB: {early:.0f} MB resident after a tenth of them, {late:.0f} MB at the end."
    rows = 6 if tiny else 15_000
    yield ""
    yield f"Of {rows:,} different numbers that never change a float32 takes {unchanging(rows):.1f} bytes."
    yield f"A batch of one step of 6 rows takes {of_a_batch(6) / 1e3:.1f} kB."


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="of the long run in memory")
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.steps, options.tiny))


if __name__ == "__main__":
    main()
