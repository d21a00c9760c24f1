"""The compiled CPU kernel against `numpy.dot`, which reads as fast as memory allows, and the naive loop: python benchmarks/kernel.py.

Interleaved in one process; medians, and medians of paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from paramwatch.measure import native

THREADS = 1


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def naive(x: Tensor) -> list[float]:
    """What one writes by hand."""
    bad = [x.isnan().sum().item(), (x == torch.inf).sum().item(), (x == -torch.inf).sum().item(), (x == 0).sum().item()]
    return [*bad, x.mean().item(), x.std(correction=0).item(), x.norm().item(), x.min().item(), x.max().item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="of each contestant")
    parser.add_argument("--mebibytes", type=int, default=512)
    options = parser.parse_args()
    if not native.available():
        print("not run: there is no compiled kernel (see the line above)")
        return
    torch.set_num_threads(THREADS)
    size = options.mebibytes << 20
    print(f"torch {torch.__version__}, numpy {np.__version__}, {THREADS} thread, {options.mebibytes} MiB; GB/s of tensor bytes")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(size // 4).to(dtype)[: size // dtype.itemsize]
        copy, old, plain = torch.empty_like(x), x.clone(), np.ones(size // 4, dtype=np.float32)
        contestants: dict[str, Callable[[], object]] = {
            "numpy.dot": lambda plain=plain: np.dot(plain, plain),
            "statistics": lambda x=x: native.parts_of([x]),
            "and a copy": lambda x=x, copy=copy: native.parts_of([x], [copy]),
            "update": lambda x=x, old=old: native.update_parts([x], [old]),
        }
        bytes_read = {name: plain.nbytes if name == "numpy.dot" else x.nbytes for name in contestants}
        if dtype is torch.float32:
            contestants["naive loop"], bytes_read["naive loop"] = (lambda x=x: naive(x)), x.nbytes
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for name, work in contestants.items():
                taken[name].append(bytes_read[name] / seconds(work) / 1e9)
        for name, rates in taken.items():
            ratio = statistics.median(mine / dot for mine, dot in zip(rates, taken["numpy.dot"], strict=True))
            print(f"{dtype!s:16} {name:12} {statistics.median(rates):6.2f} GB/s, {ratio:5.2f} x numpy.dot")
    small = [torch.randn(64) for _ in range(1000)]
    spent = [seconds(lambda: native.parts_of([x for x in small if native.takes(x)])) for _ in range(50 * options.rounds)]
    print(f"1000 tensors of 64 elements: {statistics.median(spent) * 1e3:.2f} us each, addresses gathered")


if __name__ == "__main__":
    main()
