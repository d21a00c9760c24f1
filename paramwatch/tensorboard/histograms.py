"""Histograms as TensorBoard draws them: of the elements of a tensor, from our own bins, and of a statistic over many rows.

Only what is finite has a place on an axis. TensorBoard's `add_histogram` refuses a tensor without a finite element, and one that is not
finite empties the chart; here such a tensor has no histogram, and its norm says why.
"""

from __future__ import annotations

import numpy as np
from tensorboard.compat.proto import summary_pb2

from paramwatch.bins import HIGH, ZERO
from paramwatch.columns import Array

MOST_BUCKETS = 60
"""Of a distribution."""

_LARGEST = float(np.finfo(np.float32).max)
_TINY = float(HIGH[ZERO + 1])
_THIN = 2.0**-10
"""By how much a bucket of one number only is made wider to each side, as a part of that number: without a width nothing is drawn."""


def of_elements(counts: Array, low: float, high: float, mean: float, rms: float) -> summary_pb2.HistogramProto | None:
    """The histogram of a tensor's finite elements; None where there is none.

    The bins of zero and of what is too small for an exponent of its own are one bucket, and neighbouring empty bins are one. The first
    and the last bucket end where the elements do.

    Args:
        counts: int64 [bins], negative where no histogram was made.
        low: The least of the elements.
        high: The greatest.
        mean: Of the elements, NaN if it is not known.
        rms: Of the elements.
    """
    n = int(counts.sum())
    if n <= 0 or not low <= high:
        return None
    # what is too large for a part is held as infinite
    low, high = max(low, -_LARGEST), min(high, _LARGEST)
    counts = np.concatenate([counts[: ZERO - 1], counts[ZERO - 1 : ZERO + 2].sum(keepdims=True), counts[ZERO + 2 :]])
    ends = np.concatenate([HIGH[: ZERO - 1], HIGH[ZERO + 1 :]])
    filled = np.flatnonzero(counts)
    counts, ends = counts[filled[0] : filled[-1] + 1], ends[filled[0] : filled[-1] + 1]
    # an empty bin whose neighbour to the right is empty too ends where that one does
    kept = np.append((counts[:-1] > 0) | (counts[1:] > 0), True)
    counts, ends = counts[kept], ends[kept]
    if len(counts) == 1:
        low, high = (_below(low), _above(high)) if low == high else (low, high)
    else:
        # an element may be all there is of its bin, and at the edge of it
        low, high = min(low, _below(ends[0])), max(high, _above(ends[-2]))
    ends[-1] = high
    return summary_pb2.HistogramProto(
        min=low, max=high, num=n, sum=n * mean, sum_squares=n * rms * rms, bucket_limit=ends.tolist(), bucket=counts.tolist()
    )


def _below(number: float) -> float:
    return number - max(abs(number) * _THIN, _TINY)


def _above(number: float) -> float:
    return number + max(abs(number) * _THIN, _TINY)


def of_magnitudes(values: Array, among: Array) -> list[summary_pb2.HistogramProto | None]:
    """For each step the histogram of the decimal logarithms of some values, those that are above 0 and finite; None where there is none.

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
    first, last = (np.floor(end / width).astype(np.int64) for end in (low, high))
    logs = np.where(shown, logs, 0.0)
    # each step has as many places as there may be buckets
    place = np.floor(logs / width[:, None]).astype(np.int64) + (MOST_BUCKETS * np.arange(len(values)) - first)[:, None]
    counts = np.bincount(place[shown], minlength=MOST_BUCKETS * len(values)).reshape(-1, MOST_BUCKETS).tolist()
    numbers = zip(first.tolist(), last.tolist(), width.tolist(), counts, logs.sum(1), np.square(logs).sum(1), strict=True)
    return [_magnitudes(*each) if shown_any else None for shown_any, each in zip(some.tolist(), numbers, strict=True)]


def _magnitudes(first: int, last: int, width: float, counts: list[int], total: float, squares: float) -> summary_pb2.HistogramProto:
    """Buckets of a width, from a multiple of it on; those beyond the last are empty."""
    counts, ends = counts[: last - first + 1], [(i + 1) * width for i in range(first, last + 1)]
    return summary_pb2.HistogramProto(
        min=first * width, max=ends[-1], num=sum(counts), sum=total, sum_squares=squares, bucket_limit=ends, bucket=counts
    )
