"""Measuring: tensors in, a `Reading` of their parts out.

The one interface between a step and its numbers. The path of each tensor is chosen here:

- `gpu`: plain tensors on a GPU, by Triton kernels, where these are `trusted`;
- `native`: plain tensors on the CPU, by the compiled kernel;
- `packed` and `chunked`: small and large ones on the CPU in plain torch, where no kernel could be compiled;
- `naive`: all others (sparse, complex, integers, strided views), and the specification of every path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure import chunked, gpu, native, packed, reading, sampled, scaled, tables, trusted
from paramwatch.measure.capture import captured
from paramwatch.measure.naive import ORDER, is_open, is_supported, parts, parts_of, reals_of
from paramwatch.measure.reading import Numbers, Reading, read_scalars, send, stacked
from paramwatch.measure.room import ran_out
from paramwatch.measure.sampled import SAMPLE, measure_sampled_update, sample
from paramwatch.measure.scaled import unscaled
from paramwatch.measure.streams import follow, stream_now
from paramwatch.measure.trusted import prepare

__all__ = [
    "SAMPLE",
    "Kept",
    "Reading",
    "captured",
    "forget",
    "is_supported",
    "measure",
    "measure_end",
    "measure_sampled_update",
    "measure_update",
    "prepare",
    "read_scalars",
    "sample",
    "send",
    "times",
]

_SCALED = [ORDER.index(part) for part in ("mean", "std", "rms", "min", "max", "dot")]
_DOT = [ORDER.index("dot")]

_Paths: TypeAlias = tuple[dict[torch.device, list[int]], list[int], list[int], list[int], list[int]]


class Kept:
    """Copies of some tensors as they are before a step.

    Args:
        tensors: What is copied.
        filled: Without it there is only room, which `measure(tensors, kept=...)` fills as it reads.
    """

    def __init__(self, tensors: Sequence[Tensor], filled: bool = True) -> None:
        self.copies = [torch.empty_like(x) if not filled and _is_quick(x) else _copy(x) for x in tensors]
        self.streams = {x.device: stream_now(x.device) for x in self.copies if x.is_cuda}
        """Where they were made."""

    @classmethod
    def of(cls, copies: Sequence[Tensor]) -> Kept:
        """Of copies that were made already."""
        kept = cls(())
        kept.copies = list(copies)
        kept.streams = {x.device: stream_now(x.device) for x in copies if x.is_cuda}
        return kept

    def follow(self) -> None:
        """Before they are compared: possibly in another stream than that in which they were made."""
        for device, earlier in self.streams.items():
            if (stream := stream_now(device)) != earlier:
                follow(stream, earlier, (x for x in self.copies if x.device == device))
                self.streams[device] = stream

    def __len__(self) -> int:
        return len(self.copies)


def forget() -> None:
    """Give back what is kept on devices and in pinned memory from one step to the next; what is needed again is made again."""
    tables.forget()
    for known in (scaled.mask, sampled.positions, sampled.columns, reading.ring_of):
        known.cache_clear()


def measure(tensors: Sequence[Tensor | None], scale: Tensor | None = None, kept: Kept | None = None) -> Reading:
    """The parts of each tensor, in the order of `columns.PARTS`; a tensor that is None or unsupported gives NaN throughout.

    Args:
        tensors: Of any dtype, layout, device and shape.
        scale: A positive factor the tensors carry and the parts shall not (`GradScaler`'s), on any device.
        kept: Room for copies of these tensors.
    """
    found = _read(tensors, range(len(tensors)), None if kept is None else kept.copies, scale)
    return Reading(found, (len(tensors), len(ORDER)))


def times(parts: Array, factor: float) -> Array:
    """The parts [n, parts] of tensors -> those of the tensors times a factor."""
    return parts * np.where([i in _SCALED for i in range(len(ORDER))], factor, 1.0)


def measure_update(
    after: Sequence[Tensor], before: Kept, grads: Sequence[Tensor | None] | None = None, scale: Tensor | None = None
) -> Reading:
    """The first half of `measure_end`."""
    return measure_end(after, before, grads, scale)[0]


def measure_end(
    after: Sequence[Tensor], before: Kept, grads: Sequence[Tensor | None] | None = None, scale: Tensor | None = None
) -> tuple[Reading, Reading]:
    """The parts of `after - before`, with the inner product with the gradients where these are given; and the parts of `after`.

    A tensor whose shape changed in the step has no difference: NaN throughout.

    Args:
        after: The tensors.
        before: What they were.
        grads: Beside each, or None.
        scale: A positive factor that the gradients carry, on any device.
    """
    grads, old, shape = [None] * len(after) if grads is None else grads, before.copies, (len(after), len(ORDER))
    before.follow()
    devices, quick, small, large, _ = _paths(after, range(len(after)))
    done: list[int] = []
    finished: list[Numbers] = []
    moved: list[Numbers] = []
    now: list[Numbers] = []
    for device, which in devices.items():
        along = [i for i in which if gpu.are_alike(after[i], old[i], grads[i])]
        new, past, pulls = [after[i] for i in along], [old[i] for i in along], [grads[i] for i in along]
        both = trusted.attempt(device, partial(gpu.measure_update, new, past, pulls, scale)) if along else None
        if both is not None:
            finished.append((along, both[0]))
            now.append((along, both[1]))
            done += along
    together = [i for i in quick if native.are_alike(after[i], old[i], grads[i])]
    if together:
        new, past, pulls = [after[i] for i in together], [old[i] for i in together], [grads[i] for i in together]
        differences, themselves = native.update_parts(new, past, pulls)
        moved.append((together, differences))
        now.append((together, themselves))
    alike = [i for i in small if grads[i] is None and packed.fits(old[i]) and old[i].shape == after[i].shape]
    if alike:
        moved.append((alike, packed.parts_of([after[i] for i in alike], [old[i] for i in alike])))
    pieces = [i for i in large if grads[i] is None and chunked.takes(old[i]) and old[i].shape == after[i].shape]
    moved += [([i], chunked.chunked_parts(after[i], old[i])[None]) for i in pieces]
    rest = _without(range(len(after)), done, together, alike, pieces)
    comparable = [(i, _difference(after[i], old[i], grads[i])) for i in rest if is_open(after[i]) and after[i].shape == old[i].shape]
    moved += stacked([(i, difference) for i, difference in comparable if difference is not None])
    now += _read(after, _without(range(len(after)), done, together))
    return Reading([*finished, *unscaled(moved, scale, _DOT)], shape), Reading(now, shape)


def _read(
    tensors: Sequence[Tensor | None], which: Iterable[int], copies: Sequence[Tensor] | None = None, scale: Tensor | None = None
) -> list[Numbers]:
    devices, quick, small, large, others = _paths(tensors, which)
    chosen: Sequence[Tensor] = tensors  # type: ignore[assignment]  # those looked at are not None
    finished: list[Numbers] = []
    for device, there in devices.items():
        given, to = [chosen[i] for i in there], copies and [copies[i] for i in there]
        measured = trusted.attempt(device, partial(gpu.measure, given, to, scale))
        if measured is not None:
            finished.append((there, measured))
            continue
        others += there
        for x, copy in zip(given, to or (), strict=False):
            copy.copy_(x)
    found: list[Numbers] = []
    if quick:
        found.append((quick, native.parts_of([chosen[i] for i in quick], copies and [copies[i] for i in quick])))
    if small:
        found.append((small, packed.parts_of([chosen[i] for i in small])))
    found += [([i], chunked.chunked_parts(chosen[i])[None]) for i in large]
    found += stacked([(i, each) for i in others if (each := parts_of(chosen[i])) is not None])
    return [*finished, *unscaled(found, scale, _SCALED)]


def _paths(tensors: Sequence[Tensor | None], which: Iterable[int]) -> _Paths:
    """Which tensors go to `gpu`, on each device, and to `native`, `packed`, `chunked` and `naive`."""
    devices: dict[torch.device, list[int]] = {}
    quick, small, large, others = [], [], [], []  # type: tuple[list[int], list[int], list[int], list[int]]
    compiled = native.available()
    for i in which:
        tensor = tensors[i]
        if tensor is None:
            continue
        if compiled and native.takes(tensor):
            quick.append(i)
        elif not compiled and packed.fits(tensor):
            small.append(i)
        elif not compiled and chunked.takes(tensor):
            large.append(i)
        elif trusted.takes(tensor):
            devices.setdefault(tensor.device, []).append(i)
        else:
            others.append(i)
    return devices, quick, small, large, others


def _is_quick(tensor: Tensor) -> bool:
    """Whether it is copied as it is read."""
    return (native.available() and native.takes(tensor)) or trusted.takes(tensor)


def _without(which: Iterable[int], *known: Sequence[int]) -> list[int]:
    done = {i for some in known for i in some}
    return [i for i in which if i not in done]


def _copy(tensor: Tensor) -> Tensor:
    """Of what cannot be read there is nothing to keep, and not everything of that kind can be copied."""
    nothing = torch.empty(0, device="cpu")
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return _clone(tensor.detach()) if is_supported(tensor) else nothing
    try:
        return tensor.detach().clone() if is_open(tensor) else nothing
    except Exception as error:  # of others, whose code may refuse with whatever it likes
        if ran_out(error):
            raise
        return nothing


def _clone(tensor: Tensor) -> Tensor:
    # torch warns where a complex32 is made
    real = tensor.dtype is torch.complex32 and not tensor.is_conj()
    return torch.view_as_complex(torch.view_as_real(tensor).clone()) if real else tensor.clone()


def _difference(new: Tensor, old: Tensor, grad: Tensor | None) -> Tensor | None:
    now, was = reals_of(new), reals_of(old)
    return None if now is None or was is None else parts(now - was, None if grad is None else reals_of(grad))
