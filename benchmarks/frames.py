"""What reading a run costs: python benchmarks/frames.py [--steps N] [--rows N]. Prints a Markdown table."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
from store import inventory, noisy

from paramwatch.loading import load
from paramwatch.run import Run
from paramwatch.store import DiskFolder, Store

QUESTIONS: dict[str, Callable[[Run], object]] = {
    'frame("grad_norm", parameters="7")': lambda run: run.frame("grad_norm", parameters="7"),
    'frame("grad_norm")': lambda run: run.frame("grad_norm"),
    'frame("grad_norm", by="layer")': lambda run: run.frame("grad_norm", by="layer"),
    "frame(steps=slice(100, 200))": lambda run: run.frame(steps=slice(100, 200)),
    "frame()": lambda run: run.frame(),
    "steps": lambda run: run.steps,
    "repr": repr,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2112)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(DiskFolder(Path(folder)), max_bytes=10**12)
        batch = noisy(inventory(*map(str, range(options.rows))), 0, size := min(64, options.steps))
        store.write(batch.record(0))
        for first in range(1, options.steps, size):
            store.write_batch(replace(batch, step=range(first, first + size)))
        store.close()
        values = options.steps * options.rows * len(batch.inventory.layout) / 1e6
        print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
        print(f"pandas {pd.__version__}, pyarrow {pa.__version__}; {values:.0f} M values, best of 3\n\n| question | ms |\n|---|---|")
        for question, ask in QUESTIONS.items():
            print(f"| `{question}` | {min(_ms(ask, load(folder)) for _ in range(3)):.0f} |")


def _ms(ask: Callable[[Run], object], run: Run) -> float:
    start = time.perf_counter()
    ask(run)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
