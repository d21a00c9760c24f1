"""What the rows of many matrices are: orthogonal, or the same. A few rows tell in nearly all cases that they are neither.

Between `sidebyside` and `together`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.drawn import Rows
from paramwatch.formulas import chosen_rows, differ_in_scale, gains_of_rows, may_be_orthogonal
from paramwatch.sidebyside import Shape, at_once, side_by_side


@torch.no_grad()
def rows_of(tensors: Sequence[Tensor | None], by_shape: Mapping[Shape, Sequence[int]]) -> list[Rows]:
    """Of each tensor; of those whose position is not in `by_shape` nothing is known."""
    found = [Rows()] * len(tensors)
    matrices = {shape: which for shape, which in by_shape.items() if len(shape[0]) > 1 and min(_sides(shape[0])) > 1}
    # the first and the last are asked of all matrices at once whose rows have one length
    ends: dict[tuple[int, torch.dtype], list[tuple[int, Rows, Array]]] = {}
    for (shape, dtype, _), which in matrices.items():
        for group in at_once(which, shape.numel()):
            block = _laid(tensors, group)
            rows = _fewer(block)
            two = rows[:, :: rows.shape[1] - 1].astype(np.float64)
            known = [Rows(False, *each) for each in zip(_may_repeat(block).tolist(), differ_in_scale(block).tolist(), strict=True)]
            ends.setdefault((rows.shape[2], dtype), []).extend(zip(group, known, two, strict=True))
    near: set[int] = set()
    for (_, dtype), each in ends.items():
        may_be = may_be_orthogonal(np.stack([two for _, _, two in each]), torch.finfo(dtype).eps).tolist()
        for (i, known_of_it, _), may in zip(each, may_be, strict=True):
            found[i] = known_of_it
            if may:
                near.add(i)
    for (shape, dtype, _), which in matrices.items():
        for group in at_once([i for i in which if i in near], shape.numel()):
            rows = _fewer(_laid(tensors, group))
            some, length = rows[:, chosen_rows(*rows.shape[1:])], rows.shape[2]
            for i, gain in zip(group, gains_of_rows(some.astype(np.float64, copy=False), length, torch.finfo(dtype).eps), strict=True):
                found[i] = found[i]._replace(orthogonal=gain or False)
    return found


def _may_repeat(matrices: Array) -> Array:
    """Whether of the first, the middle and the last row two are the same, of matrices [..., row, element] of two rows or more."""
    some = matrices[..., sorted({0, matrices.shape[-2] // 2, matrices.shape[-2] - 1}), :]
    found: Array = (some == np.roll(some, 1, axis=-2)).all(-1).any(-1)
    return found


def _laid(tensors: Sequence[Tensor | None], which: Sequence[int]) -> Array:
    """Some tensors of one shape as matrices [tensor, row, element]."""
    some = [x for i in which if (x := tensors[i]) is not None]
    return side_by_side(some).reshape(-1, *_sides(some[0].shape))


def _fewer(block: Array) -> Array:
    """The rows, or the columns where they are fewer."""
    return block.swapaxes(1, 2) if block.shape[1] > block.shape[2] else block


def _sides(shape: torch.Size) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
