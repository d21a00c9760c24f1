"""The bins of a histogram: every finite number is in exactly one, and they rise."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paramwatch.bins import BINS, HIGH, LEAST, LOW, MOST, ZERO, merged, positions


def holding(x: float) -> list[int]:
    """The bins that hold a number, by their edges."""
    found = [i for i in range(BINS) if i > ZERO and x > 0 and LOW[i] <= x < HIGH[i]]
    found += [i for i in range(BINS) if i < ZERO and x < 0 and LOW[i] < x <= HIGH[i]]
    return found + [ZERO] * (x == 0)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-1080, 1023).map(lambda e: math.ldexp(1.0, e)))
def test_every_finite_number_is_in_the_one_bin_whose_edges_enclose_it(x: float) -> None:
    assert [int(positions(np.array(x)))] == holding(x)


def test_what_is_not_finite_is_in_no_bin() -> None:
    assert positions(np.array([np.nan, np.inf, -np.inf])).tolist() == [BINS] * 3


def test_the_bins_rise_without_a_gap_and_are_symmetric() -> None:
    assert BINS == len(LOW) == len(HIGH) == 255
    np.testing.assert_array_equal(LOW[1:], HIGH[:-1])
    np.testing.assert_array_equal(LOW, -HIGH[::-1])
    assert (LOW[0], LOW[ZERO], HIGH[ZERO], HIGH[-1]) == (-np.inf, 0, 0, np.inf)


def test_the_smallest_magnitudes_share_a_bin_and_so_do_the_largest() -> None:
    least, most = 2.0**LEAST, 2.0 ** (MOST + 1)
    numbers = np.array([5e-324, np.nextafter(least, 0), least, np.nextafter(most, 0), most, np.finfo(float).max])

    assert positions(numbers).tolist() == [ZERO + 1, ZERO + 1, ZERO + 2, BINS - 2, BINS - 1, BINS - 1]
    assert positions(-numbers).tolist() == [2 * ZERO - i for i in positions(numbers)]
    assert positions(np.array([0.0, -0.0])).tolist() == [ZERO, ZERO]


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=9), min_size=1, max_size=4))
def test_histograms_of_pieces_merge_to_that_of_the_whole(pieces: list[list[float]]) -> None:
    def histogram(numbers: list[float]) -> np.ndarray:
        return np.bincount(positions(np.array(numbers)), minlength=BINS)

    # two groups: all of them, the other way round, and the last by itself
    order = np.array([*range(len(pieces))[::-1], len(pieces) - 1])
    whole, last = merged(np.array([histogram(piece) for piece in pieces]), order, np.array([0, len(pieces)]))
    np.testing.assert_array_equal(whole, histogram([x for piece in pieces for x in piece]))
    np.testing.assert_array_equal(last, histogram(pieces[-1]))


def test_what_was_not_measured_adds_nothing() -> None:
    nothing, one = np.full(BINS, -1), np.zeros(BINS, np.int64)
    one[3] = 7

    found = merged(np.array([nothing, one, one, nothing]), np.array([0, 1, 2, 0, 3]), np.array([0, 3]))
    np.testing.assert_array_equal(found, [2 * one, nothing])
