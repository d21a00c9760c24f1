"""The event file, read back with TensorBoard's own accumulators and compared with the tensors the records were made from."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import batch_of, inventory, record
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

from paramwatch.batch import Batch
from paramwatch.block import joined_record
from paramwatch.record import Record
from paramwatch.schedule import Schedule
from paramwatch.store import MemoryFolder, Store, read
from paramwatch.tensorboard import recordfile
from paramwatch.tensorboard.blocks import blocks_of
from paramwatch.tensorboard.budget import Budget
from paramwatch.tensorboard.digest import Digest
from paramwatch.tensorboard.events import EventFile
from paramwatch.tensorboard.norms import Norms
from paramwatch.tensorboard.recordfile import FRAMING
from paramwatch.tensorboard.tables import inventory_text, ties_text

with warnings.catch_warnings():
    # TensorBoard's own copy of bleach warns of its own copy of html5lib.
    warnings.filterwarnings("ignore", "html5lib's sanitizer is deprecated", DeprecationWarning)
    from tensorboard.plugin_util import markdown_to_safe_html

Tensors = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
"""Kind -> row name -> values."""


def random_tensors(*names: str, seed: int = 0) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(seed)
    return {kind: {name: rng.standard_normal(12).astype(np.float32) for name in names} for kind in ("param", "grad", "update")}


def only(tensors: Tensors, *names: str) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    return {kind: {name: data[name] for name in names} for kind, data in tensors.items()}


def norm(tensors: Tensors, kind: str, *names: str) -> float:
    data = np.concatenate([tensors[kind][name] for name in (names or tensors[kind])]).astype(np.float64)
    return float(np.sqrt(np.square(data).sum()))


def write(folder: Path, *records: Record, **options: Any) -> EventFile:
    events = EventFile(folder, **options)
    for taken in records:
        events.write(taken)
    events.close()
    return events


def accumulate(folder: Path) -> event_accumulator.EventAccumulator:
    return event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = accumulate(folder)
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def read_texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    accumulator = plugin_event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in accumulator.Tensors(tag)]


def test_every_parameter_of_a_small_model_has_three_curves_under_each_name(tmp_path: Path) -> None:
    inv = inventory("0.weight", "1.bias", "2.weight", tied={"0.weight": ["2.weight"]})
    tensors = random_tensors("0.weight", "1.bias")
    write(tmp_path, record(7, inv, tensors))
    scalars = read_scalars(tmp_path)
    for name, row in (("0.weight", "0.weight"), ("2.weight", "0.weight"), ("1.bias", "1.bias")):
        assert scalars[f"param_norm/{name}"] == [(7, pytest.approx(norm(tensors, "param", row), rel=1e-6))]
        assert scalars[f"grad_norm/{name}"] == [(7, pytest.approx(norm(tensors, "grad", row), rel=1e-6))]
        ratio = norm(tensors, "update", row) / norm(tensors, "param", row)
        assert scalars[f"update_ratio/{name}"] == [(7, pytest.approx(ratio, rel=1e-6))]
    assert len([tag for tag in scalars if not tag.endswith("/(all)")]) == 9


def test_totals_count_a_tied_parameter_once(tmp_path: Path) -> None:
    inv = inventory("0.weight", "1.bias", "2.weight", tied={"0.weight": ["2.weight"]})
    tensors = random_tensors("0.weight", "1.bias")
    write(tmp_path, record(0, inv, tensors))
    totals = {tag: points[0][1] for tag, points in read_scalars(tmp_path).items() if tag.endswith("/(all)")}
    assert totals == {
        "param_norm/(all)": pytest.approx(norm(tensors, "param"), rel=1e-6),
        "grad_norm/(all)": pytest.approx(norm(tensors, "grad"), rel=1e-6),
        "update_norm/(all)": pytest.approx(norm(tensors, "update"), rel=1e-6),
        "update_ratio/(all)": pytest.approx(norm(tensors, "update") / norm(tensors, "param"), rel=1e-6),
        "lr/(all)": pytest.approx(0.1),
        "nonfinite/(all)": 0.0,
    }


def test_gradients_before_clipping_give_their_norm_and_the_coefficient(tmp_path: Path) -> None:
    tensors = random_tensors("w")
    tensors["grad_raw"] = {"w": tensors["grad"]["w"] * 4}
    write(tmp_path, record(0, inventory("w"), tensors))
    scalars = read_scalars(tmp_path)
    assert scalars["grad_raw_norm/(all)"] == [(0, pytest.approx(4 * norm(tensors, "grad"), rel=1e-6))]
    assert scalars["clip_coef/(all)"] == [(0, pytest.approx(0.25, rel=1e-6))]


@pytest.mark.parametrize(
    "name", ["0.block 2.0.weight", "a/b//c", "two\nlines", "<script>alert(1)</script>", "\U0001f525.größe", " ends ", "%2F?&#|"]
)
def test_names_reach_the_tags_as_they_are(tmp_path: Path, name: str) -> None:
    write(tmp_path, record(0, inventory(name), random_tensors(name)))
    assert {f"{statistic}/{name}" for statistic in ("param_norm", "grad_norm", "update_ratio")} <= set(read_scalars(tmp_path))


def test_a_name_that_is_no_text_is_written_with_escapes(tmp_path: Path) -> None:
    write(tmp_path, record(0, inventory("\udc80"), random_tensors("\udc80")))
    assert "grad_norm/\\udc80" in read_scalars(tmp_path)


def test_a_parameter_called_all_does_not_mix_with_the_totals(tmp_path: Path) -> None:
    tensors = random_tensors("(all)", "b")
    write(tmp_path, record(0, inventory("(all)", "b"), tensors))
    assert read_scalars(tmp_path)["grad_norm/(all)"] == [(0, pytest.approx(norm(tensors, "grad"), rel=1e-6))]


def test_nan_and_infinite_data_are_drawn_as_such(tmp_path: Path) -> None:
    tensors = random_tensors("a", "b")
    tensors["grad"]["a"][0] = np.nan
    tensors["grad"]["b"][0] = -np.inf
    write(tmp_path, record(0, inventory("a", "b"), tensors))
    value = {tag: points[0][1] for tag, points in read_scalars(tmp_path).items()}
    assert np.isnan(value["grad_norm/a"])
    assert np.isnan(value["grad_norm/(all)"])
    assert value["grad_norm/b"] == np.inf
    assert value["nonfinite/(all)"] == 2
    assert value["param_norm/a"] == pytest.approx(norm(tensors, "param", "a"), rel=1e-6)


def test_the_ratio_of_two_infinities_is_drawn_as_not_a_number(tmp_path: Path) -> None:
    tensors = random_tensors("a")
    tensors["param"]["a"][0] = tensors["update"]["a"][0] = np.inf
    write(tmp_path, record(0, inventory("a"), tensors))
    scalars = read_scalars(tmp_path)
    assert np.isnan(scalars["update_ratio/a"][0][1])
    assert np.isnan(scalars["update_ratio/(all)"][0][1])


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    tensors = random_tensors("a", "frozen")
    del tensors["grad"]["frozen"], tensors["update"]["frozen"], tensors["update"]["a"]
    tensors["param"]["a"][0] = np.nan
    write(tmp_path, record(0, inventory("a", "frozen", "unseen"), tensors, stepped=["a"]))
    tags = set(read_scalars(tmp_path))
    lines = {"param_norm/a", "grad_norm/a", "param_norm/frozen"}
    assert tags == lines | {"param_norm/(all)", "grad_norm/(all)", "lr/(all)", "nonfinite/(all)"}


def test_a_ratio_to_zero_is_not_drawn(tmp_path: Path) -> None:
    tensors = random_tensors("lora_b")
    tensors["param"]["lora_b"][:] = 0
    write(tmp_path, record(0, inventory("lora_b"), tensors))
    scalars = read_scalars(tmp_path)
    assert scalars["param_norm/lora_b"] == [(0, 0.0)]
    assert not {"update_ratio/lora_b", "update_ratio/(all)"} & set(scalars)


@pytest.mark.parametrize("rows", [1, 70])
def test_a_skipped_step_shows_the_gradient_that_was_not_used(tmp_path: Path, rows: int) -> None:
    names = [f"block.{i}" for i in range(rows)]
    tensors = random_tensors(*names)
    for name in names:
        del tensors["update"][name]
        tensors["grad"][name][0] = np.nan
    write(tmp_path, record(0, inventory(*names), tensors, stepped=[]))
    scalars = read_scalars(tmp_path)
    assert np.isnan(scalars["grad_norm/(all)"][0][1])
    assert np.isnan(scalars["grad_norm/block.0..1" if rows > 64 else "grad_norm/block.0"][0][1])
    assert not {"update_norm/(all)", "update_ratio/(all)", "lr/(all)"} & set(scalars)


def test_a_large_model_is_drawn_by_blocks_and_a_tied_row_in_each_block_it_is_named_in(tmp_path: Path) -> None:
    layers = [f"model.layers.{i}.{leaf}" for i in range(50) for leaf in ("q.weight", "k.weight")]
    names = ["model.embed.weight", *layers]
    tensors = random_tensors(*names)
    inv = inventory(*names, "head.weight", tied={"model.embed.weight": ["head.weight"]})
    write(tmp_path, record(0, inv, tensors))
    scalars = read_scalars(tmp_path)
    assert {tag for tag in scalars if tag.startswith("grad_norm/")} == {
        *("grad_norm/(all)", "grad_norm/head", "grad_norm/model.embed"),
        *(f"grad_norm/model.layers.{i}" for i in range(50)),
    }
    members = ("model.layers.7.q.weight", "model.layers.7.k.weight")
    assert scalars["grad_norm/model.layers.7"] == [(0, pytest.approx(norm(tensors, "grad", *members), rel=1e-6))]
    ratio = norm(tensors, "update", *members) / norm(tensors, "param", *members)
    assert scalars["update_ratio/model.layers.7"] == [(0, pytest.approx(ratio, rel=1e-6))]
    assert scalars["param_norm/head"] == [(0, pytest.approx(norm(tensors, "param", "model.embed.weight"), rel=1e-6))]


def test_blocks_are_over_the_rows_that_stepped(tmp_path: Path) -> None:
    names = [f"{block}.{i}.weight" for block in "ab" for i in range(33)]
    tensors = random_tensors(*names)
    write(tmp_path, record(0, inventory(*names), tensors, stepped=["a.0.weight", "a.3.weight"]))
    scalars = read_scalars(tmp_path)
    assert scalars["param_norm/a.2..3"] == [(0, pytest.approx(norm(tensors, "param", "a.3.weight"), rel=1e-6))]
    assert {tag for tag in scalars if tag.startswith("param_norm/")} == {"param_norm/(all)", "param_norm/a.0..1", "param_norm/a.2..3"}


def test_neighbours_share_a_curve_where_modules_are_too_many_and_the_text_says_so(tmp_path: Path) -> None:
    names = ["embed.weight", *(f"model.layers.{i}.{leaf}.weight" for i in range(97) for leaf in "qk"), "head.weight"]
    tensors = random_tensors(*names)
    write(tmp_path, record(0, inventory(*names), tensors))
    scalars = read_scalars(tmp_path)
    runs = [*(f"model.layers.{i}..{i + 1}" for i in range(0, 96, 2)), "model.layers.96"]
    assert {tag for tag in scalars if tag.startswith("grad_norm/")} == {f"grad_norm/{name}" for name in ("(all)", "embed", *runs, "head")}
    members = [f"model.layers.{i}.{leaf}.weight" for i in (94, 95) for leaf in "qk"]
    assert scalars["grad_norm/model.layers.94..95"] == [(0, pytest.approx(norm(tensors, "grad", *members), rel=1e-6))]
    assert "from one neighbour to another (`layers.0..1`)" in read_texts(tmp_path, "paramwatch/curves")[0][1]


NAMES = st.lists(
    st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=4).map(".".join), unique=True, min_size=1, max_size=80
)


@given(NAMES, st.integers(1, 30))
def test_every_name_is_in_exactly_one_block(names: list[str], most: int) -> None:
    blocks = blocks_of(inventory(*names), most)
    assert 1 <= len(blocks) <= most
    assert sorted(row for rows in blocks.values() for row in rows) == list(range(len(names)))


@pytest.mark.parametrize(("layers", "curves"), [(6, 27), (12, 15), (48, 51), (96, 51), (1250, 63)])
def test_a_stack_of_layers_is_taken_apart_as_far_as_there_are_curves(layers: int, curves: int) -> None:
    modules = ("ln_1", "attn.qkv", "attn.out", "ln_2", "mlp.fc", "mlp.out")
    leaves = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    names = [
        "h.wte.weight",
        "h.wpe.weight",
        *(f"h.layers.{i}.{leaf}" for i in range(layers) for leaf in leaves),
        "h.ln.weight",
        "h.ln.bias",
    ]
    blocks = blocks_of(inventory(*names), 64)
    assert len(blocks) == curves
    assert [name for name in blocks if ".layers." not in name] == ["h.wte", "h.wpe", "h.ln"]


@pytest.mark.parametrize("flushed", [False, True], ids=["in memory", "written out"])
@pytest.mark.parametrize("loader", [event_accumulator, plugin_event_accumulator], ids=["scripts", "server"])
def test_a_step_that_comes_in_two_is_one_point_of_the_whole_round(tmp_path: Path, flushed: bool, loader: Any) -> None:
    inv = inventory("g", "d")
    tensors = random_tensors("g", "d")
    events = EventFile(tmp_path)
    events.write(record(3, inv, random_tensors("g", "d", seed=1)))
    events.write(record(4, inv, only(tensors, "d"), stepped=["d"]))
    if flushed:
        events.flush()
    events.write(record(4, inventory("g", "d"), only(tensors, "g"), stepped=["g"]))
    events.close()
    accumulator = loader.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tag = "grad_norm/(all)"
    points = accumulator.Scalars(tag) if loader is event_accumulator else accumulator.Tensors(tag)
    assert [point.step for point in points] == [3, 4]
    assert read_scalars(tmp_path)[tag][1][1] == pytest.approx(norm(tensors, "grad"), rel=1e-6)
    assert len(read_texts(tmp_path, "paramwatch/ties")) == 1


def test_the_texts_outlive_a_first_step_that_comes_in_two(tmp_path: Path) -> None:
    inv = inventory("g", "d")
    tensors = random_tensors("g", "d")
    halves = (record(0, inv, only(tensors, name), stepped=[name]) for name in "dg")
    write(tmp_path, *halves)
    assert [step for step, _ in read_texts(tmp_path, "paramwatch/inventory")] == [0]
    assert [step for step, _ in read_scalars(tmp_path)["grad_norm/(all)"]] == [0]


def test_a_row_keeps_what_was_measured_before_its_own_step(tmp_path: Path) -> None:
    inv = inventory("g", "d")
    before, after = random_tensors("g", "d"), random_tensors("g", "d", seed=1)
    first = record(4, inv, before, stepped=["d"])
    second = record(4, inv, {**only(after, "g"), "param": after["param"]}, stepped=["g"])
    write(tmp_path, first, second)
    scalars = read_scalars(tmp_path)
    assert scalars["param_norm/d"] == [(4, pytest.approx(norm(before, "param", "d"), rel=1e-6))]
    assert scalars["param_norm/g"] == [(4, pytest.approx(norm(after, "param", "g"), rel=1e-6))]


def test_the_parts_of_a_step_become_what_the_store_makes_of_them(tmp_path: Path) -> None:
    inv, tensors, later = inventory("g", "d", "e"), random_tensors("g", "d", "e"), random_tensors("g", "d", "e", seed=1)
    keys = {"evaluations": 2, "overhead_us": 3.0, "skipped": True, "amp_scale": 8.0}
    first = record(4, inv, tensors, stepped=["d"], **keys, backwards=1)
    second = record(4, inv, {**only(later, "g"), "param": later["param"]}, stepped=["g"], **{**keys, "skipped": False, "amp_scale": None})
    folder = MemoryFolder()
    store = Store(folder, max_bytes=1 << 30)
    for part in (first, second):
        store.write(part)
    store.close()
    (block,) = read(folder).blocks
    joined = joined_record(first, second)
    steps = {key: column[0].as_py() for key, column in block.steps.items() if key != "full_rate"}
    assert steps == joined.steps == {"evaluations": 4, "overhead_us": 6.0, "skipped": True, "amp_scale": 8.0, "backwards": 1}
    for name in ("stepped", "lr", "grad_state"):
        np.testing.assert_array_equal(getattr(block, name)[0], getattr(joined, name))
    for kind, part in inv.layout:
        i = inv.kinds.index(kind)
        measured = joined.values["count"][i] >= 0
        np.testing.assert_array_equal(block.values[part][0, i][measured], joined.values[part][i][measured])


def test_a_run_from_a_lower_step_replaces_and_a_resumed_one_continues(tmp_path: Path) -> None:
    inv = inventory("w")
    sessions = [range(0, 20), range(10, 15), range(15, 18)]
    for seed, steps in enumerate(sessions):
        write(tmp_path, *(record(step, inv, random_tensors("w", seed=seed)) for step in steps))
    expected = [norm(random_tensors("w", seed=seed), "param") for seed, n in ((0, 10), (1, 5), (2, 3)) for _ in range(n)]
    points = read_scalars(tmp_path)["param_norm/w"]
    assert [step for step, _ in points] == list(range(18))
    assert [value for _, value in points] == pytest.approx(expected, rel=1e-6)


def test_a_later_file_sorts_after_one_whose_clock_was_ahead(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.4000000000.elsewhere.1.0").touch()
    write(tmp_path, record(0, inventory("w"), random_tensors("w")))
    assert sorted(path.name for path in tmp_path.iterdir())[-1].startswith("events.out.tfevents.4000000001.")


def test_nothing_is_made_before_the_first_record(tmp_path: Path) -> None:
    write(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_the_first_record_can_be_read_at_once_and_later_ones_after_a_flush(tmp_path: Path) -> None:
    inv = inventory("w")
    events = EventFile(tmp_path)
    events.write(record(0, inv, random_tensors("w")))
    assert [step for step, _ in read_scalars(tmp_path)["grad_norm/w"]] == [0]
    for step in range(1, 5):
        events.write(record(step, inv, random_tensors("w")))
    events.flush()
    assert [step for step, _ in read_scalars(tmp_path)["grad_norm/w"]] == [0, 1, 2, 3, 4]
    events.close()


def test_records_do_not_wait_for_a_flush_longer_than_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inv = inventory("w")
    events = EventFile(tmp_path)
    events.write(record(0, inv, random_tensors("w")))
    monkeypatch.setattr(recordfile, "FLUSH_SECONDS", 0.0)
    events.write(record(1, inv, random_tensors("w")))
    assert [step for step, _ in read_scalars(tmp_path)["grad_norm/w"]] == [0, 1]
    events.close()


def test_a_torn_tail_costs_only_itself(tmp_path: Path) -> None:
    inv = inventory("w")
    events = EventFile(tmp_path)
    for step in range(5):
        events.write(record(step, inv, random_tensors("w")))
    events.flush()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    events.close()
    assert [step for step, _ in read_scalars(tmp_path)["grad_norm/w"]] == [0, 1, 2, 3]


def test_a_small_budget_thins_out_late_steps_and_the_text_says_so(tmp_path: Path) -> None:
    inv = inventory("w")
    write(tmp_path, *(record(step, inv, random_tensors("w")) for step in range(140)), max_bytes=30_000)
    steps = [step for step, _ in read_scalars(tmp_path)["grad_norm/w"]]
    assert steps == [step for step in range(140) if Schedule(1, 1, min_base=4).keeps(step)]
    assert "every step below 8;" in read_texts(tmp_path, "paramwatch/curves")[0][1]


def test_a_file_never_exceeds_its_bound_and_its_text_says_where_what_ends(tmp_path: Path) -> None:
    inventories = inventory("w"), inventory("w", "v")  # one that changes all the time
    steps = [step for step in range(2**17) if Schedule(1, 1, min_base=4).keeps(step)]
    records = (record(step, inventories[i % 2], random_tensors(*"wv"[: 1 + i % 2])) for i, step in enumerate(steps))
    write(tmp_path, *records, max_bytes=20_000)
    (path,) = tmp_path.iterdir()
    assert 10_000 < path.stat().st_size <= 20_000
    last = read_scalars(tmp_path)["grad_norm/(all)"][-1][0]
    text = read_texts(tmp_path, "paramwatch/curves")[-1][1]
    (ended,) = re.findall(r"Curves end before step ([\d,]+): their share of this file is full", text)
    assert int(ended.replace(",", "")) == steps[steps.index(last) + 1]


def test_one_kept_step_takes_no_more_than_its_estimate() -> None:
    names = [f"layers.{i}.größe" for i in range(40)]
    batch = Batch.of(record(2**40, inventory(*names), random_tensors(*names)))
    digest = Digest(batch.inventory, Budget(64_000_000))
    (parts,) = digest.of(batch, Norms.of(batch), {}, {}).values()
    assert {kind for kind, _ in parts} == {"curves", "distributions"}
    for kind, payload in parts:
        assert 0.3 < (len(payload) + FRAMING) / digest.sizes[kind] <= 1 or kind == "distributions"
        assert len(payload) + FRAMING <= digest.sizes[kind]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "a batch"])
def test_heat_maps_are_drawn_ever_less_often_and_never_within_ten_seconds(tmp_path: Path, together: bool) -> None:
    inv = inventory("w")
    steps = [replace(record(step, inv, random_tensors("w")), time=1000.0 + step) for step in range(60)]
    events = EventFile(tmp_path)
    events.write(steps[0])
    if together:
        events.write_batch(batch_of(steps[1:]))
    else:
        for each in steps[1:]:
            events.write(each)
    events.close()
    assert [image.step for image in accumulate(tmp_path).Images("grad_norm/(heat map)")] == [7, 16, 27, 44, 59]


def test_texts_are_written_again_only_when_they_change(tmp_path: Path) -> None:
    first, same, grown = inventory("a"), inventory("a"), inventory("a", "b")
    records = (record(step, inv, random_tensors(*(row.name for row in inv.rows))) for step, inv in enumerate((first, same, grown)))
    write(tmp_path, *records)
    assert [step for step, _ in read_texts(tmp_path, "paramwatch/inventory")] == [0, 2]
    assert [step for step, _ in read_texts(tmp_path, "paramwatch/ties")] == [0]
    assert [step for step, _ in read_scalars(tmp_path)["grad_norm/b"]] == [2]


def test_the_ties_are_a_table() -> None:
    html = markdown_to_safe_html(ties_text(inventory("embed.weight", "b", "head.weight", tied={"embed.weight": ["head.weight"]})))
    for cell in ("embed.weight = head.weight", "parameter", "4", "16"):
        assert f"<td>{cell}</td>" in html


def test_without_ties_the_text_says_so() -> None:
    assert ties_text(inventory("a", "b")).startswith("No ties")


def test_a_hostile_name_shows_as_it_is_in_a_table() -> None:
    html = markdown_to_safe_html(inventory_text(inventory("a|b`c`<script>*x*</script>\n_d_  e", "next")))
    assert html.count("<tr>") == 3
    cell = html.partition("<td>")[2].partition("</td>")[0]
    assert "<" not in cell
    for char, entity in (("|", 124), ("`", 96), ("<", 60), ("*", 42), (">", 62), ("/", 47), ("\\", 92), ("_", 95), ("\xa0", 160)):
        cell = cell.replace(f"&#{entity};", char)
    assert cell == "a|b`c`<script>*x*</script>\\n_d_ \xa0e"


def test_a_long_inventory_says_how_many_rows_it_leaves_out() -> None:
    text = inventory_text(inventory(*(f"layers.{i}" for i in range(1234))))
    assert "734 of 1,234 parameters are left out." in text
    assert len(text.splitlines()) < 520


def test_importing_the_writer_does_not_load_torch() -> None:
    code = "import sys, paramwatch.tensorboard.events; sys.exit('torch' in sys.modules or 'tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
