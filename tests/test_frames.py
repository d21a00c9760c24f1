"""Frames show what was recorded: each cell is recomputed here from the elements themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from records import inventory, random_record, record

from paramwatch import table
from paramwatch.columns import LAYOUTS, STATISTICS, statistics_of
from paramwatch.epoch import Epoch, NoSteps
from paramwatch.frames import findings_frame, frame, parameters_frame, steps_frame
from paramwatch.guard import ParamWatchError
from paramwatch.record import Finding, Record
from paramwatch.store import MemoryFolder, Store, read
from paramwatch.totals import totals

NAMES = ["embed.weight", "0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias", "scale"]
NET = inventory(*NAMES, tied={"2.weight": ["4.weight"], "2.bias": ["4.bias"]})
ROWS = [row.name for row in NET.rows]


def blocks_of(*records: Record) -> list[Epoch]:
    folder = MemoryFolder()
    store = Store(folder, max_bytes=10**9)
    for each in records:
        store.write(each)
    store.close()
    return read(folder).epochs


def some(steps: int = 4) -> list[Epoch]:
    return blocks_of(*(random_record(step, NET, evaluations=1) for step in range(steps)))


def elements(step: int, kind: str, names: Sequence[str]) -> Any:
    """The elements that `random_record` makes up, in the order in which it does."""
    noise = np.random.default_rng(step)
    made = {(kind, row.name): noise.normal(size=row.numel) for kind in NET.kinds for row in NET.rows}
    return np.concatenate([made[kind, name] for name in names])


# ---- the tidy frame and the wide one --------------------------------------------------------


def test_the_tidy_frame_has_a_line_for_each_step_and_row_and_a_column_for_each_statistic() -> None:
    tidy = frame(some())
    assert tidy.index.names == ["step", "parameter"]
    assert list(tidy.index) == [(step, name) for step in range(4) for name in ROWS]
    assert list(tidy.columns) == [found.name for found in statistics_of(NET.layout)] + ["lr", "grad_state"]
    assert tidy.loc[(2, "0.bias"), "grad_norm"] == pytest.approx(np.linalg.norm(elements(2, "grad", ["0.bias"])), rel=1e-6)


def test_the_index_is_sorted_so_that_steps_can_be_sliced() -> None:
    tidy = frame(some())
    assert tidy.index.is_unique
    assert len(tidy.loc[1:2]) == 2 * len(ROWS)


@pytest.mark.parametrize("name", [*(found.name for found in statistics_of(NET.layout)), "lr", "grad_state"])
def test_the_wide_frame_is_the_tidy_one_unstacked(name: str) -> None:
    blocks = blocks_of(random_record(0, NET), record(1, NET, {"param": {"0.bias": [np.nan, 1.0]}, "grad": {"scale": [np.inf]}}))
    wide, tidy = frame(blocks, name), frame(blocks)
    assert (wide.index.name, wide.columns.name, list(wide.columns)) == ("step", "parameter", ROWS)
    pd.testing.assert_frame_equal(wide, tidy[name].unstack()[ROWS], check_column_type=False)


def test_column_types_say_where_nothing_was_measured() -> None:
    tidy = frame(blocks_of(record(0, NET, {"param": {"0.bias": [np.nan]}}, states={"scale": "none"})))
    assert str(tidy["param_nan"].dtype) == "Int64"
    assert tidy["param_norm"].dtype == np.float64
    assert tidy["param_nan"].to_dict()[0, "0.bias"] == 1
    assert tidy["param_nan"].isna().sum() == len(ROWS) - 1
    assert tidy["grad_state"].dropna().to_dict() == {(0, "0.bias"): "used", (0, "scale"): "none"}
    assert list(tidy["grad_state"].cat.categories) == ["used", "zero", "none", "frozen", "unowned"]


def test_finite_leaves_non_finite_elements_out() -> None:
    blocks = blocks_of(record(0, NET, {"grad": {"scale": [3.0, np.nan, 4.0, np.inf]}}))
    assert np.isnan(frame(blocks, "grad_norm")["scale"][0])
    assert frame(blocks, "grad_norm", finite=True)["scale"][0] == pytest.approx(5.0)


@pytest.mark.parametrize("by", ["parameter", "layer"])
def test_it_does_not_matter_how_many_cells_are_derived_at_a_time(monkeypatch: pytest.MonkeyPatch, by: Any) -> None:
    blocks = some(10)
    whole = frame(blocks, by=by)
    for cells in (1, 3 * len(ROWS), 4 * len(ROWS) + 1):
        monkeypatch.setattr(table, "_CELLS", cells)
        pd.testing.assert_frame_equal(frame(blocks, by=by), whole)


@pytest.mark.parametrize("detail", LAYOUTS)
def test_every_detail_gives_the_statistics_it_stores(detail: str) -> None:
    net = inventory("a", layout=LAYOUTS[detail])
    tidy = frame(blocks_of(random_record(0, net)))
    assert set(tidy.columns) - {"lr", "grad_state"} == {name for name in STATISTICS if set(STATISTICS[name].needs) <= set(LAYOUTS[detail])}


# ---- which rows, which steps ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "rows"),
    [
        ("*", ROWS),
        ("2.weight", ["2.weight"]),
        ("4.weight", ["2.weight"]),
        ("4.*", ["2.weight", "2.bias"]),
        ("*.bias", ["0.bias", "2.bias"]),
        (["scale", "0.*"], ["0.weight", "0.bias", "scale"]),
        (("4.weight", "2.weight"), ["2.weight"]),
    ],
    ids=str,
)
def test_patterns_choose_rows_by_name_or_alias_in_model_order(parameters: str | Sequence[str], rows: list[str]) -> None:
    assert list(frame(some(), "lr", parameters=parameters).columns) == rows
    assert list(frame(some(1), parameters=parameters).loc[0].index) == rows


def test_aliases_show_a_tied_row_under_each_of_its_names() -> None:
    assert list(frame(some(), "lr", aliases=True).columns) == NAMES
    wide = frame(some(), "grad_norm", parameters="4.weight", aliases=True)
    assert list(wide.columns) == ["2.weight", "4.weight"]
    assert (wide["2.weight"] == wide["4.weight"]).all()


def test_a_pattern_that_is_a_name_means_that_name_only() -> None:
    blocks = blocks_of(random_record(0, inventory("w[0]", "w0", "*")))
    assert list(frame(blocks, "lr", parameters="w[0]").columns) == ["w[0]"]
    assert list(frame(blocks, "lr", parameters="w[0-9]").columns) == ["w0"]
    assert list(frame(blocks, "lr", parameters="[*]").columns) == ["*"]


def test_the_default_means_all_rows_also_where_one_is_called_so() -> None:
    blocks = blocks_of(random_record(0, inventory("w[0]", "w0", "*")))
    assert list(frame(blocks, "lr").columns) == ["w[0]", "w0", "*"]


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        (slice(None), range(10)),
        (slice(3), range(3)),
        (slice(3, 7), range(3, 7)),
        (slice(8, 100), range(8, 10)),
        (slice(None, None, 4), [0, 4, 8]),
        (slice(3, None, 4), [3, 7]),
        (slice(5, 5), []),
        (slice(0, 2**70, 2**63), [0]),
        (slice(2**63, None), []),
    ],
    ids=str,
)
def test_steps_are_chosen_by_number_with_the_end_excluded(steps: slice, kept: Sequence[int]) -> None:
    assert list(frame(some(10), "grad_norm", steps=steps).index) == list(kept)
    assert len(frame(some(10), steps=steps)) == len(kept) * len(ROWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistic": "grad_nrom"}, r"no statistic 'grad_nrom' here; nearest: 'grad_norm'"),
        ({"statistic": "update_cos"}, r"no statistic 'update_cos'"),
        ({"parameters": "2.wieght"}, r"no parameter fits '2.wieght'; nearest: '2.weight'"),
        ({"parameters": "ZZZ"}, r"there are 'embed.weight', '0.weight'"),
        ({"steps": slice(-5, None)}, r"cannot be negative"),
        ({"steps": slice(None, -1)}, r"cannot be negative"),
        ({"steps": slice(None, None, 0)}, r"stride below 1"),
        ({"steps": 3}, r"slice\(3, 4\)"),
        ({"steps": range(3)}, r"steps=range\(0, 3\) is not a slice; write slice\(0, 3\)$"),
        ({"steps": range(0, 9, 2)}, r"write slice\(0, 9, 2\)"),
        ({"steps": "1:3"}, r"steps='1:3' is not a slice; write slice\(100, 200\) for the steps from 100 to 199"),
        ({"steps": slice("a", None)}, r"steps=slice\('a', None, None\): .* must be whole numbers"),
        ({"steps": slice(1.5, None)}, r"must be whole numbers"),
        ({"statistic": 5}, r"statistic must be the name of one column, such as 'grad_norm', not 5"),
        ({"statistic": ["grad_norm", "lr"]}, r"the name of one column, .* not \['grad_norm', 'lr'\]; leave it out for all"),
        ({"parameters": 5}, r"parameters must be a glob pattern such as '\*.weight', or a list of them, not 5"),
        ({"parameters": None}, r"parameters must be a glob pattern .* not None"),
        ({"parameters": [5]}, r"parameters must be a glob pattern .* not \[5\]"),
        ({"parameters": []}, r"parameters is empty; name at least one pattern, or leave it out for all"),
        ({"by": 0}, r"by=0"),
        ({"by": "module"}, r"by='module'"),
        ({"by": True}, r"by=True"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_an_error_that_says_so(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamWatchError, match=message):
        frame(some(), **arguments)


# ---- layers and blocks ----------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["param_norm", "grad_mean", "grad_std", "param_min", "update_abs_max"])
def test_a_layer_is_measured_as_its_elements_taken_together(statistic: str) -> None:
    blocks = blocks_of(*(random_record(step, NET) for step in range(3)))
    wide = frame(blocks, statistic, by="layer")
    assert list(wide.columns) == ["embed", "0", "2", "(root)"]
    assert wide.columns.name == "layer"
    kind, _, what = statistic.partition("_")
    x = elements(1, kind, ["0.weight", "0.bias"])
    wanted = {"norm": np.linalg.norm, "mean": np.mean, "std": np.std, "min": np.min, "abs_max": lambda x: np.abs(x).max()}[what](x)
    assert wide["0"][1] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", [*(found.name for found in statistics_of(NET.layout)), "lr", "grad_state"])
def test_a_wide_frame_of_layers_is_the_tidy_one_unstacked(name: str) -> None:
    wide, tidy = frame(some(), name, by="layer"), frame(some(), by="layer")
    pd.testing.assert_frame_equal(wide, tidy[name].unstack()[list(wide.columns)], check_column_type=False)


def test_a_shared_layer_appears_under_each_of_its_paths() -> None:
    wide = frame(some(), "grad_norm", by="layer", aliases=True)
    assert list(wide.columns) == ["embed", "0", "2", "4", "(root)"]
    assert (wide["2"] == wide["4"]).all()


def test_a_tensor_counts_once_in_a_group_that_holds_it_twice() -> None:
    blocks = blocks_of(record(0, inventory("a.x", "a.y", "a.z", tied={"a.x": ["a.z"]}), {"param": {"a.x": [3.0], "a.y": [4.0]}}))
    assert frame(blocks, "param_norm", by="layer", aliases=True)["a"][0] == pytest.approx(5.0)


def test_a_number_groups_by_so_many_name_components() -> None:
    blocks = blocks_of(random_record(0, inventory("enc.0.w", "enc.0.b", "enc.1.w", "dec.w", "x")))
    assert list(frame(blocks, "grad_norm", by=1).columns) == ["enc", "dec", "x"]
    assert list(frame(blocks, "grad_norm", by=2).columns) == ["enc.0", "enc.1", "dec.w", "x"]
    assert frame(blocks, by=2).index.names == ["step", "block"]


def test_a_group_is_over_the_rows_that_stepped_or_else_over_all_that_were_measured() -> None:
    x = {"param": {"0.weight": [3.0], "0.bias": [4.0], "2.weight": [6.0], "2.bias": [8.0]}}
    wide = frame(blocks_of(record(0, NET, x, stepped=["0.weight"])), "param_norm", by="layer")
    assert (wide["0"][0], wide["2"][0]) == pytest.approx((3.0, 10.0))
    assert np.isnan(wide["embed"][0])


def test_a_group_has_a_learning_rate_where_its_rows_agree_and_the_first_state_any_has() -> None:
    x = {"param": {name: [1.0] for name in ("0.weight", "0.bias", "2.weight", "2.bias")}}
    rates = dict.fromkeys(ROWS, 0.1) | {"2.bias": 0.2}
    states = {"0.weight": "none", "0.bias": "zero", "embed.weight": "frozen"}
    wide = frame(blocks_of(record(0, NET, x, lr=rates, states=states)), by="layer").loc[0]
    assert wide["lr"].to_dict() == pytest.approx({"embed": np.nan, "0": 0.1, "2": np.nan, "(root)": np.nan}, nan_ok=True)
    assert wide["grad_state"].dropna().to_dict() == {"embed": "frozen", "0": "zero", "2": "used"}


def test_rows_are_chosen_before_they_are_merged() -> None:
    wide = frame(some(), "param_norm", by="layer", parameters="*.bias")
    assert list(wide.columns) == ["0", "2"]
    assert wide["0"][0] == pytest.approx(np.linalg.norm(elements(0, "param", ["0.bias"])), rel=1e-6)


# ---- epochs ---------------------------------------------------------------------------------


def test_rows_are_matched_over_epochs_by_name_in_the_order_of_the_last_model() -> None:
    old, new = inventory("gone", "b", "a"), inventory("new", "a", "b")
    blocks = blocks_of(random_record(0, old), random_record(1, new))
    wide = frame(blocks, "param_norm")
    assert list(wide.columns) == ["new", "a", "b", "gone"]
    assert wide.isna().to_numpy().tolist() == [[True, False, False, False], [False, False, False, True]]
    assert list(frame(blocks).index) == [(0, "a"), (0, "b"), (0, "gone"), (1, "new"), (1, "a"), (1, "b")]
    for name in ("a", "b"):
        assert wide[name][0] == frame(blocks[:1], "param_norm")[name][0]
        assert wide[name][1] == frame(blocks[1:], "param_norm")[name][1]


def test_a_step_that_ran_through_two_inventories_is_one_line() -> None:
    small, large = inventory("a"), inventory("a", "b")
    first = record(0, small, {"param": {"a": [3.0]}}, evaluations=1)
    blocks = blocks_of(first, record(0, large, {"param": {"b": [4.0]}}, evaluations=1))
    assert frame(blocks, "param_norm").to_numpy().tolist() == [[3.0, 4.0]]
    assert steps_frame(blocks)[["param_norm", "evaluations"]].to_numpy().tolist() == [[5.0, 2]]


def test_statistics_of_all_epochs_are_there() -> None:
    blocks = blocks_of(random_record(0, inventory("a", layout=LAYOUTS["cheap"])), random_record(1, inventory("a")))
    assert np.isnan(frame(blocks, "grad_std")["a"][0])
    assert not frame(blocks, "grad_norm").isna().any(axis=None)


def test_a_tie_that_was_broken_shows_the_shared_row_before_and_the_own_row_after() -> None:
    tied, free = inventory("a", "b", tied={"a": ["b"]}), inventory("a", "b")
    blocks = blocks_of(random_record(0, tied), random_record(1, free))
    wide = frame(blocks, "param_norm", aliases=True)
    assert wide["a"][0] == wide["b"][0]
    assert wide["a"][1] != wide["b"][1]
    assert np.isnan(frame(blocks, "param_norm")["b"][0])


# ---- the other frames -----------------------------------------------------------------------


def test_steps_have_the_totals_of_their_records() -> None:
    records = [random_record(0, NET), record(1, NET, {"param": {"scale": [3.0]}, "grad": {"scale": [np.nan, np.inf]}}), record(2, NET, {})]
    steps = steps_frame(blocks_of(*records))
    for each in records:
        wanted = totals(each)
        got = steps.loc[each.step, ["lr", "param_norm", "grad_norm", "grad_raw_norm", "clip_coef", "update_norm"]].to_dict()
        assert got == pytest.approx({name: wanted[name] for name in got}, nan_ok=True, rel=1e-12)
    assert steps["nonfinite"].isna().tolist() == [False, False, True]
    assert steps["nonfinite"][1] == 2


def test_steps_have_their_columns_in_order_with_types_that_can_be_unknown() -> None:
    keys = {
        "skipped": None,
        "amp_scale": 2.0,
        "evaluations": 1,
        "update_mode": "exact",
        "overhead_us": 1.5,
        "epoch": 3,
        "note": "x",
        "ok": True,
    }
    steps = steps_frame(blocks_of(random_record(7, NET, time=1.5e9 + 0.25, **keys)))
    assert {name: str(dtype) for name, dtype in steps.dtypes.items()} == {
        "time": "datetime64[us, UTC]",
        "lr": "float64",
        "skipped": "boolean",
        "amp_scale": "float64",
        "evaluations": "Int64",
        "backwards": "Int64",
        "update_mode": "string",
        "full_rate": "boolean",
        "overhead_us": "float64",
        **dict.fromkeys(["param_norm", "grad_norm", "grad_raw_norm", "clip_coef", "update_norm"], "float64"),
        "nonfinite": "Int64",
        "epoch": "Int64",
        "note": "string",
        "ok": "boolean",
    }
    assert list(steps.columns)[-4:] == ["nonfinite", "epoch", "note", "ok"]
    assert steps["time"][7] == pd.Timestamp("2017-07-14 02:40:00.25", tz="UTC")
    assert steps["skipped"].isna().all()
    assert steps["backwards"].isna().all()


def test_a_key_that_came_late_or_changed_its_type_is_one_column() -> None:
    blocks = blocks_of(*(random_record(step, NET, **keys) for step, keys in enumerate([{}, {"x": 1}, {"x": 2.5, "y": True}])))
    steps = steps_frame(blocks)
    assert steps["x"].tolist() == pytest.approx([np.nan, 1.0, 2.5], nan_ok=True)
    assert steps["y"].isna().tolist() == [True, True, False]


def test_parameters_are_the_inventory() -> None:
    found = parameters_frame(NET)
    assert list(found.index) == ROWS
    assert found.index.name == "parameter"
    assert list(found.columns)[:4] == ["aliases", "module", "module_type", "shape"]
    assert found.loc["2.weight", "aliases"] == ("4.weight",)
    assert found.loc["scale", "aliases"] == ()
    assert found.loc["0.bias", "shape"] == (4,)
    assert str(found["tie_group"].dtype) == "Int64"
    assert found["tie_group"].dropna().to_dict() == {"2.weight": 0, "2.bias": 1}


def test_findings_are_a_frame_also_when_there_are_none() -> None:
    some = findings_frame([Finding(3, "first_non_finite", "0.bias", "NaN")])
    assert some.to_dict("records") == [{"step": 3, "rule": "first_non_finite", "parameter": "0.bias", "message": "NaN"}]
    assert list(findings_frame([]).columns) == ["step", "rule", "parameter", "message"]
    assert findings_frame([])["step"].dtype == np.int64


@pytest.mark.parametrize("by", ["parameter", "layer", 1])
def test_before_the_first_step_frames_are_empty_and_have_their_columns(by: Any) -> None:
    blocks = [NoSteps(NET)]
    assert frame(blocks, by=by).shape == (0, len(statistics_of(NET.layout)) + 2)
    assert frame(blocks, "grad_nan", by=by).shape[0] == 0
    assert list(steps_frame(blocks).columns) == list(steps_frame(blocks_of(record(0, NET, {}))).columns)
