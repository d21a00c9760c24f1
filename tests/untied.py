"""Contributions of uses against the gradients of an untied twin: bit by bit, as their inner products, and whether they add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from paramwatch.record import Split
from paramwatch.uses import arriving, held

Multiplied = list[tuple[list[Tensor], Tensor]]
"""The contributions of a row, and what autograd delivered to it."""


@contextmanager
def multiplied() -> Iterator[Multiplied]:
    """What is multiplied meanwhile, row by row: the contributions themselves."""
    found: Multiplied = []
    gram = arriving.gram

    def listening(grads: Sequence[Tensor], total: Tensor, before: Tensor | None = None) -> Tensor:
        found.append(([grad.clone().to(total.dtype) for grad in grads], total.clone()))
        return gram(grads, total, before)

    with patch.object(arriving, "gram", listening), patch.object(held, "gram", listening):
        yield found


def multiplied_for(gradient: Tensor, seen: Multiplied) -> tuple[list[Tensor], Tensor]:
    """What was multiplied for the row of this gradient; a step may have been looked at before it was complete."""
    (found, *_) = [each for each in seen if torch.equal(each[1], gradient.reshape(-1))]
    return found


def assert_contributions(split: Split, found: Sequence[Tensor], total: Tensor, truth: Sequence[Tensor], gradient: Tensor) -> None:
    """What was multiplied are the gradients of the twin and that of the row, bit for bit, and the split is of them."""
    assert len(found) == len(truth)
    for name, mine, true in zip(split.uses, found, truth, strict=True):
        assert torch.equal(mine, true.reshape(-1)), f"{name}: {(mine - true.reshape(-1)).abs().max()}"
    assert torch.equal(total, gradient.reshape(-1))
    wide = torch.stack([x.reshape(-1).double() for x in (*truth, gradient)])
    wide = torch.cat([wide, (wide[-1] - wide[:-1].sum(0))[None]])
    np.testing.assert_allclose(split.products, wide @ wide.T, rtol=1e-12, atol=1e-18 * float(wide[-2].norm()) ** 2)
    assert np.sqrt(split.products[-1, -1]) <= split.rounding
