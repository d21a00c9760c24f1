"""The Triton kernels as a measuring path: which tensors it takes, and the launches.

Nothing here waits for the device, and the number of torch operations does not depend on the number of tensors. All work is queued on
the stream that is current when a function is called. Autograd has joined its streams to that one by the end of a backward pass, and the
optimizer queues its update there next: what is read is what the step uses. Memory that is freed later is given to work that is queued
later, so nobody has to hold the tensors after the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from paramwatch.bins import BINS
from paramwatch.columns import PARTS
from paramwatch.measure.native import TYPES, _is_dense
from paramwatch.measure.tables import Layout, Sizes, Variant
from paramwatch.storage import has_address

__all__ = ["are_alike", "histograms", "kernels", "measure", "measure_update", "takes"]

SIZES = Sizes()

_PLAIN = (Tensor, torch.nn.Parameter)

_NOTHING, _ALL_BUT_COUNTS, _DOT = range(3)
"""What a scale is taken out of, as `triton_fold` numbers it."""


def takes(tensor: Tensor) -> bool:
    """Whether the kernels can read a tensor: plain, on CUDA, of a floating type, its elements side by side in memory that is there."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype in TYPES
        and tensor.layout is torch.strided
        and tensor.is_cuda
        and tensor.numel() < 1 << 40
        and (tensor.is_contiguous() or _is_dense(tensor))
        and not tensor.is_neg()
        and not tensor.is_nested
        and has_address(tensor)
    )


def are_alike(after: Tensor, before: Tensor, grad: Tensor | None) -> bool:
    """Whether a tensor that it takes can be compared with its copy, and multiplied by its gradient, element by element as they lie."""
    return after.dtype == before.dtype and _lie_alike(after, before) and (grad is None or _lie_alike(after, grad))


def measure(tensors: Sequence[Tensor], copies: Sequence[Tensor] | None = None, scale: Tensor | None = None) -> Tensor:
    """float64 [tensors, parts], on the device of the tensors.

    Args:
        tensors: On one device, of those it `takes`.
        copies: Alike: each tensor is copied there as it is read.
        scale: A positive factor that the tensors carry and the parts shall not.
    """
    if not tensors:
        return torch.empty((0, len(PARTS)), dtype=torch.float64, device="cpu")
    found = torch.empty((1, len(tensors), len(PARTS)), dtype=torch.float64, device=tensors[0].device)
    read(Layout.of(tensors, copies), found, scale)
    return found[0]


def read(layout: Layout, found: Tensor, scale: Tensor | None = None) -> None:
    """`measure` of what lies so, with a copy where that has a place, into float64 [1, tensors, parts] of the device."""
    _run(kernels().measure_chunks, layout, {"COPY": layout.copied}, _NOTHING if scale is None else _ALL_BUT_COUNTS, scale, found)


