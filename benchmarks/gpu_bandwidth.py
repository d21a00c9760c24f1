"""The GPU kernels against a copy on the device: bandwidth of large tensors, cost of many small ones, and a model's worth of both.

python benchmarks/gpu_bandwidth.py [--rounds N]

All contestants take turns in one process; ratios are medians over the rounds, each against the copy of its own round. Bytes count once for
each time that they have to be read or written: twice for a copy, once for a measurement, twice for one that copies or that compares.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from reporting import arguments, report
from torch import Tensor

from paramwatch.measure import gpu, trusted
from paramwatch.measure.naive import as_reals, parts

TESTS = ("test_gpu.py", "test_gpu_device.py") if torch.cuda.is_available() else ()

LARGE = 512 << 20
"""Bytes of a large tensor: ten times what a cache holds."""

SMALL = 15_000
"""Tensors of 64 elements."""

AHEAD = 4_000_000
"""Cycles that the device sleeps before each timed call: the host has queued all of it by then, so that the time is the device's own."""


def seconds(run: Callable[[], object], ahead: int = AHEAD) -> float:
    """On the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(ahead)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def compare(tensors: str, contestants: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> Iterator[str]:
    """A line for each: milliseconds, GB/s, and GB/s over those of the first.

    Args:
        tensors: What is moved.
        contestants: By name: how many bytes it moves, and what it does.
        rounds: How often each is timed.
    """
    for _, run in contestants.values():
        run()
    torch.cuda.synchronize()
    times = [{name: seconds(run) for name, (_, run) in contestants.items()} for _ in range(rounds)]
    first = next(iter(contestants))
    for name, (size, _) in contestants.items():
        rates = [size / each[name] for each in times]
        ratio = statistics.median(rate / (contestants[first][0] / each[first]) for rate, each in zip(rates, times, strict=True))
        took = statistics.median(each[name] for each in times)
        yield f"| {tensors} | {name} | {took * 1e3:.3f} | {statistics.median(rates) / 1e9:,.0f} | {ratio:.2f} |"


def check(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """No times of what gives wrong numbers."""
    update, itself = gpu.measure_update(tensors, before)
    torch.testing.assert_close(gpu.measure(tensors), itself, rtol=0, atol=0, equal_nan=True)
    for i in {0, len(tensors) - 1}:
        new, old = as_reals(tensors[i]), as_reals(before[i])
        torch.testing.assert_close(itself[i], parts(new), rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(update[i], parts(new - old), rtol=1e-5, atol=1e-6, equal_nan=True)


def large(dtype: torch.dtype, rounds: int) -> Iterator[str]:
    """One tensor."""
    x = torch.randn(LARGE // dtype.itemsize, device="cuda").to(dtype)
    y, old, grad = torch.empty_like(x), x * 0.99, x * 0.5
    check([x], [old])
    yield from compare(
        f"512 MiB of {_name(dtype)}",
        {
            "copy on the device": (2 * LARGE, lambda: y.copy_(x)),
            "measure": (LARGE, lambda: gpu.measure([x])),
            "measure and copy": (2 * LARGE, lambda: gpu.measure([x], [y])),
            "measure an update": (2 * LARGE, lambda: gpu.measure_update([x], [old])),
            "measure an update and its gradient": (3 * LARGE, lambda: gpu.measure_update([x], [old], [grad])),
            "the norm alone": (LARGE, lambda: torch.linalg.vector_norm(x)),
        },
        rounds,
    )


def small(rounds: int) -> str:
    """What a tensor costs by itself: on the host, until the call returns, and on the device."""
    tensors, others = ([torch.randn(64, device="cuda") for _ in range(SMALL)] for _ in range(2))
    check(tensors, others)
    host, device = [], []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        gpu.measure(tensors)
        host.append(time.perf_counter() - start)
        device.append(seconds(lambda: gpu.measure(tensors), 10 * AHEAD))
    each = (f"{statistics.median(spent) / SMALL * 1e6:.3f} µs each on the {where}" for where, spent in (("host", host), ("device", device)))
    return f"{SMALL:,} tensors of 64 elements: {', '.join(each)}."


def gpt2(dtype: torch.dtype, rounds: int) -> Iterator[str]:
    """Everything that a step of a model with the shapes of GPT-2 asks for."""
    width = 768
    block = [(width,)] * 4 + [
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    shapes = [(50257, width), (1024, width), *block * 12, (width,), (width,)]
    weights = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    grads, copies = [x * 1e-3 for x in weights], [torch.empty_like(x) for x in weights]
    moved = [x * 0.999 for x in weights]
    check(moved, weights)
    size = sum(x.nbytes for x in weights)

    def everything() -> None:
        gpu.measure(weights, copies)
        gpu.measure(grads)
        gpu.measure_update(moved, copies)

    yield from compare(
        f"GPT-2, {sum(x.numel() for x in weights) / 1e6:.0f} M elements in {len(weights)} tensors of {_name(dtype)}",
        {
            "copy on the device": (2 * size, lambda: torch._foreach_copy_(copies, weights)),
            "parameters, with a copy": (2 * size, lambda: gpu.measure(weights, copies)),
            "gradients": (size, lambda: gpu.measure(grads)),
            "update": (2 * size, lambda: gpu.measure_update(moved, copies)),
            "all of a step": (5 * size, everything),
        },
        rounds,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rounds: int = 30, tiny: bool = False) -> list[str] | None:
    """The table, as Markdown; None where there is no GPU."""
    rounds = 1 if tiny else rounds
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    if not trusted.works(device, torch.float32):
        return ["Not run: the kernels cannot be used here (the reason is in the log)."]
    import triton

    lines = [f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}.", ""]
    lines += ["| tensors | what | ms | GB/s | x copy |", "|---|---|---|---|---|"]
    for dtype in (torch.float32, torch.bfloat16):
        lines += [*large(dtype, rounds), *gpt2(dtype, rounds)]
    return [*lines, "", small(rounds)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    report(TESTS, options, lambda: table(options.rounds, options.tiny))


if __name__ == "__main__":
    main()
