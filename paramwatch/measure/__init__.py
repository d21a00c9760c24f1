"""Measuring: tensors in, a `Reading` of their parts out.

The one interface between a step and its numbers. The path is chosen here: `naive` is the specification; `packed` takes the many small
tensors of the CPU together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure.naive import ORDER, as_reals, parts
from paramwatch.measure.packed import end_to_end, fits, flat, packed_parts, widened

SAMPLE = 4096
"""Elements of a row that the sampled update looks at, at most."""

Positions: TypeAlias = list[int] | slice
"""Where along the first axis some numbers belong."""

_supported: dict[tuple[type, torch.dtype], bool] = {}


class Reading:
    """Numbers on their way from their devices to the host. Nobody waits for them on the training thread.

    Args:
        numbers: Tensors of equal trailing shape, by the positions they fill along the first axis.
        shape: Shape of the whole.
    """

    def __init__(self, numbers: Sequence[tuple[Positions, Tensor]], shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._events: list[torch.cuda.Event] = []
        self._hosts: list[tuple[Positions, Tensor]] = []
        for positions, tensor in numbers:
            if tensor.is_cuda:
                # a non-blocking copy to the host lands in pinned memory; the event says when it is there
                self._hosts.append((positions, tensor.to("cpu", non_blocking=True)))
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(tensor.device))
                self._events.append(event)
            else:
                self._hosts.append((positions, tensor.cpu()))

    @property
    def ready(self) -> bool:
        """Whether `numpy` may be called."""
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        """Block until `ready`: for flush and close only."""
        for event in self._events:
            event.synchronize()

    def numpy(self) -> Array:
        """float64, NaN where no tensor was given."""
        out = np.full(self._shape, np.nan)
        for positions, tensor in self._hosts:
            out[positions] = tensor.numpy()
        return out


class Kept:
    """Copies of some tensors as they are now, to measure an update against; the small ones of the CPU lie end to end in one.

    Args:
        tensors: What is copied.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes = [tensor.shape for tensor in tensors]
        self.small = _small(tensors)
        self.laid = end_to_end([tensors[i] for i in self.small]) if self.small else None
        small = set(self.small)
        self._others = {i: tensor.detach().clone() for i, tensor in enumerate(tensors) if i not in small}

    def __len__(self) -> int:
        return len(self.shapes)

    def tensors(self, which: Sequence[int]) -> dict[int, Tensor]:
        """Some of the copies by themselves, by position."""
        found = dict(self._others)
        if self.laid is not None and not found.keys() >= set(which):
            shapes = [self.shapes[i] for i in self.small]
            pieces = self.laid.split([shape.numel() for shape in shapes])
            found |= {i: piece.view(shape) for i, piece, shape in zip(self.small, pieces, shapes, strict=True)}
        return {i: found[i] for i in which}


def measure(tensors: Sequence[Tensor | None], scale: Tensor | None = None, kept: Kept | None = None) -> Reading:
    """The parts of each tensor, in the order of `columns.PARTS`; a tensor that is None or unsupported gives NaN throughout.

    Args:
        tensors: Of any dtype, layout, device and shape.
        scale: A positive factor the tensors carry and the parts shall not (`GradScaler`'s), on any device.
        kept: Copies of these tensors, if they were made: spares laying the small ones end to end once more.
    """
    small = _small(tensors) if kept is None and scale is None else [] if kept is None else kept.small
    found: list[Tensor | None] = [None] * len(tensors)
    for i in _except(small, len(tensors)):
        tensor = tensors[i]
        if tensor is not None and is_supported(tensor):
            found[i] = parts(_unscaled(as_reals(tensor), scale))
    if not small:
        return _collect(found)
    together: list[Tensor] = [tensors[i] for i in small]  # type: ignore[misc]
    elements = flat(together) if kept is None or kept.laid is None else widened(kept.laid)
    return _collect(found, packed=(small, packed_parts(elements, [tensor.numel() for tensor in together])))


def measure_update(
    after: Sequence[Tensor], before: Kept, grads: Sequence[Tensor | None] | None = None, scale: Tensor | None = None
) -> Reading:
    """The parts of `after - before`, and of its inner product with the gradients where these are given.

    A tensor whose shape changed in the step has no difference: NaN throughout.
    """
    comparable = grads is None and all(fits(after[i]) and after[i].shape == before.shapes[i] for i in before.small)
    small = before.small if comparable else []
    found: list[Tensor | None] = [None] * len(after)
    for i, old in before.tensors(_except(small, len(after))).items():
        new, grad = after[i], grads[i] if grads is not None else None
        if is_supported(new) and new.shape == old.shape:
            found[i] = parts(as_reals(new) - as_reals(old), None if grad is None else _unscaled(as_reals(grad), scale))
    if not small or before.laid is None:
        return _collect(found)
    with np.errstate(all="ignore"):  # the difference of two infinities is not a number, and is counted as such
        moved = flat([after[i] for i in small]) - widened(before.laid)
    return _collect(found, packed=(small, packed_parts(moved, [before.shapes[i].numel() for i in small])))


