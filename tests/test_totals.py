"""Totals of a step are the statistics of all its rows taken together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import inventory, record

from paramwatch.columns import STATISTICS, getter
from paramwatch.merging import merge
from paramwatch.record import Record
from paramwatch.totals import TOTALS, totals

Tensors = dict[str, list[float]]
NET = inventory("a", "b", "c", "d", tied={"a": ["d"]})
elements = st.lists(st.floats(-1e6, 1e6, width=32) | st.sampled_from([np.nan, np.inf, -np.inf, 0.0]), max_size=4)
tensors = st.dictionaries(st.sampled_from("abc"), elements)


def merged(found: Record, name: str) -> float:
    """The same by way of `columns.merge`, over the rows that were stepped."""
    values = {part: array.copy() for part, array in found.values.items()}
    values["count"][:, ~found.stepped] = -1
    one = merge(values, [range(len(found.stepped))])
    with np.errstate(invalid="ignore"):
        return float(STATISTICS[name].compute(getter(one, found.inventory.kinds), False)[0])


@given(tensors, tensors, tensors, tensors, st.sets(st.sampled_from("abc"), min_size=1))
def test_a_total_is_the_statistic_of_the_stepped_rows_merged(
    param: Tensors, grad: Tensors, update: Tensors, raw: Tensors, stepped: set[str]
) -> None:
    found = record(3, NET, {"param": param, "grad": grad, "update": update, "grad_raw": raw}, stepped=sorted(stepped))
    got = totals(found)
    assert tuple(got) == TOTALS
    for name in ("param_norm", "grad_norm", "update_norm", "grad_raw_norm", "clip_coef", "update_ratio"):
        np.testing.assert_allclose(got[name], merged(found, name), rtol=1e-12, err_msg=name)


def test_a_tied_row_counts_once() -> None:
    found = record(0, NET, {"param": {"a": [3.0], "b": [4.0]}})
    assert totals(found)["param_norm"] == 5.0


def test_the_learning_rate_is_a_number_only_where_the_rows_agree() -> None:
    x = {"param": {"a": [1.0], "b": [1.0]}}
    assert totals(record(0, NET, x, lr=0.5))["lr"] == 0.5
    assert np.isnan(totals(record(0, NET, x, lr={"a": 0.5, "b": 0.1, "c": 0.5}))["lr"])


def test_non_finite_elements_of_parameters_and_gradients_are_counted() -> None:
    found = record(0, NET, {"param": {"a": [np.nan, 1.0]}, "grad": {"a": [np.inf, -np.inf], "b": [np.nan]}, "update": {"a": [np.nan]}})
    assert totals(found)["nonfinite"] == 3.0


def test_a_skipped_step_shows_the_gradients_that_were_not_used() -> None:
    x = {"grad": {"a": [np.inf], "b": [1.0]}, "param": {"a": [3.0], "b": [4.0], "c": [100.0]}}
    got = totals(record(0, NET, x, stepped=[], skipped=True))
    assert (got["grad_norm"], got["param_norm"], got["nonfinite"]) == (np.inf, 5.0, 1.0)
    assert np.isnan(got["update_norm"])
    assert np.isnan(got["lr"])


def test_a_row_that_did_not_step_is_left_out_though_it_was_measured() -> None:
    found = record(0, NET, {"param": {"a": [3.0], "c": [100.0]}}, stepped=["a"])
    assert totals(found)["param_norm"] == 3.0


@pytest.mark.parametrize("name", TOTALS)
def test_a_step_in_which_nothing_was_measured_has_no_totals(name: str) -> None:
    assert np.isnan(totals(record(0, NET, {}))[name])
