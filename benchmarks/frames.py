"""What reading a run costs.

python benchmarks/frames.py [--steps N] [--rows N]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
from reporting import arguments, report
from store import inventory, noisy

from paramwatch.loading import load
from paramwatch.run import Run
from paramwatch.store import DiskFolder, Store

TESTS = ("test_frames.py", "test_run.py", "test_store.py")

QUESTIONS: dict[str, Callable[[Run], object]] = {
    'frame("grad_norm", parameters="7")': lambda run: run.frame("grad_norm", parameters="7"),
    'frame("grad_norm")': lambda run: run.frame("grad_norm"),
    'frame("grad_norm", by="layer")': lambda run: run.frame("grad_norm", by="layer"),
    "frame(steps=slice(100, 200))": lambda run: run.frame(steps=slice(100, 200)),
    "frame()": lambda run: run.frame(),
    "steps": lambda run: run.steps,
    "repr": repr,
}


def table(rows: int = 1500, steps: int = 2112, tiny: bool = False) -> Iterator[str]:
    """The table, as Markdown."""
    rows, steps = (8, 20) if tiny else (rows, steps)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(DiskFolder(Path(folder)), max_bytes=10**12)
        batch = noisy(inventory(*map(str, range(rows))), 0, size := min(64, steps))
        store.write(batch.record(0))
        for first in range(1, steps, size):
            store.write_batch(replace(batch, step=range(first, first + size)))
        store.close()
        values = steps * rows * len(batch.inventory.layout) / 1e6
        yield f"pandas {pd.__version__}, pyarrow {pa.__version__}; {values:.0f} M values, best of 3."
        yield from ("", "| question | ms |", "|---|---|")
        for question, ask in QUESTIONS.items():
            yield f"| `{question}` | {min(_ms(ask, load(folder)) for _ in range(3)):.0f} |"


def _ms(ask: Callable[[Run], object], run: Run) -> float:
    start = time.perf_counter()
    ask(run)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2112)
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.rows, options.steps, options.tiny))


if __name__ == "__main__":
    main()
