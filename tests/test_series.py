"""What is drawn: numbers, what is not finite, what was not measured, each in its place, and the largest of those that share one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from written import write

from paramwatch.run import Run
from paramwatch.series import latest, recorded_steps, series
from paramwatch.span import BARS, SPOILT, Span, sparkline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Row 1 has NaN at the steps 4 and 5, row 2 has no gradient."""
    return write(tmp_path_factory.mktemp("run"), steps=range(10), spoilt=lambda step: [1] if step in (4, 5) else [], states={2: "none"})


@pytest.mark.parametrize("statistic", ["grad_norm", "grad_mean", "grad_std", "grad_max", "clip_coef", "update_ratio"])
def test_nan_that_was_measured_is_told_from_what_was_not_measured(run: Run, statistic: str) -> None:
    found = series(run, statistic)

    spoilt = np.zeros((10, 6), bool)
    spoilt[4:6, 1] = True
    np.testing.assert_array_equal(found.spoilt, spoilt)
    missing = spoilt.copy()
    missing[:, 2] = True
    np.testing.assert_array_equal(np.isnan(found.values), missing)
    frame = run.frame(statistic).to_numpy(np.float64)
    np.testing.assert_array_equal(found.values[~missing], frame[~missing])


def test_counts_and_rates_are_never_spoilt_and_finite_leaves_nothing_out(run: Run) -> None:
    for found in (series(run, "grad_nan"), series(run, "lr"), series(run, "grad_norm", finite=True)):
        assert not found.spoilt.any()
    assert series(run, "grad_nan").values[4, 1] == 1


def test_recorded_steps_are_those_of_the_frame(run: Run) -> None:
    assert recorded_steps(run).tolist() == run.steps.index.tolist()
    assert latest(np.arange(1000), 6) == slice(800, None)
    assert latest(np.arange(1000), 1_000_000) == slice(990, None)
    assert latest(np.arange(0), 6) == slice(0, None)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60, unique=True), st.integers(1, 40))
def test_each_column_has_the_largest_value_of_its_steps(numbers: list[int], most: int) -> None:
    steps = np.array(sorted(numbers), np.int64)
    values = np.cos(steps * 1.7)
    span = Span(steps, most)
    found = np.full(span.columns, np.nan)
    # in pieces, as a long run is read
    for piece in np.array_split(np.arange(len(steps)), 3):
        span.largest(steps[piece], values[piece], found)

    assert span.columns <= most
    edges = [(step - span.first) * span.columns // (span.end - span.first) for step in steps.tolist()]
    for column in range(span.columns):
        members = [value for value, at in zip(values, edges, strict=True) if at == column]
        assert found[column] == max(members) if members else np.isnan(found[column])
        assert span.source[column] == max(at for at in edges if at <= column)


def test_a_sparkline_rises_with_its_numbers_and_shows_what_is_not_one() -> None:
    steps = np.arange(8)
    nothing = np.zeros(8, bool)
    assert sparkline(steps, np.arange(8.0), nothing, 24) == BARS
    assert sparkline(steps, np.where(steps == 3, np.nan, 1.0), steps == 3, 24) == "▁▁▁×▁▁▁▁"
    assert sparkline(steps, np.where(steps == 3, np.nan, 1.0), nothing, 24) == "▁▁▁ ▁▁▁▁"
    assert sparkline(steps[:0], np.zeros(0), nothing[:0], 24) == ""
    assert len(sparkline(np.arange(10_000), np.ones(10_000), np.zeros(10_000, bool), 24)) == 24


@pytest.mark.parametrize("values", [[1e-300, 1e300], [-1e308, 1e308], [5e-324, 1e-320], [0.0, 1e-310], [-1.0, 0.0]], ids=str)
def test_a_sparkline_of_any_range_has_its_least_at_the_bottom_and_its_largest_at_the_top(values: list[float]) -> None:
    assert sparkline(np.arange(2), np.array(values), np.zeros(2, bool), 24) == BARS[0] + BARS[-1]


def test_a_spike_among_many_steps_is_seen() -> None:
    values, spoilt = np.ones(100_000), np.zeros(100_000, bool)
    values[50_001], spoilt[99_000] = 5, True
    drawn = sparkline(np.arange(100_000), values, spoilt, 24)
    assert drawn.count(BARS[-1]) == 1
    assert drawn.count(SPOILT) == 1


def test_a_run_of_one_step_is_a_run(tmp_path: Path) -> None:
    found = series(write(tmp_path, steps=[7]), "grad_norm")
    assert sparkline(found.steps, found.values[:, 0], found.spoilt[:, 0], 24) == BARS[0]
