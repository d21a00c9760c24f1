"""`paramwatch.summary` on 15,000 rows: processor and wall time.

python benchmarks/summary_rows.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch
from reporting import arguments, report
from torch import Tensor, nn
from torch.nn import init

import paramwatch

TESTS = ("test_initial.py", "test_overview.py")

LAYERS, TIMES = 7500, 5

SIDE = 87
"""So many widths there are: of 8 to 94, 7569 shapes."""


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
    for name in FILLS:
        for width in widths:
            yield line(f"Linear({width}, {width})", name, net_of([(width, width)] * layers, name), times)
    # as many as there are layers, none twice
    shapes = [(8 + i % SIDE, 8 + i // SIDE) for i in range(layers)]
    for name in FILLS:
        yield line("each of another shape", name, net_of(shapes, name), times)


def net_of(shapes: Sequence[tuple[int, int]], name: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(*shape) for shape in shapes)
    for layer in net:
        FILLS[name](layer.weight)
    return net.to(torch.bfloat16) if name.endswith("bfloat16") else net


def line(layer: str, name: str, net: nn.Module, times: int) -> str:
    """Of the table."""
    cells = [f"{of(seconds):.2f} s" for seconds in spent(net, times) for of in (min, statistics.median)]
    return f"| {layer} | {name} | {' | '.join(cells)} |"


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
