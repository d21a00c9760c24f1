"""What many small tensors are asked, answered for all of them at once.

`summary` judges each tensor for itself. What reads elements (extremes, samples, how evenly they are spread) is dear for one tensor at a
time and cheap for thousands side by side. Each answer is the one that the tensor alone would get,
from the same formulas; what is not answered here is found out when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from paramwatch.answering import LEAST, answered, is_near
from paramwatch.columns import Array
from paramwatch.drawn import Answers, Numbers, Rows
from paramwatch.initial import ENOUGH, NO_CHANCE
from paramwatch.matrices import even_zeros, rows_of
from paramwatch.sampling import Limits, Whole, looked
from paramwatch.sidebyside import alike, at_once, sampled, side_by_side
from paramwatch.zeros import asked_of, may_be_even

_ALIKE = 4
"""Fewer tensors of one shape are not worth it."""

_FAR = 0.45
"""Mean square over squared reach from which on numbers may be two-sided: of a uniform law it is 1/3."""


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
        self.looked_at: list[Tensor | None] = [None] * len(held)
        """What is measured."""
        self.wholes: list[Whole | None] = [None] * len(held)
        """What is known beside it."""
        self.rows = [Rows()] * len(held)
        """What is known of the rows of each, once `answers` has begun."""
        for (shape, *_), which in self._by_shape.items():
            if len(which) >= _ALIKE and shape.numel() > self.limits.exact:
                for group in at_once(which, [shape.numel()] * len(which)):
                    self._look_at(group)
        for i, x in enumerate(held):
            if x is not None and self.looked_at[i] is None:
                self.looked_at[i], self.wholes[i] = looked(x, self.limits)

    def _look_at(self, group: Sequence[int]) -> None:
        """At samples of tensors of one shape; what is not finite is left over."""
        tensors = [x for i in group if (x := self.held[i]) is not None]
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
        self.rows = rows_of(self.held, self._by_shape, usable & (np.array(zeros) == 0))
        alike: dict[tuple[float, bool, torch.dtype, torch.device], dict[int, Numbers]] = {}
        holed: list[int] = []
        for (shape, _, device), which in self._by_shape.items():
            for i in which:
                if usable[i] and (x := numbers[i]) and (zeros[i] or _are_enough(x)) and not self._settled(i):
                    of = asked_of(x, zeros[i], default_zeros[i])
                    alike.setdefault((x.grain, is_near(of), self._tensor(i).dtype, device), {})[i] = of
                    if zeros[i] and may_be_even(shape, zeros[i] / x.n):
                        holed.append(i)
        even, most = even_zeros(self.held, holed), self.limits.judged
        for (_, near, *_), known in alike.items():
            for group in at_once([*known], [min(self._tensor(i).numel(), most) for i in known]):
                elements = side_by_side([self._tensor(i) for i in group], most)
                elements = elements if near else elements.like(elements.flat.astype(np.float64))
                found = answered(elements, [known[i] for i in group])
                yield {
                    i: answer._replace(even_zeros=even[i]) if i in even else answer
                    for i, answer in zip(group, found, strict=True)
                    if answer is not None
                }

    def _tensor(self, i: int) -> Tensor:
        x = self.looked_at[i]
        assert x is not None
        return x

    def _settled(self, i: int) -> bool:
        """Whether no law is asked for."""
        gain = self.rows[i].orthogonal
        return gain is not None and gain is not False and gain[1] < NO_CHANCE


def _are_enough(x: Numbers) -> bool:
    """Whether something is asked of them if none is zero; of fewer it is found out when it is."""
    far = x.reach(0.0)
    # a product: a power that is too large raises
    return x.n >= ENOUGH or (x.n >= LEAST and x.square(0.0) > _FAR * far * far)
