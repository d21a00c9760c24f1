"""Levels, their pooling and their colours, against the same done one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paramwatch.heatmap import (
    INFINITE,
    MISSING,
    NOT_FINITE,
    NOT_MEASURED,
    PALETTE,
    ZERO,
    Scale,
    Stretch,
    levels,
    pool,
    stretches,
)


def test_what_is_not_finite_and_what_was_not_measured_are_levels_of_their_own() -> None:
    found = levels(np.array([2.0, -3.0, 0.0, np.nan, -np.inf, np.nan]), np.array([True] * 5 + [False]))

    assert found.tolist() == [2.0, 3.0, 0.0, INFINITE, INFINITE, MISSING]


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (7, 5), (8, 10), (100, 33)])
def test_pooling_keeps_of_neighbours_the_greatest(rows: int, steps: int) -> None:
    found = np.random.default_rng(rows).uniform(-1, 1, (rows, steps)).astype(np.float32)
    pooled = pool(found, 7, 5)

    height, width = pooled.shape
    assert (height, width) == (min(rows, 7), min(steps, 5))
    edges = [[i * n // m for i in range(m + 1)] for n, m in ((rows, height), (steps, width))]
    for i, j in np.ndindex(height, width):
        part = found[edges[0][i] : edges[0][i + 1], edges[1][j] : edges[1][j + 1]]
        assert pooled[i, j] == part.max()


def test_a_scale_spans_whole_decades_and_leaves_a_few_tiny_ones_out() -> None:
    assert Scale.of(np.array([0.02, 3.0, 0.0, MISSING, INFINITE])) == Scale(0.01, 10.0)
    assert Scale.of(np.array([5.0])) == Scale(1.0, 10.0)
    assert Scale.of(np.array([0.0, MISSING, INFINITE])) == Scale(0.1, 1.0)
    assert Scale.of(np.concatenate([np.full(1000, 0.5), [1e-30]])) == Scale(0.1, 1.0)
    assert Scale.of(np.array([1e-30, 1.0])) == Scale(1e-8, 1.0)
    assert Scale(0.01, 10.0).decades == [-2, -1, 0, 1]


@pytest.mark.parametrize("extreme", [1.4e-45, 3.4e38])
def test_a_scale_reaches_both_ends_of_float32(extreme: float) -> None:
    scale = Scale.of(np.float32([extreme]))

    assert 0 < scale.low < scale.high < math.inf
    assert scale.pixels(np.float32([extreme])).shape == (1,)


def test_pixels_grow_brighter_with_the_logarithm_and_specials_have_their_own() -> None:
    scale = Scale(1e-4, 1.0)
    found = scale.pixels(np.array([1e-9, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 0.0, MISSING, INFINITE]))

    assert found.dtype == np.uint8
    low, same, *middle, high, zero, missing, infinite = found.tolist()
    assert (low, same, high) == (NOT_FINITE + 1, NOT_FINITE + 1, len(PALETTE) - 1)
    assert middle == [low + round((high - low) * quarter / 4) for quarter in (1, 2, 3)]
    assert (zero, missing, infinite) == (ZERO, NOT_MEASURED, NOT_FINITE)
    assert len(set(PALETTE)) == len(PALETTE) == 256


def test_stretches_are_at_the_greatest_depth_that_gives_few() -> None:
    names = ["embed.weight", *(f"layers.{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")), "head.weight"]

    assert stretches(names, 5) == [
        Stretch("embed.weight", 0, 1),
        Stretch("layers.0", 1, 3),
        Stretch("layers.1", 3, 5),
        Stretch("layers.2", 5, 7),
        Stretch("head.weight", 7, 8),
    ]
    assert [stretch.name for stretch in stretches(names, 4)] == ["embed", "layers", "head"]
    assert stretches(names, 2) == [Stretch("", 0, 8)]
    assert [stretch.name for stretch in stretches(names, 2, least=2)] == ["embed", "layers", "head"]
    assert [stretch.name for stretch in stretches(names, 4, least=3)] == ["embed", "layers", "head"]
    assert [stretch.name for stretch in stretches(names, 8)] == names
    assert stretches([], 4) == [Stretch("", 0, 0)]


def test_rows_that_lie_apart_are_stretches_of_their_own() -> None:
    assert stretches(["a.x", "b.x", "a.y"], 3) == [Stretch("a.x", 0, 1), Stretch("b.x", 1, 2), Stretch("a.y", 2, 3)]
    assert stretches(["a.x", "b.x", "a.y"], 2) == [Stretch("", 0, 3)]
