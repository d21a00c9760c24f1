"""The GPU kernels against a copy on the device: bandwidth of large tensors, cost of many small ones, and a model's worth of both.

python benchmarks/gpu_bandwidth.py [--rounds N]

All contestants take turns in one process; ratios are medians over the rounds, each against the copy of its own round. Bytes count once for
each time that they have to be read or written: twice for a copy, once for a measurement, twice for one that copies or that compares.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paramwatch.measure import gpu, trusted
from paramwatch.measure.naive import as_reals, parts

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


def compare(contestants: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> None:
    """A line for each: milliseconds, GB/s, and GB/s over those of the first.

    Args:
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
        print(f"  {name:34} {took * 1e3:9.3f} ms {statistics.median(rates) / 1e9:7.0f} GB/s {ratio:6.2f}")


def check(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """No times of what gives wrong numbers."""
    update, itself = gpu.measure_update(tensors, before)
    torch.testing.assert_close(gpu.measure(tensors), itself, rtol=0, atol=0, equal_nan=True)
    for i in {0, len(tensors) - 1}:
        new, old = as_reals(tensors[i]), as_reals(before[i])
        torch.testing.assert_close(itself[i], parts(new), rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(update[i], parts(new - old), rtol=1e-5, atol=1e-6, equal_nan=True)


def large(dtype: torch.dtype, rounds: int) -> None:
    x = torch.randn(LARGE // dtype.itemsize, device="cuda").to(dtype)
    y, old, grad = torch.empty_like(x), x * 0.99, x * 0.5
    check([x], [old])
    print(f"one tensor of 512 MiB, {dtype}")
    compare(
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


def small(rounds: int) -> None:
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
    print(f"{SMALL} tensors of 64 elements")
    print(f"  on the host   {statistics.median(host) / SMALL * 1e6:6.3f} us a tensor, the call {statistics.median(host) * 1e3:.2f} ms")
    print(f"  on the device {statistics.median(device) / SMALL * 1e6:6.3f} us a tensor, the call {statistics.median(device) * 1e3:.2f} ms")


def gpt2(dtype: torch.dtype, rounds: int) -> None:
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
    print(f"a model of {sum(x.numel() for x in weights) / 1e6:.0f} M parameters in {len(weights)} tensors, {dtype}")

    def everything() -> None:
        gpu.measure(weights, copies)
        gpu.measure(grads)
        gpu.measure_update(moved, copies)

    compare(
        {
            "copy on the device": (2 * size, lambda: torch._foreach_copy_(copies, weights)),
            "parameters, with a copy": (2 * size, lambda: gpu.measure(weights, copies)),
            "gradients": (size, lambda: gpu.measure(grads)),
            "update": (2 * size, lambda: gpu.measure_update(moved, copies)),
            "all of a step": (5 * size, everything),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        print("not run: no GPU")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if not trusted.works(device, torch.float32):
        sys.exit("not run: the kernels cannot be used here")
    import triton

    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        large(dtype, rounds)
    small(rounds)
    for dtype in (torch.float32, torch.bfloat16):
        gpt2(dtype, rounds)


if __name__ == "__main__":
    main()
