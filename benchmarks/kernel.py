"""The compiled CPU kernel against `numpy.dot`, which reads as fast as memory allows, and the naive loop.

python benchmarks/kernel.py [--rounds N] [--mebibytes N]

Interleaved in one process; medians, and medians of paired ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from reporting import arguments, report
from torch import Tensor

from paramwatch.columns import PARTS
from paramwatch.measure import native
from paramwatch.measure.forms import Forms

TESTS = ("test_native.py", "test_measure.py")

THREADS = 1


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def naive(x: Tensor) -> list[float]:
    """What one writes by hand."""
    bad = [x.isnan().sum().item(), (x == torch.inf).sum().item(), (x == -torch.inf).sum().item(), (x == 0).sum().item()]
    return [*bad, x.mean().item(), x.std(correction=0).item(), x.norm().item(), x.min().item(), x.max().item()]


def table(rounds: int = 9, mebibytes: int = 512, tiny: bool = False) -> list[str]:
    """The table, as Markdown."""
    rounds, mebibytes = (1, 1) if tiny else (rounds, mebibytes)
    if not native.available():
        return ["Not run: there is no compiled kernel (its reason is in the log)."]
    torch.set_num_threads(THREADS)
    size = mebibytes << 20
    lines = [f"| {mebibytes} MiB of | what | GB/s of tensor bytes | x `numpy.dot` on float32 |", "|---|---|---|---|"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(size // 4).to(dtype)[: size // dtype.itemsize]
        copy, old, plain = torch.empty_like(x), x.clone(), np.ones(size // 4, dtype=np.float32)
        contestants: dict[str, Callable[[], object]] = {
            "`numpy.dot`": lambda plain=plain: np.dot(plain, plain),
            "all statistics": lambda x=x: native.parts_of([x]),
            "and a copy": lambda x=x, copy=copy: native.parts_of([x], [copy]),
            "update": lambda x=x, old=old: native.update_parts([x], [old]),
        }
        bytes_read = {name: plain.nbytes if name == "`numpy.dot`" else x.nbytes for name in contestants}
        if dtype is torch.float32:
            contestants["naive loop"], bytes_read["naive loop"] = (lambda x=x: naive(x)), x.nbytes
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, work in contestants.items():
                taken[name].append(bytes_read[name] / seconds(work) / 1e9)
        for name, rates in taken.items():
            ratio = statistics.median(mine / dot for mine, dot in zip(rates, taken["`numpy.dot`"], strict=True))
            lines.append(f"| {str(dtype).removeprefix('torch.')} | {name} | {statistics.median(rates):.2f} | {ratio:.2f} |")
    return [*lines, "", small_tensors(50 * rounds)]


def small_tensors(rounds: int) -> str:
    """What many small tensors take each, with their addresses gathered as a step gathers them."""
    small = [torch.randn(64) for _ in range(1000)]
    known, table = Forms(small), native.Table([64] * 1000, [native.TYPES[torch.float32]] * 1000)
    parts = np.empty((1000, len(PARTS)))
    into = parts.__array_interface__["data"][0]

    def measured() -> None:
        assert known.hold(small)
        table.read(list(map(Tensor.data_ptr, small)), into)

    measured()
    np.testing.assert_array_equal(parts, native.parts_of(small))
    spent = statistics.median(seconds(measured) for _ in range(rounds))
    return f"1000 tensors of 64 elements, forms checked and addresses gathered: {spent * 1e3:.2f} µs each (aim 0.3)."


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="of each contestant")
    parser.add_argument("--mebibytes", type=int, default=512)
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.rounds, options.mebibytes, options.tiny))


if __name__ == "__main__":
    main()
