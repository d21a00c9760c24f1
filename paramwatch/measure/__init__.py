"""Measuring: tensors in, a `Reading` of their parts out.

The one interface between a step and its numbers. The path of each tensor is chosen here:

- `native`: plain tensors on the CPU, by the compiled kernel;
- `packed` and `chunked`: small and large ones on the CPU in plain torch, where no kernel could be compiled;
- `naive`: all others (sparse, complex, integers, strided views), and the specification of every path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from paramwatch.measure import chunked, native, packed
from paramwatch.measure.naive import ORDER, as_reals, is_supported, parts, parts_of
from paramwatch.measure.reading import Numbers, Reading, read_scalars, stacked
from paramwatch.measure.sampled import SAMPLE, measure_sampled_update, sample

__all__ = [
    "SAMPLE",
    "Kept",
    "Reading",
    "is_supported",
    "measure",
    "measure_end",
    "measure_sampled_update",
    "measure_update",
    "read_scalars",
    "sample",
]

_SCALED = [ORDER.index(part) for part in ("mean", "std", "rms", "min", "max", "dot")]
_DOT = [ORDER.index("dot")]


class Kept:
    """Copies of some tensors as they are before a step.

    Args:
        tensors: What is copied.
        filled: Without it there is only room, which `measure(tensors, kept=...)` fills as it reads.
    """

    def __init__(self, tensors: Sequence[Tensor], filled: bool = True) -> None:
        later = not filled and native.available()
        self.copies = [torch.empty_like(x) if later and native.takes(x) else _copy(x) for x in tensors]

    def __len__(self) -> int:
        return len(self.copies)


def measure(tensors: Sequence[Tensor | None], scale: Tensor | None = None, kept: Kept | None = None) -> Reading:
    """The parts of each tensor, in the order of `columns.PARTS`; a tensor that is None or unsupported gives NaN throughout.

    Args:
        tensors: Of any dtype, layout, device and shape.
        scale: A positive factor the tensors carry and the parts shall not (`GradScaler`'s), on any device.
        kept: Room for copies of these tensors.
    """
    found = _read(tensors, range(len(tensors)), None if kept is None else kept.copies)
    return Reading(_unscaled(found, scale, _SCALED), (len(tensors), len(ORDER)))


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
    quick, small, large, _ = _paths(after, range(len(after)))
    together = [i for i in quick if native.are_alike(after[i], old[i], grads[i])]
    moved: list[Numbers] = []
    now: list[Numbers] = []
    if together:
        new, past, pulls = [after[i] for i in together], [old[i] for i in together], [grads[i] for i in together]
        differences, themselves = native.update_parts(new, past, pulls)
        moved, now = [(together, differences)], [(together, themselves)]
    alike = [i for i in small if grads[i] is None and packed.fits(old[i]) and old[i].shape == after[i].shape]
    if alike:
        moved.append((alike, packed.parts_of([after[i] for i in alike], [old[i] for i in alike])))
    pieces = [i for i in large if grads[i] is None and chunked.takes(old[i]) and old[i].shape == after[i].shape]
    moved += [([i], chunked.chunked_parts(after[i], old[i])[None]) for i in pieces]
    rest = _without(range(len(after)), together, alike, pieces)
    comparable = [i for i in rest if is_supported(after[i]) and after[i].shape == old[i].shape]
    moved += stacked([(i, _difference(after[i], old[i], grads[i])) for i in comparable])
    now += _read(after, _without(range(len(after)), together))
    return Reading(_unscaled(moved, scale, _DOT), shape), Reading(now, shape)


def _read(tensors: Sequence[Tensor | None], which: Iterable[int], copies: Sequence[Tensor] | None = None) -> list[Numbers]:
    quick, small, large, others = _paths(tensors, which)
    chosen: Sequence[Tensor] = tensors  # type: ignore[assignment]
    found: list[Numbers] = []
    if quick:
        found.append((quick, native.parts_of([chosen[i] for i in quick], copies and [copies[i] for i in quick])))
    if small:
        found.append((small, packed.parts_of([chosen[i] for i in small])))
    found += [([i], chunked.chunked_parts(chosen[i])[None]) for i in large]
    return found + stacked([(i, parts_of(chosen[i])) for i in others if is_supported(chosen[i])])


def _paths(tensors: Sequence[Tensor | None], which: Iterable[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Which tensors go to `native`, `packed`, `chunked` and `naive`."""
    quick, small, large, others = paths = [], [], [], []  # type: tuple[list[int], list[int], list[int], list[int]]
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
        else:
            others.append(i)
    return paths


def _without(which: Iterable[int], *known: Sequence[int]) -> list[int]:
    done = {i for some in known for i in some}
    return [i for i in which if i not in done]


def _copy(tensor: Tensor) -> Tensor:
    """Of what cannot be read there is nothing to keep, and not everything of that kind can be copied."""
    return tensor.detach().clone() if is_supported(tensor) else torch.empty(0, device="cpu")


def _difference(new: Tensor, old: Tensor, grad: Tensor | None) -> Tensor:
    return parts(as_reals(new) - as_reals(old), as_reals(grad) if grad is not None and is_supported(grad) else None)


def _unscaled(numbers: Sequence[Numbers], scale: Tensor | None, columns: Sequence[int]) -> Sequence[Numbers]:
    """The same numbers of elements without a factor."""
    if scale is None:
        return numbers
    factor = scale.detach().to(torch.float64)
    found: list[Numbers] = []
    for positions, wide in numbers:
        tensor = wide if isinstance(wide, Tensor) else torch.from_numpy(wide).to(factor.device)
        divisor = torch.ones(len(ORDER), dtype=torch.float64, device=tensor.device)
        divisor[columns] = factor.to(tensor.device)
        found.append((positions, tensor / divisor))
    return found
