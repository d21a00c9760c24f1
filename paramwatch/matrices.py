"""What the rows of many matrices are: orthogonal, the same, of one scale; and whether columns have as many zeros.

Between `sidebyside` and `together`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.drawn import Rows
from paramwatch.formulas import chosen_rows, column_sums, differ_in_scale, gains_of_rows, may_be_orthogonal
from paramwatch.ragged import Ragged
from paramwatch.sidebyside import Shape, at_once, side_by_side


@torch.no_grad()
def rows_of(tensors: Sequence[Tensor | None], by_shape: Mapping[Shape, Sequence[int]], drawn: Array) -> list[Rows]:
    """Of each tensor; of those whose position is not in `by_shape` nothing is known.

    Args:
        tensors: Of a model.
        by_shape: Positions of those that are laid side by side.
        drawn: Whether all elements of one may be drawn at once: of others it is not asked whether they are of one scale.
    """
    found = [Rows()] * len(tensors)
    matrices = {shape: which for shape, which in by_shape.items() if len(shape[0]) > 1 and min(_sides(shape[0])) > 1}
    near: set[int] = set()
    for group, dtype, block, sides in _laid(tensors, [i for which in matrices.values() for i in which]):
        for i, may_repeat in zip(group, _may_repeat(block, sides).tolist(), strict=True):
            found[i] = Rows(False, may_repeat)
        if (once := drawn[group]).any():
            uneven = differ_in_scale(block.only(once), sides[once]).tolist()
            for i, differ in zip(np.array(group)[once].tolist(), uneven, strict=True):
                found[i] = Rows(False, found[i].may_repeat, differ)
        may_be = may_be_orthogonal(*_ends(block, sides), torch.finfo(dtype).eps)
        near.update(np.array(group)[may_be].tolist())
    for (shape, *_), which in matrices.items():
        for group, dtype, block, _ in _laid(tensors, [i for i in which if i in near]):
            rows = block.flat.reshape(-1, *_sides(shape))
            # columns, where these are fewer
            rows = rows.swapaxes(1, 2) if rows.shape[1] > rows.shape[2] else rows
            some, length = rows[:, chosen_rows(*rows.shape[1:])], rows.shape[2]
            gains = gains_of_rows(some.astype(np.float64, copy=False), length, torch.finfo(dtype).eps)
            for i, gain in zip(group, gains, strict=True):
                found[i] = found[i]._replace(orthogonal=gain or False)
    return found


@torch.no_grad()
def even_zeros(tensors: Sequence[Tensor | None], which: Sequence[int]) -> dict[int, bool]:
    """Whether there are as many zeros in each column, of the matrices at some positions."""
    found: dict[int, bool] = {}
    for group, _, block, sides in _laid(tensors, which):
        zeros = Ragged(column_sums(block.flat == 0, sides, np.uint16), sides[:, 1])
        same = np.maximum.reduceat(zeros.flat, zeros.starts) == np.minimum.reduceat(zeros.flat, zeros.starts)
        found |= zip(group, same.tolist(), strict=True)
    return found


def _laid(tensors: Sequence[Tensor | None], which: Sequence[int]) -> Iterator[tuple[Sequence[int], torch.dtype, Ragged, Array]]:
    """Some positions of one dtype at a time, the matrices there, one in each row, and how many rows and columns these have."""
    alike: dict[tuple[torch.dtype, torch.device], dict[int, Tensor]] = {}
    for i in which:
        if (x := tensors[i]) is not None:
            alike.setdefault((x.dtype, x.device), {})[i] = x
    for (dtype, _), of in alike.items():
        for group in at_once([*of], [x.numel() for x in of.values()]):
            some = [of[i] for i in group]
            yield group, dtype, side_by_side(some), np.array([_sides(x.shape) for x in some])


def _may_repeat(matrices: Ragged, sides: Array) -> Array:
    """Whether of the first, the middle and the last row two are the same, of matrices of two rows or more."""
    rows, columns = sides.T
    step = np.ones_like(columns)
    first, middle, last = (_taken(matrices, row * columns, step, columns) for row in (0 * rows, rows // 2, rows - 1))
    found: Array = _same(first, last) | ((rows > 2) & (_same(first, middle) | _same(middle, last)))
    return found


def _ends(matrices: Ragged, sides: Array) -> tuple[Ragged, Ragged]:
    """The first row of each matrix and the last, or columns where these are fewer, in float64."""
    rows, columns = sides.T
    tall = rows > columns
    step, last = np.where(tall, columns, 1), np.where(tall, columns - 1, (rows - 1) * columns)
    one, other = (_taken(matrices, start, step, sides.max(1)) for start in (np.zeros_like(rows), last))
    return one.like(one.flat.astype(np.float64)), other.like(other.flat.astype(np.float64))


def _taken(matrices: Ragged, start: Array, step: Array, lengths: Array) -> Ragged:
    """A line of each matrix: so many elements from one on, so many apart."""
    line = Ragged(matrices.flat[:0], lengths)
    place = np.arange(int(line.ends[-1])) - line.starts.repeat(lengths)
    at = (matrices.starts + start).repeat(lengths) + place * step.repeat(lengths)
    return line.like(matrices.flat.take(at))


def _same(one: Ragged, other: Ragged) -> Array:
    found: Array = np.logical_and.reduceat(one.flat == other.flat, one.starts)
    return found


def _sides(shape: torch.Size) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
