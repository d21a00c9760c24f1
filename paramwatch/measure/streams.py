"""Streams of a GPU, where a step begins in one and goes on in another: `watch.step` around work that is queued elsewhere, for one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def stream_now(device: torch.device) -> torch.cuda.Stream | None:
    """Where work on a device is queued at this moment; None where there is but one way."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def follow(stream: torch.cuda.Stream | None, earlier: torch.cuda.Stream | None, made: Iterable[Tensor]) -> None:
    """Let a stream wait for an earlier one, and keep what was made there from being given to others while this one works on it."""
    if stream is None or earlier is None:
        return
    stream.wait_stream(earlier)
    for tensor in made:
        tensor.record_stream(stream)
