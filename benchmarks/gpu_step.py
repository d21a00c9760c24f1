"""The share of a training step on a GPU that watching takes: every step, default statistics, exact update, for two sizes of GPT.

python benchmarks/gpu_step.py [--rounds N] [--tiny]

Mixed precision (bfloat16 by autocast, parameters in float32), fused AdamW. The bare model and the watched one take turns in one process;
the bare one is timed twice, and what is less than the distance of `bare again` from 1 means nothing. Without a GPU it says "not run".
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reporting import arguments, report
from torch.nn import functional
from workloads import GPT

import paramwatch

TESTS = ("test_ring.py", "test_deviceplan.py", "test_gpu.py", "test_gpu_watched.py") if torch.cuda.is_available() else ()

AIM = "1 %"


@dataclass(frozen=True)
class Size:
    """A model, and the batch of one step."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    batch: int


SIZES = (
    Size("GPT-2 layout", 12, 768, 12, 50257, 1024, 8),
    Size("GPT of a billion", 18, 2048, 16, 50257, 1024, 4),
)
TINY = (Size("GPT, tiny", 2, 32, 4, 101, 16, 2),)
"""To see that this file runs; also on a CPU."""

BLOCK = 4
"""Steps that are timed together."""


def training(size: Size, device: torch.device) -> tuple[GPT, Callable[[], None]]:
    """A model, and a step of its training."""
    net = GPT(size.layers, size.width, size.vocabulary, size.length, size.heads).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    text = torch.randint(size.vocabulary, (size.batch, size.length + 1), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = functional.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    return net, step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one step, on average over a block that nobody waits inside of."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(BLOCK):
        step()
    wait()
    return (time.perf_counter() - start) / BLOCK


def row(size: Size, device: torch.device, rounds: int) -> str:
    """A line of the table."""
    elements = sum(p.numel() for p in GPT(size.layers, size.width, size.vocabulary, size.length, size.heads).to("meta").parameters())
    known = f"| {size.name}, {elements / 1e6:,.0f} M parameters, {size.batch} x {size.length} tokens "
    # two models with their gradients and the state of Adam, a copy of one, and activations
    needed = 4 * elements * (2 * 4 + 1) + size.batch * size.length * (40 * size.layers * size.width + 12 * size.vocabulary)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needed:
        return f"{known}| not run: {needed / 1e9:.0f} GB are not free | | | | | |"
    (_, bare), (net, watched) = (training(size, device) for _ in range(2))
    contestants = {"bare": bare, "watched": watched, "bare again": bare}
    with tempfile.TemporaryDirectory() as folder, paramwatch.attach(net, folder, update="exact") as watch:
        for step in contestants.values():
            seconds(step, device)
        times = [{name: seconds(step, device) for name, step in contestants.items()} for _ in range(rounds)]
        steps = watch.steps.iloc[-rounds * BLOCK :]
    took = statistics.median(each["bare"] for each in times)
    ratio, again = (statistics.median(each[name] / each["bare"] for each in times) for name in ("watched", "bare again"))
    own, host = steps["overhead_us"].median(), steps.get("overhead_host_us", steps["overhead_us"]).median()
    return f"{known}| {took * 1e3:,.2f} | **{ratio:.4f}** | {again:.4f} | {own:,.0f} | **{own / took / 1e4:.2f} %** | {host:,.0f} | {AIM} |"


def table(rounds: int | None = None, tiny: bool = False) -> list[str] | None:
    """The table, as Markdown; None where there is no GPU."""
    if not torch.cuda.is_available() and not tiny:
        return None
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: these numbers say nothing"
    return [
        f"{name}.",
        "",
        "| model | bare step, ms | watched / bare | bare again | `overhead_us` | of the step | `overhead_host_us` | aim |",
        "|---|---|---|---|---|---|---|---|",
        *(row(size, device, 1 if tiny else rounds or 15) for size in (TINY if tiny else SIZES)),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.rounds, options.tiny))


if __name__ == "__main__":
    main()
