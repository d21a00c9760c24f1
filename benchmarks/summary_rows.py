"""`paramwatch.summary` on 15,000 rows, best and median of several calls: python benchmarks/summary_rows.py."""

from __future__ import annotations

import statistics
import time

from torch import nn

import paramwatch


def main() -> None:
    for width in (8, 16, 32, 64):
        net = nn.ModuleList(nn.Linear(width, width) for _ in range(7500))
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            paramwatch.summary(net)
            spent.append(time.perf_counter() - start)
        print(f"7,500 x Linear({width}, {width}): best {min(spent):.2f} s, median {statistics.median(spent):.2f} s")


if __name__ == "__main__":
    main()
