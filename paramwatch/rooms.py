"""What a plan keeps from one step to the next for the kernel: tables that lead to tensors, and memory for copies of the parameters.

Beside `plan`, which says when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from paramwatch.measure import Kept, native
from paramwatch.measure.forms import Forms
from paramwatch.storage import Addresses

_ALIGNED = 64

Form: TypeAlias = tuple[Any, ...]
"""As in `Forms.each`."""


class Grads:
    """Which rows have a gradient, and of which form."""

    def __init__(self, forms: Sequence[Form], grads: Sequence[Tensor | None]) -> None:
        found = [grad for grad in grads if grad is not None]
        self.had = [grad is not None for grad in grads]
        self.required = [bool(form[3]) for form in forms]
        self.all = all(self.had)
        self._forms, self._addresses = Forms(found), Addresses()
        self.at_a_glance = self._forms.at_a_glance
        """As in `Forms`: of gradients that are all there."""
        types = [native.NOTHING if grad is None else native.TYPES[grad.dtype] for grad in grads]
        self._table = [grad.numel() if grad is not None else 0 for grad in grads], types

    def fit(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether these are like those."""
        return [grad is not None for grad in grads] == self.had and self._forms.hold(self.found(grads))

    def found(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """Those that there are."""
        return grads if self.all else [grad for grad in grads if grad is not None]  # type: ignore[return-value]  # all: none is None

    def addresses(self, grads: Sequence[Tensor | None]) -> list[int] | None:
        """Of those that there are; None if the memory of one is not there."""
        return self._addresses.of(self.found(grads))

    def table(self, sizes: Sequence[int] = (), types: Sequence[int] = (), copies: Sequence[int] = ()) -> native.Table:
        """For the kernel: of these, behind others of which sizes, types and copies are given."""
        return native.Table([*sizes, *self._table[0]], [*types, *self._table[1]], [*copies, *(0 for _ in self.had if copies)])


class Room:
    """Copies of the parameters of one step in progress, and what leads the kernel to its tensors: never shared by two steps."""

    def __init__(self, sizes: Sequence[int], types: Sequence[int], forms: Sequence[Form], exact: bool) -> None:
        self._sizes, self._types, self._forms = sizes, types, forms
        self.addresses: list[int] = []
        """Of the parameters, when they were entered."""
        self._used: tuple[Grads, native.Table] | None = None
        self._both: tuple[Grads, native.Table] | None = None
        self._copies: list[int] = []
        if not exact:
            self.before = self.after = native.Table(sizes, types)
            return
        taken = [size * form[1].itemsize for size, form in zip(sizes, forms, strict=True)]
        starts = np.concatenate(([0], np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in taken])))
        self._memory = np.empty(int(starts[-1]) + _ALIGNED, dtype=np.uint8)
        self._starts = (starts + -self._memory.__array_interface__["data"][0] % _ALIGNED).tolist()
        self._copies = (self._memory.__array_interface__["data"][0] + np.array(self._starts[:-1])).tolist()
        self.before = native.Table(sizes, types, copies=self._copies)
        self.after = native.Table(sizes, types, before=self._copies)

    def used(self, grads: Grads) -> native.Table:
        """Leads to gradients."""
        if self._used is None or self._used[0] is not grads:
            self._used = grads, grads.table()
        return self._used[1]

    def both(self, grads: Grads) -> native.Table:
        """Leads to the parameters, and behind them to gradients, as the readings of both lie."""
        if self._both is None or self._both[0] is not grads:
            self._both = grads, grads.table(self._sizes, self._types, self._copies)
        return self._both[1]

    def kept(self) -> Kept:
        """The copies, as tensors."""
        whole = torch.from_numpy(self._memory)
        copies = []
        for start, size, form in zip(self._starts, self._sizes, self._forms, strict=False):
            flat = whole[start : start + size * form[1].itemsize].view(form[1])
            copies.append(flat.as_strided(form[4], form[5]))
        return Kept.of(copies)
