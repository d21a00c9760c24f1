"""`paramwatch.summary` on 15,000 rows: processor and wall time.

python benchmarks/summary_rows.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from reporting import arguments, report
from torch import Tensor, nn
from torch.nn import init

import paramwatch

TESTS = ("test_initial.py", "test_overview.py")

LAYERS, TIMES = 7500, 5


def mixture(w: Tensor) -> None:
    """U(-10, -5), 0 or U(5, 10), half of the elements zero."""
    w.data.uniform_(5, 10).mul_(torch.randint(0, 2, w.shape) * 2 - 1).mul_(torch.rand_like(w) < 0.5)


def rounded(w: Tensor) -> None:
    """A normal law on a grid: many elements are equal, some are zero."""
    w.data.normal_().mul_(20).round_().div_(1000)


FILLS: dict[str, Callable[[Tensor], object]] = {
    "PyTorch default": lambda w: None,
    "normal": lambda w: init.normal_(w, std=0.02),
    "truncated normal": lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
    "moved off its start": lambda w: w.data.add_(torch.randn_like(w), alpha=0.03),
    "Kaiming normal": lambda w: init.kaiming_normal_(w, nonlinearity="relu"),
    "orthogonal": init.orthogonal_,
    "a third zeros": lambda w: init.sparse_(w, 0.3),
    "constant": lambda w: init.constant_(w, 42),
    "normal, bfloat16": lambda w: init.normal_(w, std=0.02),
    "of no law": lambda w: w.data.exponential_(),
    "half zeros, else two-sided": mixture,
    "rounded": rounded,
}

IN_TURN = cycle([fill for name, fill in FILLS.items() if not name.endswith("bfloat16")])
FILLS["each of these in turn"] = lambda w: next(IN_TURN)(w)


def table(tiny: bool = False) -> Iterator[str]:
    """The table, as Markdown."""
    layers, widths, times = (2, (8,), 1) if tiny else (LAYERS, (8, 16, 32, 64), TIMES)
    yield f"{layers:,} layers of two rows each."
    yield ""
    yield "| layer | weights | processor, best | processor, median | wall, best | wall, median |"
    yield "|---|---|---|---|---|---|"
    for name, fill in FILLS.items():
        for width in widths:
            net = net_of(layers, width, fill)
            cpu, wall = spent(net.to(torch.bfloat16) if name.endswith("bfloat16") else net, times)
            cells = [f"{of(seconds):.2f} s" for seconds in (cpu, wall) for of in (min, statistics.median)]
            yield f"| Linear({width}, {width}) | {name} | {' | '.join(cells)} |"


def net_of(layers: int, width: int, fill: Callable[[Tensor], object]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
    for layer in net:
        fill(layer.weight)
    return net


def spent(net: nn.Module, times: int) -> tuple[list[float], list[float]]:
    """Seconds, of the processor and on the wall."""
    cpu, wall = [], []
    for _ in range(times):
        processor, start = time.process_time(), time.perf_counter()
        paramwatch.summary(net)
        cpu.append(time.process_time() - processor)
        wall.append(time.perf_counter() - start)
    return cpu, wall


def main() -> None:
    options = arguments(__doc__).parse_args()
    report(TESTS, options, lambda: table(options.tiny))


if __name__ == "__main__":
    main()
