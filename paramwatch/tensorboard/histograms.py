"""Histograms as TensorBoard draws them: of the elements of a tensor, from our own bins, and of a statistic over many rows.

As arrays for many at once: `messages` makes bytes of them.

Only what is finite has a place on an axis. TensorBoard's `add_histogram` refuses a tensor without a finite element, and one that is not
finite empties the chart; here such a tensor has no histogram, and its norm says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paramwatch.bins import HIGH, ZERO
from paramwatch.columns import Array

MOST_BUCKETS = 60
"""Of a distribution."""

_LARGEST = float(np.finfo(np.float32).max)
_TINY = float(HIGH[ZERO + 1])
_ENDS = np.concatenate([HIGH[: ZERO - 1], HIGH[ZERO + 1 :]])
_THIN = 2.0**-10
"""By how much a bucket of one number only is made wider to each side, as a part of that number: without a width nothing is drawn."""


@dataclass(frozen=True)
class Histograms:
    """Some histograms, n of them; buckets of one behind those of another."""

    sizes: Array
    """How many buckets each has, int [n]; none where there is no histogram."""
    numbers: Array
    """The least and the greatest end, how many elements there are, their sum, and that of their squares: float64 [n, 5]."""
    limits: Array
    """Where each bucket ends."""
    counts: Array
    """How many elements are in it."""


def of_elements(counts: Array, low: Array, high: Array, mean: Array, rms: Array) -> Histograms:
    """For each tensor the histogram of its finite elements, where there are any.

    The bins of zero and of what is too small for an exponent of its own are one bucket, and neighbouring empty bins are one. The first
    and the last bucket end where the elements do.

    Args:
        counts: int64 [n, bins], negative where no histogram was made.
        low: The least of the elements, [n].
        high: The greatest.
        mean: Of the elements, NaN if it is not known.
        rms: Of the elements.
    """
    number = counts.sum(axis=1)
    which = np.flatnonzero((number > 0) & (low <= high))
    found, all_sizes = np.zeros((len(counts), 5)), np.zeros(len(counts), np.intp)
    if not len(which):
        return Histograms(all_sizes, found, np.empty(0), np.empty(0))
    counts, number, mean, rms = (each[which] for each in (counts, number, mean, rms))
    # what is too large for a part is held as infinite
    low, high = np.maximum(low[which], -_LARGEST), np.minimum(high[which], _LARGEST)
    zeros = counts[:, ZERO - 1 : ZERO + 2].sum(axis=1, keepdims=True)
    counts = np.concatenate([counts[:, : ZERO - 1], zeros, counts[:, ZERO + 2 :]], axis=1)
    full = counts > 0
    first = full.argmax(axis=1)
    # an empty bin whose neighbour to the right is empty too ends where that one does
    kept = full.copy()
    kept[:, :-1] |= full[:, 1:]
    kept &= np.arange(full.shape[1]) >= first[:, None]
    limits, counts, sizes = _ENDS[kept.nonzero()[1]], counts[kept], kept.sum(axis=1)
    ends = np.cumsum(sizes)
    # an element may be all there is of its bin, and at the edge of it
    several = sizes > 1
    with np.errstate(invalid="ignore"):
        least, greatest = _below(_ENDS[first]), _above(limits[ends - 2])
    low = np.where(several, np.minimum(low, least), np.where(low == high, _below(low), low))
    high = np.where(several, np.maximum(high, greatest), np.where(low == high, _above(high), high))
    limits[ends - 1] = high
    found[which] = np.stack([low, high, number, number * mean, number * rms * rms], axis=1)
    all_sizes[which] = sizes
    return Histograms(all_sizes, found, limits, counts)


def _below(number: Array) -> Array:
    return number - np.maximum(np.abs(number) * _THIN, _TINY)


def _above(number: Array) -> Array:
    return number + np.maximum(np.abs(number) * _THIN, _TINY)


def of_magnitudes(values: Array, among: Array) -> Histograms:
    """For each step the histogram of the decimal logarithms of some values, those that are above 0 and finite.

    Args:
        values: [n, rows].
        among: Those that are meant, bool [n, rows].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values)
    shown = among & np.isfinite(logs)
    some: Array = np.logical_or.reduce(shown, axis=1)
    low, high = (np.where(some, pick(np.where(shown, logs, other), 1), 0.0) for pick, other in ((np.min, np.inf), (np.max, -np.inf)))
    span = high - low
    width = np.where(span < MOST_BUCKETS // 4 - 1, 0.25, np.ceil(span / (MOST_BUCKETS - 1)))
    # buckets from a multiple of their width on
    first, last = (np.floor(end / width).astype(np.int64) for end in (low, high))
    logs = np.where(shown, logs, 0.0)
    # each step has as many places as there may be buckets
    place = np.floor(logs / width[:, None]).astype(np.int64) + (MOST_BUCKETS * np.arange(len(values)) - first)[:, None]
    counts = np.bincount(place[shown], minlength=MOST_BUCKETS * len(values)).reshape(-1, MOST_BUCKETS)
    sizes = np.where(some, last - first + 1, 0)
    used = np.arange(MOST_BUCKETS) < sizes[:, None]
    limits = (first[:, None] + np.arange(1, MOST_BUCKETS + 1)) * width[:, None]
    numbers = np.stack([first * width, (last + 1) * width, shown.sum(1), logs.sum(1), np.square(logs).sum(1)], axis=1)
    return Histograms(sizes, numbers, limits[used], counts[used])
