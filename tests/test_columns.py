"""Parts merge like the elements they stand for, and statistics are what a look at the elements gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import parts_of

from paramwatch.columns import ABSENT, LAYOUTS, PARTS, STATISTICS, Array, getter, kinds_of, statistics_of
from paramwatch.merging import merge

# squares of what is nearer to zero lose their digits, in the recomputation as well
numbers = st.floats(1e-100, 1e15) | st.floats(-1e15, -1e-100) | st.sampled_from([0.0, -0.0, 1.0])
elements = numbers | st.sampled_from([np.nan, np.inf, -np.inf])
tensors = st.lists(elements, max_size=12).map(np.array)


def stack(parts: list[dict[str, float]]) -> dict[str, Array]:
    """Part -> [rows], in float64 where a record would hold float32."""
    return {part: np.array([row[part] for row in parts], np.int64 if PARTS[part].integer else np.float64) for part in parts[0]}


def record_of(**kinds: Array) -> tuple[dict[str, Array], list[str]]:
    """Part -> [kinds, 1]."""
    columns = [stack([parts_of(x)]) for x in kinds.values()]
    return {part: np.stack([column[part] for column in columns]) for part in columns[0]}, list(kinds)


def close(got: float, wanted: float, scale: float) -> bool:
    return bool(np.array_equal(got, wanted, equal_nan=True) or abs(got - wanted) <= 1e-12 * max(abs(wanted), scale))


@given(st.lists(tensors, min_size=1, max_size=6))
def test_any_split_of_a_tensor_merges_to_the_whole(pieces: list[Array]) -> None:
    whole = parts_of(np.concatenate(pieces))
    merged = merge(stack([parts_of(piece) for piece in pieces]), [range(len(pieces))])
    scale = float(np.nan_to_num(whole["rms"]))
    assert {part: merged[part][0] for part in merged if PARTS[part].integer} == {part: whole[part] for part in whole if PARTS[part].integer}
    for part in ("mean", "std", "rms", "min", "max"):
        assert close(merged[part][0], whole[part], scale), part


@given(st.lists(tensors, min_size=2, max_size=6))
def test_rows_that_were_not_measured_add_nothing(pieces: list[Array]) -> None:
    values = stack([parts_of(piece) for piece in pieces])
    spoilt = {part: np.append(column, ABSENT if part == "count" else 77) for part, column in values.items()}
    merged, alone = merge(spoilt, [range(len(pieces) + 1), [len(pieces)]]), merge(values, [range(len(pieces))])
    assert all(np.array_equal(merged[part][0], alone[part][0], equal_nan=True) for part in merged)
    assert merged["count"][1] == ABSENT


def test_merging_keeps_leading_axes_and_lets_groups_overlap() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 4, 5))
    cells = [[stack([parts_of(row) for row in kind]) for kind in step] for step in x]
    values = {part: np.array([[kind[part] for kind in step] for step in cells]) for part in cells[0][0]}
    merged = merge(values, [[0, 1], [1, 2, 3], [2]])
    assert merged["mean"].shape == (3, 2, 3)
    np.testing.assert_allclose(merged["mean"][2, 1, 1], x[2, 1, 1:].mean(), rtol=1e-12)
    np.testing.assert_allclose(merged["std"][0, 0, 0], x[0, 0, :2].std(), rtol=1e-12)


def test_the_spread_of_large_nearly_equal_numbers_survives_merging() -> None:
    x = 1.0 + 1e-7 * np.random.default_rng(0).normal(size=(8, 100))
    merged = merge(stack([parts_of(piece) for piece in x]), [range(8)])
    np.testing.assert_allclose(merged["std"][0], x.std(), rtol=1e-6)


def recomputed(name: str, x: Array) -> float:
    """What numpy, and torch, say of the elements."""
    with np.errstate(all="ignore"):
        if name.endswith("norm"):
            return float(np.sqrt(np.sum(x * x)))
        if name.endswith("nan"):
            return float(np.isnan(x).sum())
        if name.endswith("inf"):
            return float(np.isinf(x).sum())
        if not x.size:
            return np.nan
        if name.endswith("abs_max"):
            return float(np.max(np.abs(x)))
        if name.endswith("zero_frac"):
            return float(np.mean(x == 0))
        if name.endswith("rms"):
            return float(np.sqrt(np.mean(x * x)))
        return float(getattr(np, name.split("_")[-1])(x))


PLAIN = [name for name in STATISTICS if name.startswith("grad_") and name != "grad_raw_norm"]


@pytest.mark.parametrize("finite", [False, True], ids=["all", "finite"])
@pytest.mark.parametrize("name", PLAIN)
@given(tensors)
def test_a_statistic_is_what_the_elements_give(name: str, finite: bool, x: Array) -> None:
    values, kinds = record_of(grad=x)
    got = STATISTICS[name].compute(getter(values, kinds), finite)[0]
    seen = x[np.isfinite(x)] if finite and not name.endswith(("_nan", "_inf")) else x
    assert close(got, recomputed(name, seen), float(np.nan_to_num(values["rms"][0, 0])))


@given(tensors, tensors)
def test_ratios_of_norms_are_nan_where_the_divisor_is_zero(update: Array, param: Array) -> None:
    values, kinds = record_of(param=param, update=update)
    got = STATISTICS["update_ratio"].compute(getter(values, kinds), False)[0]
    above, below = recomputed("norm", update), recomputed("norm", param)
    with np.errstate(all="ignore"):
        wanted = np.nan if below == 0 else np.divide(above, below)
    assert close(got, float(wanted), 0.0)


def test_the_cosine_of_update_and_descent_is_one_for_plain_sgd() -> None:
    grad = np.random.default_rng(0).normal(size=50)
    values, kinds = record_of(grad=grad, update=-0.1 * grad)
    values["dot"] = np.array([[0.0], [-0.1 * grad @ grad]])
    np.testing.assert_allclose(STATISTICS["update_cos"].compute(getter(values, kinds), False), 1.0)


def test_a_member_without_a_gradient_leaves_the_cosine_of_its_group() -> None:
    grad = np.random.default_rng(0).normal(size=50)
    values, kinds = record_of(grad=grad, update=-0.1 * grad)
    values["dot"] = np.array([[0.0], [-0.1 * grad @ grad]])
    still, _ = record_of(grad=np.zeros(0), update=np.zeros(7))
    still["count"][0], still["dot"] = ABSENT, np.full((2, 1), np.nan)
    both = {part: np.concatenate([values[part], still[part]], axis=-1) for part in values}
    np.testing.assert_allclose(STATISTICS["update_cos"].compute(getter(merge(both, [[0, 1]]), kinds), False), 1.0)


@pytest.mark.parametrize("name", STATISTICS)
def test_what_was_not_measured_is_nan_in_every_statistic(name: str) -> None:
    kinds = kinds_of(LAYOUTS["full"])
    values = {part: np.full((len(kinds), 1), ABSENT if part == "count" else 3.0) for part in PARTS}
    assert np.isnan(STATISTICS[name].compute(getter(values, kinds), False)).all()


@pytest.mark.parametrize("detail", LAYOUTS)
def test_more_detail_only_adds_statistics(detail: str) -> None:
    names = [statistic.name for statistic in statistics_of(LAYOUTS[detail])]
    assert set(names) <= {statistic.name for statistic in statistics_of(LAYOUTS["full"])}
    assert {"param_norm", "grad_norm", "update_norm", "update_ratio", "grad_abs_max", "grad_nan", "grad_inf"} <= set(names)
    assert names == [name for name in STATISTICS if name in names]
