"""Gradients before clipping, remembered from the clipping to the step. The gradients themselves are not held: they may be gone by then.

Torch counts how often a tensor was written. What was clipped is still what clipping left of it so long as the same memory has the same
count; unscaling, which does not count, is told of. Where somebody else has written (a micro-batch was added, a reduced gradient copied
into it) nobody knows any more what the gradient would be without clipping, and NaN says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from paramwatch.measure import Reading, measure, read_scalars
from paramwatch.rounds import Measured

_UNKNOWN = (math.nan,)

_Where: TypeAlias = tuple[int, int | None]
"""A piece of memory, and where in it; or None for all views that share a count of writes."""


class RawGradients:
    """What each gradient was before it was clipped, until its row steps.

    Args:
        named: As `LiveInventory.named`.
    """

    def __init__(self, named: Callable[[bool], Mapping[int, str]]) -> None:
        self._named = named
        self._given: dict[str, _Raw] = {}
        self._counted: dict[_Where, _Counted] = {}
        self._many = 64

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return bool(self._given or self._counted)

    def give(self, params: Iterable[Tensor]) -> None:
        """Measure the gradients of these, unless they were clipped before: the next step's, whatever is made of them until then."""
        named = self._named(True)
        grads = {named[id(param)]: param.grad for param in params if id(param) in named and isinstance(param.grad, Tensor)}
        clipped = {name: raw for name, grad in grads.items() if (raw := self._of(grad)) is not None}
        new = {name: grad for name, grad in grads.items() if name not in clipped}
        reading = measure(list(new.values()))
        self._given |= {name: replace(raw) for name, raw in clipped.items()} | {name: _Raw(reading, i) for i, name in enumerate(new)}
        # who clips them next need not measure them again
        self._count({i: grad for i, grad in enumerate(new.values()) if _has_memory(_plain(grad))}, reading)

    def clipping(self, grads: Sequence[Tensor], of: Sequence[Tensor] | None) -> None:
        """Measure gradients that are about to be clipped, but for those that were clipped before and not written since.

        Args:
            grads: Of any tensors.
            of: These tensors, if known: then those that are no rows of ours are passed over.
        """
        self._forget_gone()
        if of is not None:
            named = self._named(True)
            grads = [param.grad for param in of if id(param) in named and param.grad is not None]
        new = [grad for grad in grads if (raw := self._of(grad)) is None or not raw.is_known]
        if not new:
            return
        self._count(dict(enumerate(new)), measure(new))

    def unscaling(self, grads: Iterable[Tensor], factor: Tensor) -> None:
        """These are about to be multiplied by the inverse of a scale, and so is what they were before clipping."""
        raws = [raw for grad in grads if (raw := self._of(grad)) is not None and raw.is_known]
        # who made it may use it again
        kept = factor.detach().clone() if raws else factor
        for raw in raws:
            raw.factors = (*raw.factors, kept)

    def written(self, grads: Iterable[Tensor]) -> None:
        """What these were told to be about to become, they are."""
        for grad in grads:
            if (counted := self._counted.get(_place(grad)[0])) is not None:
                counted.writes = _writes(grad)

    def of(self, names: Sequence[str], grads: Sequence[Tensor | None], scale: Tensor | None) -> list[Measured]:
        """What these gradients were before they were clipped, where they were; without a scale that they still carry."""
        if not self:
            return []
        found: dict[tuple[int, tuple[int, ...]], list[tuple[str, _Raw]]] = {}
        for name, grad in zip(names, grads, strict=True):
            raw = self._given.get(name) or (None if grad is None else self._of(grad))
            if raw is not None:
                found.setdefault((id(raw.reading), tuple(map(id, raw.factors))), []).append((name, raw))
        return [_measured(rows, scale) for rows in found.values()]

    def stepped(self, names: Iterable[str], tensors: Iterable[Tensor]) -> None:
        """These rows have stepped."""
        for name in names if self._given else ():
            self._given.pop(name, None)
        for tensor in tensors if self._counted else ():
            if (grad := tensor.grad) is not None:
                where, offset = _place(grad)
                counted = self._counted.get(where)
                if counted is not None and counted.raw.pop(offset, None) is not None and not counted.raw:
                    del self._counted[where]

    def _count(self, grads: Mapping[int, Tensor], reading: Reading) -> None:
        """From now on look whether somebody else writes these, by their position in what was measured."""
        for i, grad in grads.items():
            where, offset = _place(grad)
            if where not in self._counted:
                self._counted[where] = _Counted(_memory(grad), _writes(grad))
            self._counted[where].raw[offset] = _Raw(reading, i)

    def _of(self, grad: Tensor) -> _Raw | None:
        where, offset = _place(grad)
        counted = self._counted.get(where)
        if counted is None:
            return None
        if counted.is_gone:
            del self._counted[where]
            return None
        counted.look(_writes(grad))
        return counted.raw.get(offset)

    def _forget_gone(self) -> None:
        if len(self._counted) >= self._many:
            self._counted = {where: counted for where, counted in self._counted.items() if not counted.is_gone}
            self._many = 64 + 2 * len(self._counted)


@dataclass
class _Raw:
    reading: Reading
    """Of all that were measured together."""
    position: int
    factors: tuple[Tensor | float, ...] = ()
    """By which the gradient was multiplied since, clipping aside."""

    @property
    def is_known(self) -> bool:
        return self.factors is not _UNKNOWN


@dataclass
class _Counted:
    """Gradients in one piece of memory that have their count of writes in common."""

    memory: StorageWeakRef | None
    writes: int
    """How often they had been written when this was last known to be right."""
    raw: dict[int, _Raw] = field(default_factory=dict)
    """By where they begin."""

    @property
    def is_gone(self) -> bool:
        return self.memory is not None and self.memory.expired()

    def look(self, writes: int) -> None:
        """They have been written so often: more than is known of, and nothing is known."""
        if writes != self.writes:
            self.writes = writes
            for raw in self.raw.values():
                raw.factors = _UNKNOWN


def _measured(rows: Sequence[tuple[str, _Raw]], scale: Tensor | None) -> Measured:
    first = rows[0][1]
    # no parameter has an empty name: what is called that is passed over
    names = [""] * first.reading.rows
    for name, raw in rows:
        names[raw.position] = name
    factors = first.factors if scale is None else (*first.factors, scale.detach().double().reciprocal())
    return Measured("grad_raw", names, first.reading, factors=read_scalars(factors) if factors else None)


def _plain(grad: Tensor) -> Tensor:
    """A shard's own part: what writes it may pass the whole by, and is counted there alone."""
    local: Tensor = getattr(grad, "_local_tensor", grad)
    return local


def _memory(grad: Tensor) -> StorageWeakRef | None:
    """None of what has none of its own (a subclass around others)."""
    plain = _plain(grad)
    return StorageWeakRef(plain.untyped_storage()) if _has_memory(plain) else None


def _place(grad: Tensor) -> tuple[_Where, int]:
    """Where it is counted, and where it begins there."""
    plain = _plain(grad)
    if not _has_memory(plain):
        return (id(grad), 0), 0
    offset = int(plain.storage_offset())
    return (plain.untyped_storage()._cdata, offset if plain._base is None else None), offset


def _has_memory(grad: Tensor) -> bool:
    return type(grad) is Tensor and grad.layout is torch.strided


def _writes(grad: Tensor) -> int:
    plain = _plain(grad)
    return 0 if plain.is_inference() else plain._version
