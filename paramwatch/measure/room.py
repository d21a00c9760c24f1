"""Whether there is room for a copy of the parameters, asked once per run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SHARE_OF_DEVICE = 0.02
SHARE_OF_FREE = 0.5


def may_copy(tensors: Sequence[Tensor]) -> bool:
    """Whether a copy of all these takes under 2 % of each device's memory and under half of what is free there."""
    needed: dict[torch.device, int] = {}
    for tensor in tensors:
        needed[tensor.device] = needed.get(tensor.device, 0) + tensor.numel() * tensor.element_size()
    for device, size in needed.items():
        free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else _host_memory()
        if size > SHARE_OF_DEVICE * total or size > SHARE_OF_FREE * free:
            return False
    return True


def share_of_device(device: torch.device) -> int:
    """2 % of the memory of a device, in bytes."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _host_memory()[1]
    return int(SHARE_OF_DEVICE * total)


def ran_out(error: Exception) -> bool:
    """Whether there was no memory: torch has a class for that on a GPU, and words on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _host_memory() -> tuple[int, int]:
    """Free and total bytes; where the system does not tell what is free, half of all; where it tells nothing, 8 GiB in all."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = 8 << 30
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = total // 2
    return free, total
