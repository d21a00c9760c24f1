"""Numbers of elements that carry a factor (a `GradScaler`'s), without it. Nobody waits for the factor, wherever it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from paramwatch.measure.naive import ORDER
from paramwatch.measure.reading import Numbers


def unscaled(numbers: Sequence[Numbers], scale: Tensor | None, columns: Sequence[int]) -> Sequence[Numbers]:
    """The same numbers, [n, parts] each, with these columns divided by the factor."""
    if scale is None:
        return numbers
    factor, found = scale.detach().to(torch.float64).reshape(()), []
    for positions, wide in numbers:
        tensor = wide if isinstance(wide, Tensor) else torch.from_numpy(wide)
        if tensor.is_cpu and factor.is_cuda:
            tensor = sent(tensor, factor.device)
        elif factor.is_cuda and factor.device != tensor.device:
            factor = factor.to(tensor.device, non_blocking=True)
        # a factor on the CPU goes along as a plain number
        chosen = mask(tuple(columns), tensor.device, stream_of(tensor.device))
        found.append((positions, tensor / torch.where(chosen, factor, 1.0)))
    return found


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device. From ordinary memory it would be waited for; from pinned memory, which torch keeps until then, it is not."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and tensor.is_cpu else tensor.to(device)


def stream_of(device: torch.device) -> int:
    """Where work is queued now: what was sent on one stream need not have arrived for another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=32)
def mask(columns: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Which parts are divided."""
    return sent(torch.tensor([i in columns for i in range(len(ORDER))], device="cpu"), device)
