"""Statistics of splits against their formulas over the contributions themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramwatch import agreement
from paramwatch.record import Split


def split_of(contributions: np.ndarray, missing: float = 0.0, unit: float = 1.0, mode: str = "full") -> Split:
    """Of contributions [K, n], to which a part is added that no use accounts for."""
    rest = missing * np.ones(contributions.shape[1])
    whole = np.vstack([contributions, contributions.sum(0) + rest, rest])
    products = whole @ whole.T
    k = len(contributions)
    if mode != "full":
        products[:k, :k][~np.eye(k, dtype=bool)] = np.nan
        products[:k, k:] = products[k:, :k] = np.nan
    if mode == "norms":
        products[k + 1] = products[:, k + 1] = np.nan
    return Split(tuple(map(str, range(k))), mode, 1, products, 1e-9, unit)


VECTORS = st.integers(2, 5).flatmap(lambda k: st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=k, max_size=k))


@given(VECTORS, st.floats(-10, 10))
def test_shares_and_what_is_unattributed_sum_to_one(vectors: list[list[float]], missing: float) -> None:
    split = split_of(np.array(vectors), missing)
    total = split.products[len(vectors), len(vectors)]
    if total > 1e-6 * np.trace(split.products):
        whole = agreement.shares(split).sum() + agreement.statistics(split)["unattributed"]
        assert whole == pytest.approx(1, abs=1e-9)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=2, max_size=2))
def test_agreement_of_two_uses_is_their_cosine(vectors: list[list[float]]) -> None:
    one, two = np.array(vectors)
    norms = np.linalg.norm(one) * np.linalg.norm(two)
    found = agreement.statistics(split_of(np.array(vectors)))["agreement"]
    if norms > 1e-100:
        assert found == pytest.approx(one @ two / norms, abs=1e-12)
        assert agreement.cosines(split_of(np.array(vectors)))[0, 1] == pytest.approx(found, abs=1e-12)
    elif norms == 0:
        assert np.isnan(found)


@pytest.mark.parametrize("mode", ["full", "stream", "norms"])
def test_statistics_are_those_of_their_formulas_in_every_mode(mode: str) -> None:
    contributions = np.random.default_rng(0).normal(size=(5, 40)) * np.array([[1], [2], [3], [0.5], [1.5]])
    norms, summed = np.linalg.norm(contributions, axis=1), np.linalg.norm(contributions.sum(0))
    squares = np.square(norms).sum()

    found = agreement.statistics(split_of(contributions, mode=mode))

    assert found["agreement"] == pytest.approx((summed**2 - squares) / (norms.sum() ** 2 - squares))
    assert found["coherence"] == pytest.approx(summed / norms.sum())
    assert found["imbalance"] == pytest.approx(norms.max() / norms.min())
    assert found["use_count"] == 5
    assert agreement.norms(split_of(contributions, unit=0.25, mode=mode)) == pytest.approx(norms / 4)
    known = found["residual"] == pytest.approx(0, abs=1e-12)
    assert known if mode != "norms" else np.isnan(found["residual"])


def test_agreement_is_one_for_equal_uses_zero_for_unrelated_and_least_for_those_that_cancel() -> None:
    same, cross = np.ones((3, 4)), np.eye(4)[:3]
    cancelling = np.array([[1.0, 0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)]])

    assert agreement.statistics(split_of(same))["agreement"] == pytest.approx(1)
    assert agreement.statistics(split_of(cross))["agreement"] == pytest.approx(0)
    assert agreement.statistics(split_of(cancelling))["agreement"] == pytest.approx(-1 / 2)
    assert agreement.statistics(split_of(cancelling))["coherence"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("norms", "horizon"),
    [([1, 1, 1, 1], 4), ([0, 0, 0, 5], 1), ([1, 1, 98], 2), ([2, 1, 98], 3), ([0, 0], np.nan)],
)
def test_horizon_is_the_fewest_last_calls_that_hold_99_percent(norms: list[float], horizon: float) -> None:
    found = agreement.statistics(split_of(np.diag(np.array(norms, dtype=float))))["horizon"]

    assert found == horizon or (np.isnan(found) and np.isnan(horizon))


def test_what_is_missing_shows_only_beyond_rounding() -> None:
    contributions = np.random.default_rng(0).normal(size=(2, 9))

    assert agreement.is_explained(split_of(contributions, missing=1e-11))
    assert not agreement.is_explained(split_of(contributions, missing=0.1))
    assert agreement.missing_norm(split_of(contributions, missing=0.1, unit=2)) == pytest.approx(0.1 * 3 * 2)


def test_a_use_that_is_no_number_leaves_the_others_theirs() -> None:
    contributions = np.array([[1.0, 2], [np.nan, 1], [2, 0]])

    norms = agreement.norms(split_of(contributions, unit=np.nan))

    assert norms[[0, 2]] == pytest.approx([np.sqrt(5), 2])
    assert np.isnan(norms[1])
    assert agreement.is_explained(split_of(contributions))
