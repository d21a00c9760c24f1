"""How often numbers repeat: few values, and many elements at an extreme, which no smooth law has; and what rounding alone does.

Beside `formulas`. Elements ascend in each row.
"""

from __future__ import annotations

import math

import numpy as np

from paramwatch.columns import Array
from paramwatch.ragged import Ragged

COARSE = 1e-4
"""Dtypes of a coarser grain (float16, bfloat16) repeat their values, and torch may draw in their precision, too."""

_FEW, _OF_MANY = 64, 1024
"""Values that a smooth law does not keep to over so many elements, even in bfloat16."""


def spread(ascending: Ragged, grain: float) -> Ragged:
    """Equal values of a coarse dtype laid evenly over the interval that rounds to them: tests of a smooth law expect no repetitions.

    Args:
        ascending: In each row.
        grain: Of the dtype; others than coarse ones come back as they are.
    """
    if grain < COARSE:
        return ascending
    flat = ascending.flat
    begins = np.concatenate(([True], flat[1:] != flat[:-1]))
    begins[ascending.starts] = True
    starts = np.flatnonzero(begins)
    values, counts = flat[starts], np.diff(starts, append=len(flat))
    # the first and the last of a row end at their values
    opens = starts.searchsorted(ascending.starts)
    closes = np.append(opens[1:], len(starts)) - 1
    middles = (values[1:] + values[:-1]) / 2
    low, high = np.concatenate((values[:1], middles)), np.concatenate((middles, values[-1:]))
    low[opens], high[closes] = values[opens], values[closes]
    place = np.arange(0.5, len(flat)) - starts.repeat(counts)
    return ascending.like((low.repeat(counts) + place * ((high - low) / counts).repeat(counts)).astype(flat.dtype, copy=False))


def few_values(ascending: Ragged, grain: float) -> Array:
    """How many distinct values there are in each row if they are too few for a smooth law in that precision, else 0."""
    found = np.zeros(len(ascending), int)
    many = ascending.lengths >= _OF_MANY
    if not many.any():
        return found
    ascending = ascending.only(many)
    flat = ascending.flat
    changes = np.concatenate(([True], flat[1:] != flat[:-1]))
    changes[ascending.starts] = True
    distinct, (low, high) = ascending.counts(changes), ascending.extremes()
    # numbers of that dtype between the two, at least
    possible = (high - low) / (grain * np.maximum(high, -low)) if grain else math.inf
    most = np.minimum(_FEW if grain > COARSE else ascending.counts(flat != 0) // 4, possible / 4)
    found[many] = np.where(distinct <= most, distinct, 0)
    return found


def have_tied_ends(ascending: Ragged, grain: float) -> Array:
    """Whether more elements of each row are equal to the least or to the greatest than rounding to a grain explains."""
    flat, most = ascending.flat, np.minimum(_usual_ties(ascending.lengths, grain), ascending.lengths - 1)
    first, last = ascending.starts, ascending.ends - 1
    found: Array = (ascending.lengths > most + 1) & ((flat[first + most] == flat[first]) | (flat[last - most] == flat[last]))
    return found


def tied_ends(ascending: Array, grain: float) -> tuple[int, int]:
    """How many elements are equal to the least one and to the greatest, 0 where that is no more than rounding to a grain explains."""
    row = Ragged.of([ascending])
    if not have_tied_ends(row, grain)[0]:
        return 0, 0
    most = int(_usual_ties(row.lengths, grain)[0])
    at_low = int(np.searchsorted(ascending, ascending[0], "right"))
    at_high = len(ascending) - int(np.searchsorted(ascending, ascending[-1], "left"))
    return at_low if at_low > most else 0, at_high if at_high > most else 0


def _usual_ties(m: Array, grain: float) -> Array:
    # a uniform law drawn in bfloat16 has up to a grain of its elements at a bound: a count that Poisson's law exceeds in 1 case of 100,000
    usual = m * (grain if grain > COARSE else 0.0)
    found: Array = (usual + 5 * np.sqrt(usual)).astype(int) + 3
    return found
