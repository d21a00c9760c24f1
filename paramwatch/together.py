"""What many tensors of one shape are asked, answered for all of them at once.

`summary` judges each tensor for itself. What reads elements (extremes, samples, how evenly they are spread) is dear for one tensor at a
time and cheap for thousands side by side: a network has many layers of one shape. Each answer is the one that the tensor alone would get,
from the same formulas; what is not answered here is found out when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.drawn import Answers, Law, Lopsided, Numbers, Tests
from paramwatch.formulas import few_values, have_tied_ends, spread
from paramwatch.initial import ENOUGH, NO_CHANCE
from paramwatch.laws import BOX, Asked, asked, falls, is_clear
from paramwatch.matrices import rows_of
from paramwatch.sampling import Limits, Whole, looked
from paramwatch.shapes import are_between, are_cut, are_normal, are_two_sided, are_uniform
from paramwatch.sidebyside import alike, at_once, sampled, side_by_side
from paramwatch.wording import not_smooth
from paramwatch.zeros import asked_of, may_be_even

_ALIKE = 4
"""Fewer tensors of one shape are not worth it."""

_NEAR, _TINY = 1000.0, 1e-10
"""Standard deviations from zero up to which single precision tells what double does, and where it can be squared."""

_LEAST = 8
"""Elements that are not zero without which nothing is asked of them."""


class Sights:
    """What is looked at of each tensor: all of it or a sample.

    Args:
        held: As `sampling.held` gives them, None where there is nothing to look at.
    """

    def __init__(self, held: Sequence[Tensor | None]) -> None:
        self.held = held
        self.limits = Limits.of([0 if x is None else x.numel() for x in held])
        self._by_shape = alike(held)
        """Positions of tensors that are asked together."""
        self._groups = [
            group for (shape, *_), which in self._by_shape.items() if len(which) >= _ALIKE for group in at_once(which, shape.numel())
        ]
        """Those of one shape, so many at a time as are laid side by side."""
        self.looked_at: list[Tensor | None] = [None] * len(held)
        """What is measured."""
        self.wholes: list[Whole | None] = [None] * len(held)
        """What is known beside it."""
        self.rows = rows_of(held, self._by_shape)
        """What is known of the rows of each."""
        for group in self._groups:
            self._look_at([x for i in group if (x := held[i]) is not None], group)
        for i, x in enumerate(held):
            if x is not None and self.looked_at[i] is None:
                self.looked_at[i], self.wholes[i] = looked(x, self.limits)

    def _look_at(self, tensors: Sequence[Tensor], group: Sequence[int]) -> None:
        """At tensors of one shape; what is not finite is left over."""
        if tensors[0].numel() > self.limits.exact:
            for i, some, whole in zip(group, *sampled(tensors, self.limits.judged), strict=True):
                if math.isfinite(whole.low) and math.isfinite(whole.high):
                    self.looked_at[i], self.wholes[i] = some, whole

    def answers(
        self, numbers: Sequence[Numbers | None], zeros: Sequence[float], default_zeros: Sequence[int], usable: Array
    ) -> Iterator[dict[int, Answers]]:
        """What `initial` asks of the tensors that have enough elements, some tensors at a time.

        Args:
            numbers: Of each tensor; None where there is nothing to look at.
            zeros: How many elements of each are zero.
            default_zeros: How many of these belong to the default.
            usable: Whether its elements are finite and not all equal.
        """
        even: dict[int, bool] = {}
        for group in self._groups:
            even |= self._even_zeros([i for i in group if zeros[i]], numbers, zeros)
        # those that have as many elements that are not zero are laid side by side
        beside: dict[tuple[int, int, bool, torch.dtype, torch.device], list[int]] = {}
        for (shape, dtype, device), which in self._by_shape.items():
            numel, most = shape.numel(), self.limits.judged
            # torch picks from tensors of one shape
            length = min(numel, most) if device.type == "cpu" else numel
            wanted = [i for i in which if usable[i] and not self._settled(i)]
            sampled = [i for i in wanted if zeros[i] and (numel > most or self.wholes[i] is not None)]
            nonzero = {i: length - int(zeros[i]) for i in wanted} | self._nonzero(sampled, length)
            for i in wanted:
                beside.setdefault((length, nonzero[i], self.wholes[i] is None, dtype, device), []).append(i)
        for (length, count, *_), which in beside.items():
            if count >= (ENOUGH if count == length else _LEAST):
                for group in at_once(which, length):
                    known = [asked_of(of, zeros[i], default_zeros[i]) for i in group if (of := numbers[i])]
                    found = _answered([self._tensor(i) for i in group], known, self.limits.judged)
                    yield {i: answer._replace(even_zeros=even[i]) if i in even else answer for i, answer in zip(group, found, strict=True)}

    def _nonzero(self, which: Sequence[int], length: int) -> dict[int, int]:
        """How many of the elements that are judged are not zero."""
        found: dict[int, int] = {}
        for group in at_once(which, length):
            block = side_by_side([self._tensor(i) for i in group], self.limits.judged)
            found |= zip(group, np.count_nonzero(block, axis=1).tolist(), strict=True)
        return found

    @torch.no_grad()
    def _even_zeros(self, which: Sequence[int], numbers: Sequence[Numbers | None], zeros: Sequence[float]) -> dict[int, bool]:
        """Whether there are as many zeros in each column, of those matrices of one shape of which that can be."""
        tensors = {
            i: x for i in which if (x := self.held[i]) is not None and (known := numbers[i]) and may_be_even(x.shape, zeros[i] / known.n)
        }
        if not tensors:
            return {}
        columns = (side_by_side([*tensors.values()]).reshape(-1, *next(iter(tensors.values())).shape) == 0).sum(1, dtype=np.uint16)
        return dict(zip(tensors, (columns == columns[:, :1]).all(1).tolist(), strict=True))

    def _tensor(self, i: int) -> Tensor:
        x = self.looked_at[i]
        assert x is not None
        return x

    def _settled(self, i: int) -> bool:
        """Whether no law is asked for."""
        gain = self.rows[i].orthogonal
        return gain is not None and gain is not False and gain[1] < NO_CHANCE


@torch.no_grad()
def _answered(tensors: Sequence[Tensor], numbers: Sequence[Numbers], most: int) -> list[Answers]:
    grain = numbers[0].grain
    low, high, std, n = np.array([(x.low, x.high, x.std, x.n) for x in numbers]).T
    # sorting is quicker in the precision they have
    ascending = np.sort(side_by_side(tensors, most), axis=1)
    far = np.maximum(high, -low)
    if ascending.dtype == np.float32 and not ((far < _NEAR * std) & (far > _TINY) & (far < 1 / _TINY)).all():
        ascending = ascending.astype(np.float64)
    nonzero = ascending if ascending.all() else ascending[ascending != 0].reshape(len(ascending), -1)
    few, tied = few_values(ascending, grain), have_tied_ends(nonzero, grain)
    large = n >= ENOUGH
    smooth = (few == 0) & ~tied & large & (nonzero.shape[1] >= ENOUGH // 2)
    laid = spread(nonzero, grain) if smooth.any() else nonzero
    with np.errstate(divide="ignore", over="ignore"):
        wide = (high - low) / 2 / std
    boxed = smooth & (BOX[0] < wide) & (wide < BOX[1])
    even = _found(boxed, lambda at: are_uniform(laid[at], low[at], high[at], grain))
    with np.errstate(over="ignore", under="ignore"):
        squared = (std**2 > 0) & (far**2 < math.inf)
    rest = smooth & squared & np.array([not one or falls(x) for x, one in zip(numbers, even, strict=True)])
    each = [_NOT_ASKED] * len(numbers)
    which = np.flatnonzero(rest).tolist()
    for i, one in zip(which, asked([numbers[i] for i in which]), strict=True):
        each[i] = one
    sketches, laws, uneven, may_be_normal = zip(*each, strict=True)
    between = _found(np.array([bool(one) for one in uneven]), lambda at: _are_between(laid[at], [uneven[i] for i in at], grain))
    open_ = rest & np.array([not (one and fits and is_clear(one)) for one, fits in zip(uneven, between, strict=True)])
    follows = _found(open_ & np.array([law is not None for law in laws]), lambda at: _are_cut(laid[at], [laws[i] for i in at], grain))
    open_ &= ~(boxed & np.array([bool(fits) for fits in follows]))
    normal = _found(open_ & np.array(may_be_normal), lambda at: are_normal(laid[at], grain))
    neither = rest & np.array([not (one or other or third) for one, other, third in zip(normal, follows, between, strict=True)])
    two_sided = _found(neither, lambda at: are_two_sided(laid[at], far[at], grain))
    for i, found in enumerate(_found(n < ENOUGH, lambda at: are_two_sided(nonzero[at], far[at], grain))):
        two_sided[i] = two_sided[i] if found is None else found
    cut = [(law, fits) if law is not None and fits is not None else None for law, fits in zip(laws, follows, strict=True)]
    lopsided = [None if one is None else (fits and one) or False for one, fits in zip(uneven, between, strict=True)]
    tests = [Tests(*known) for known in zip(even, normal, cut, two_sided, sketches, lopsided, strict=True)]
    each_of = zip(ascending, nonzero, laid, large.tolist(), few.tolist(), tied.tolist(), tests, strict=True)
    return [
        Answers(one, rest if not enough else smoothed, not_smooth(one, rest, grain, count) if enough and (count or ends) else "", test)
        for one, rest, smoothed, enough, count, ends, test in each_of
    ]


_NOT_ASKED = Asked(may_be_normal=False)


def _are_between(some: Array, found: Sequence[Lopsided | Literal[False] | None], grain: float) -> Array:
    laws = [one.law for one in found if one]
    return are_between(some, np.array([(law.centre, law.scale, *(law.ends or ())) for law in laws]).T, grain)


def _are_cut(some: Array, laws: Sequence[Law | None], grain: float) -> Array:
    centre, scale, cut = np.array([(law.centre, law.scale, law.cut) for law in laws if law is not None]).T
    return are_cut(some, centre, scale, cut, grain)


def _found(where: Array, test: Callable[[Array], Array]) -> list[bool | None]:
    """What a test finds of the tensors at some positions, None of the others."""
    found: list[bool | None] = [None] * len(where)
    if len(at := np.flatnonzero(where)):
        for i, passes in zip(at.tolist(), test(at).tolist(), strict=True):
            found[i] = passes
    return found
