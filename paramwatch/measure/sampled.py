"""An estimate from a fixed subset of a tensor's elements, where there is no room for a copy of all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure.naive import ORDER, as_reals, is_supported, parts, reals_of
from paramwatch.measure.reading import Reading, stacked
from paramwatch.measure.scaled import sent, stream_of

_COUNTS = ("count", "nan", "posinf", "neginf")

_NOT_PICKED = {
    **{torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64},
    **{getattr(torch, name): torch.uint8 for name in dir(torch) if name.startswith("float8_")},
}
"""Dtypes of which torch, or one of its older versions, picks no elements, and integers of as many bytes, of which it does."""

SAMPLE = 4096
"""Elements of a row that the sampled update looks at, at most."""


def sample(tensor: Tensor, most: int = SAMPLE) -> Tensor:
    """A copy of at most that many elements in float64, at positions that depend on the number of elements alone.

    Of a tensor that is unsupported it is empty.
    """
    # what cannot be picked from as it is (sparse, or a subclass that knows few operations) is made plain first
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    flat = tensor.detach() if ordinary and is_supported(tensor) else None if ordinary else reals_of(tensor)
    if flat is None:
        return torch.empty(0, dtype=torch.float64, device="cpu")
    # rows of two, each of an element
    flat = torch.view_as_real(flat.resolve_conj()).reshape(-1, 2) if flat.is_complex() else flat.reshape(-1)
    if len(flat) <= most:
        return as_reals(flat).clone()
    chosen = positions(len(flat), most, flat.device, stream_of(flat.device))
    pickable = flat.view(_NOT_PICKED[flat.dtype]) if flat.dtype in _NOT_PICKED else flat
    # `index_select` does not know every dtype
    return as_reals(torch.ops.aten.index(pickable, [chosen]).view(flat.dtype))


@lru_cache(maxsize=32)
def positions(numel: int, most: int, device: torch.device, stream: int) -> Tensor:
    """Strata of equal size, one element each, at a place that walks by the golden ratio: no regular stride falls into step with it."""
    strata, walk = _walk(most)
    starts = strata * numel // most
    places = starts[:-1] + (walk * (starts[1:] - starts[:-1])).astype(np.int64)
    return sent(torch.from_numpy(places), device)


@lru_cache(maxsize=8)
def _walk(most: int) -> tuple[Array, Array]:
    strata = np.arange(most + 1, dtype=np.int64)
    return strata, strata[:-1] * 0.6180339887498949 % 1.0


@lru_cache(maxsize=8)
def columns(device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Which parts are counts that grow with the row, and which is as the sample has it; of the others an estimate would be a guess."""
    counts, known = (torch.tensor([part in some for part in ORDER], device="cpu") for some in (_COUNTS, ("rms",)))
    return sent(counts, device), sent(known, device)


def measure_sampled_update(after: Sequence[Tensor], before: Sequence[Tensor | None]) -> Reading:
    """An estimate of the parts of `after - before` from samples of both: counts are the row's, extremes are not known (NaN)."""
    found: list[tuple[int, Tensor]] = []
    for i, (new, old) in enumerate(zip(after, before, strict=True)):
        now = sample(new)
        if old is None or now.shape != old.shape or not (now.numel() or is_supported(new)):
            continue
        seen = parts(now - old)
        share = (new.numel() * (2 if new.is_complex() else 1)) / max(old.numel(), 1)
        counts, known = columns(seen.device, stream_of(seen.device))
        found.append((i, torch.where(counts, torch.round(seen * share), torch.where(known, seen, float("nan")))))
    return Reading(stacked(found), (len(after), len(ORDER)))
