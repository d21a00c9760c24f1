"""Gradients before clipping, remembered from the clipping to the step. The gradients themselves are not held: they may be gone by then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import Tensor

from paramwatch.measure import measure
from paramwatch.rounds import Measured

_CLIP_WRITES = 2
"""How often a clip function writes a gradient, at most: by norm once, by value once or twice."""


class RawGradients:
    """What each row's gradient was before it was clipped, since the row last stepped."""

    def __init__(self) -> None:
        self.seen: dict[str, _Raw] = {}
        """By the name of the row."""
        self._thread: int | None = None

    def look(self, rows: Iterable[tuple[str, Tensor]], grads: Iterable[Tensor], replace: bool, of: Collection[int] | None) -> None:
        """See those of the rows, by name and parameter; the rest as `Recorder.raw_gradients`."""
        if of is None and not replace and self._thread not in (None, get_ident()):
            return
        wanted = {*map(id, grads)}
        read = ((name, param.grad) for name, param in rows if of is None or id(param) in of)
        self.see({name: grad for name, grad in read if grad is not None and id(grad) in wanted}, replace)

    def see(self, grads: Mapping[str, Tensor], replace: bool) -> None:
        """Measure gradients, by the name of their row, that are about to be clipped.

        Args:
            grads: A gradient that was clipped before, and is the same, is not measured again: the first clipping saw it raw.
            replace: Whether these are the next step's for certain, whatever was seen before.
        """
        new: dict[str, Tensor] = {}
        for name, grad in grads.items():
            seen = self.seen.get(name)
            if seen is not None and not replace and seen.became(grad):
                seen.version = _version(grad)
            else:
                new[name] = grad
        if new:
            measured = Measured("grad_raw", list(new), measure(list(new.values())))
            # views of one buffer count the writes of them all
            views = Counter(map(_buffer, grads.values()))
            for name, grad in new.items():
                self.seen[name] = _Raw(measured, _address(grad), _version(grad), replace, _CLIP_WRITES * views[_buffer(grad)])

    def of(self, names: Sequence[str], grads: Sequence[Tensor | None]) -> list[Measured]:
        """What these gradients were before they were clipped, where they were."""
        if not self.seen:
            return []
        seen = ((name, self.seen.get(name), grad) for name, grad in zip(names, grads, strict=True))
        found = {name: raw.measured for name, raw, grad in seen if raw is not None and raw.became(grad)}
        distinct = {id(measured): measured for measured in found.values()}
        return [measured.only(name for name, other in found.items() if other is measured) for measured in distinct.values()]

    def stepped(self, names: Iterable[str]) -> None:
        """These rows have stepped, in this thread."""
        self._thread = get_ident()
        for name in names if self.seen else ():
            self.seen.pop(name, None)


@dataclass
class _Raw:
    measured: Measured
    address: int
    version: int
    """How often the gradient had been written when it was last about to be clipped."""
    certain: bool
    writes: int
    """How often clipping once more may write it."""

    def became(self, grad: Tensor | None) -> bool:
        """Whether this gradient is the same one, clipped since.

        A loop may throw away a clipped gradient and compute the next one. That one is another tensor, or a new one at the old address that
        has been written as often as this one then, or the same one after two writes more (set to zero, added to).
        """
        if self.certain:
            return True
        return grad is not None and self.address == _address(grad) and 0 < _version(grad) - self.version <= self.writes


def _address(grad: Tensor) -> int:
    """Where its elements are; of what has no memory of its own (sparse, a subclass around others), where it is itself."""
    return grad.data_ptr() if _is_plain(grad) else id(grad)


def _buffer(grad: Tensor) -> int:
    """Which memory its elements are a part of."""
    return grad.untyped_storage().data_ptr() if _is_plain(grad) else id(grad)


def _is_plain(grad: Tensor) -> bool:
    return type(grad) is Tensor and grad.layout is torch.strided


def _version(grad: Tensor) -> int:
    return 0 if grad.is_inference() else grad._version