def _small(tensors: Sequence[Tensor | None]) -> list[int]:
    return [i for i, tensor in enumerate(tensors) if tensor is not None and fits(tensor)]


def _except(small: Sequence[int], n: int) -> list[int]:
    if len(small) == n:
        return []
    known = set(small)
    return [i for i in range(n) if i not in known]


def sample(tensor: Tensor, most: int = SAMPLE) -> Tensor:
    """A copy of at most that many elements in float64, at positions that depend on the number of elements alone.

    Of a tensor that is unsupported it is empty.
    """
    if not is_supported(tensor):
        return torch.empty(0, dtype=torch.float64, device="cpu")
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= most:
        return as_reals(flat).clone()
    chosen = torch.from_numpy(_positions(flat.numel(), most)).to(flat.device, non_blocking=True)
    return as_reals(flat[chosen])


@lru_cache(maxsize=32)
def _positions(numel: int, most: int) -> Array:
    """Strata of equal size, one element each, at a place that walks by the golden ratio: no regular stride falls into step with it."""
    strata = np.arange(most + 1, dtype=np.int64)
    starts = strata * numel // most
    return starts[:-1] + (strata[:-1] * 0.6180339887498949 % 1.0 * np.diff(starts)).astype(np.int64)


def measure_sampled_update(after: Sequence[Tensor], before: Sequence[Tensor | None]) -> Reading:
    """An estimate of the parts of `after - before` from samples of both: counts are the row's, extremes are not known (NaN)."""
    unknown = torch.tensor([part not in ("count", "rms") for part in ORDER], device="cpu")
    found: list[Tensor | None] = []
    for new, old in zip(after, before, strict=True):
        now = sample(new)
        if old is None or not is_supported(new) or now.shape != old.shape:
            found.append(None)
            continue
        seen = parts(now - old)
        share = (new.numel() * (2 if new.is_complex() else 1)) / max(old.numel(), 1)
        counted = torch.where(unknown.to(seen.device), float("nan"), seen)
        counted[ORDER.index("count")] *= share
        for part in ("nan", "posinf", "neginf"):
            counted[ORDER.index(part)] = torch.round(seen[ORDER.index(part)] * share)
        found.append(counted)
    return _collect(found)


def read_scalars(values: Sequence[Tensor | float | None]) -> Reading:
    """Numbers, some of which may still be on a device, as one reading [n]."""
    plain = np.array([np.nan if value is None or isinstance(value, Tensor) else value for value in values], dtype=np.float64)
    tensors = [(i, value.detach().to(torch.float64).reshape(())) for i, value in enumerate(values) if isinstance(value, Tensor)]
    return Reading([(slice(None), torch.from_numpy(plain)), *_by_device(tensors)], (len(values),))


def is_supported(tensor: Tensor) -> bool:
    """Whether the elements of a tensor of this kind can be read at all."""
    if tensor.is_meta:
        return False
    kind = (type(tensor), tensor.dtype)
    if kind not in _supported:
        try:
            plain = kind[0] in (Tensor, torch.nn.Parameter)
            as_reals(torch.zeros(1, device="cpu").to(tensor.dtype) if plain else tensor)
            _supported[kind] = True
        except (NotImplementedError, RuntimeError, TypeError):
            _supported[kind] = False
    return _supported[kind]


def _unscaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x / scale.detach().to(x.device, torch.float64)


def _collect(found: Sequence[Tensor | None], packed: tuple[list[int], Array] | None = None) -> Reading:
    numbers = _by_device([(i, numbers) for i, numbers in enumerate(found) if numbers is not None])
    if packed is not None:
        numbers.append((packed[0] if len(packed[0]) < len(found) else slice(None), torch.from_numpy(packed[1])))
    return Reading(numbers, (len(found), len(ORDER)))


def _by_device(numbers: Sequence[tuple[int, Tensor]]) -> list[tuple[Positions, Tensor]]:
    groups: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for i, tensor in numbers:
        positions, tensors = groups.setdefault(tensor.device, ([], []))
        positions.append(i)
        tensors.append(tensor)
    return [(positions, torch.stack(tensors)) for positions, tensors in groups.values()]