def measure_update(
    after: Sequence[Tensor], before: Sequence[Tensor], grads: Sequence[Tensor | None] | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The parts of `after - before`, and those of `after` as `measure` gives them to the bit, float64 [tensors, parts] each.

    Args:
        after: On one device, of those it `takes`.
        before: Alike.
        grads: For the inner product: alike, but of any type that it takes.
        scale: A positive factor that the gradients carry.
    """
    if not after:
        return measure(after), measure(after)
    found = torch.empty((2, len(after), len(PARTS)), dtype=torch.float64, device=after[0].device)
    read_update(Layout.of(after, before, grads), found, scale)
    return found[0], found[1]


def read_update(layout: Layout, found: Tensor, scale: Tensor | None = None) -> None:
    """`measure_update` of what lies so, into float64 [2, tensors, parts] of the device."""
    _run(kernels().measure_updates, layout, {"maxnreg": SIZES.registers}, _NOTHING if scale is None else _DOT, scale, found)


def histograms(tensors: Sequence[Tensor], before: Sequence[Tensor] | None = None, scale: Tensor | None = None) -> Tensor:
    """int64 [tensors, bins], on the device of the tensors: of these, or of `tensors - before` in float64.

    Args:
        tensors: On one device, of those it `takes`.
        before: Alike.
        scale: A positive factor that what is counted carries and the counts shall not.
    """
    if not tensors:
        return torch.empty((0, BINS), dtype=torch.int64, device="cpu")
    layout, rows, kernel = Layout.of(tensors, before), len(tensors), kernels().count_chunks
    with _on(layout.device) as stream:
        plan, addresses = layout.sent(SIZES, stream)
        counts = torch.zeros((rows, BINS), dtype=torch.int64, device=layout.device)
        factor = counts if scale is None else _factor(scale, layout.device)
        extra = {"UPDATE": before is not None, "SCALED": scale is not None}
        for launch in plan.launches:
            chosen = options(launch.variant, kernel, SIZES, extra)
            kernel[(launch.chunks,)](plan.table, addresses, factor, counts, rows, launch.base, **chosen)
    return counts


def options(variant: Variant, kernel: Any, sizes: Sizes, extra: dict[str, Any]) -> dict[str, Any]:
    """What a kernel is compiled with for a variant."""
    element = kernels().elements
    known = {
        "ELEMENT": element[TYPES[variant.dtype]],
        "BYTES": variant.dtype.itemsize,
        "ALIGNED": variant.aligned,
        "CHUNK": sizes.elements(variant.dtype),
        "LANES": sizes.lanes,
        "SLOW_LANES": sizes.slow_lanes,
        "num_warps": sizes.warps,
        "enable_fp_fusion": False,
    }
    if kernel is kernels().count_chunks:
        del known["SLOW_LANES"]
        return known | {"OLD_ALIGNED": variant.other_aligned} | extra
    if kernel is kernels().measure_chunks:
        return known | {"COPY_ALIGNED": variant.other_aligned} | extra
    grad = variant.grad or variant.dtype
    pull = {"GRAD": variant.grad is not None, "GRAD_ELEMENT": element[TYPES[grad]], "GRAD_BYTES": grad.itemsize}
    return known | pull | {"OLD_ALIGNED": variant.other_aligned, "GRAD_ALIGNED": variant.grad_aligned} | extra


def _run(kernel: Any, layout: Layout, extra: dict[str, Any], scaled: int, scale: Tensor | None, found: Tensor) -> None:
    device, (sets, rows, _), sizes, compiled = layout.device, found.shape, SIZES, kernels()
    with _on(device) as stream:
        plan, addresses = layout.sent(sizes, stream)
        records = torch.empty(max(plan.chunks, 1) * sets * compiled.fields, dtype=torch.float64, device=device)
        for launch in plan.launches:
            chosen = options(launch.variant, kernel, sizes, extra)
            kernel[(launch.chunks,)](plan.table, addresses, records, rows, plan.chunks, launch.base, **chosen)
        factor = records if scale is None else _factor(scale, device)
        for base, turns, lanes, warps in ((0, plan.few, 32, 1), (plan.few, rows - plan.few, sizes.many_lanes, sizes.many_warps)):
            if turns:
                given = (plan.table, records, factor, found, rows, plan.chunks, base, turns)
                compiled.fold[(sets * turns,)](*given, SCALED=scaled, LANES=lanes, num_warps=warps, enable_fp_fusion=False)


def _factor(scale: Tensor, device: torch.device) -> Tensor:
    scale = scale.detach()
    if device.type == "cuda" and scale.device.type == "cpu":
        scale = scale.pin_memory()
    return scale.to(device, non_blocking=True)


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.device != other.device or not takes(other):
        return False
    # of a dimension of one element the stride means nothing
    return one.stride() == other.stride() or (one.is_contiguous() and other.is_contiguous())


@contextmanager
def _on(device: torch.device) -> Iterator[int]:
    """Makes it the current device, and gives the stream on which work is queued there."""
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


@cache
def kernels() -> SimpleNamespace:
    """All that needs triton."""
    from paramwatch.measure import triton_bins, triton_fold, triton_kernels, triton_tiles

    return SimpleNamespace(
        measure_chunks=triton_kernels.measure_chunks,
        measure_updates=triton_kernels.measure_updates,
        fold=triton_fold.fold,
        count_chunks=triton_bins.count_chunks,
        fields=triton_tiles.FIELDS.value,
        elements=triton_tiles.ELEMENTS,
        failure=triton_tiles.TritonError,
    )
