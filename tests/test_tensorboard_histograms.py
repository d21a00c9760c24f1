"""Histograms for TensorBoard against the elements they are of, counted one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from records import inventory, parts_of, record
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.compat.proto import summary_pb2

from paramwatch import bins
from paramwatch.columns import ABSENT
from paramwatch.record import Record
from paramwatch.tensorboard import messages
from paramwatch.tensorboard.budget import Budget
from paramwatch.tensorboard.digest import Digest
from paramwatch.tensorboard.events import MAX_BYTES, EventFile
from paramwatch.tensorboard.histograms import MOST_BUCKETS, Histograms, of_elements, of_magnitudes

F32 = arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_subnormal=True))


def counts_of(x: Any) -> np.ndarray[Any, Any]:
    return np.bincount(bins.positions(np.asarray(x)).ravel(), minlength=bins.BINS + 1)[: bins.BINS]


def read_back(found: Histograms) -> list[Any]:
    """The histograms as protobuf reads them, None where there is none; it would write the same bytes."""
    tag, read = "a tag whose length takes two bytes " * 5, list[Any]()
    for value in messages.histogram_values([tag] * len(found.sizes), found):
        summary = summary_pb2.Summary.FromString(value)
        assert [each.tag for each in summary.value] == [tag] * bool(value)
        assert summary.SerializeToString() == value
        read.append(summary.value[0].histo if value else None)
    return read


def histogram_of(x: Any) -> Any:
    parts = {name: float(np.float32(parts_of(x)[name])) for name in ("min", "max", "mean", "rms")}
    # among others: one that has no histogram, and one of another size
    least, greatest, *others = (np.array([2.5, np.nan, parts[name], -9.0]) for name in ("min", "max", "mean", "rms"))
    counts = np.stack([counts_of([2.5]), np.full(bins.BINS, ABSENT), counts_of(x), counts_of([-9.0, -9.0])])
    one, nothing, found, two = read_back(of_elements(counts, least, greatest, *others))
    assert (one.num, nothing, two.num, list(two.bucket)) == (1, None, 2, [2])
    return found


@settings(max_examples=200)
@given(F32)
def test_every_finite_element_is_in_its_bucket(x: np.ndarray[Any, Any]) -> None:
    finite = x[np.isfinite(x)].astype(np.float64)
    found = histogram_of(x)
    if not finite.size:
        assert found is None
        return
    assert found.num == sum(found.bucket) == finite.size
    assert found.min <= finite.min() <= finite.max() <= found.max
    limits = list(found.bucket_limit)
    assert found.max == limits[-1]
    assert all(low < high for low, high in zip([found.min, *limits], limits, strict=False))
    for limit, below in zip(limits[:-1], np.cumsum(found.bucket), strict=False):
        assert below == ((finite < limit) if limit > 0 else (finite <= limit)).sum()


@pytest.mark.parametrize("x", [[0.0] * 5, [42.0] * 3, [-1e30, 1e30], [1e-45], [3.4e38], [1.0, np.nan, np.inf], [0.0, 1.0, 2.0]])
def test_a_histogram_has_a_width_everywhere_and_few_empty_buckets(x: list[float]) -> None:
    found = histogram_of(np.float32(x))
    counts = np.array(found.bucket)
    assert found.min < found.max
    assert counts[0] > 0
    assert counts[-1] > 0
    assert not ((counts[:-1] == 0) & (counts[1:] == 0)).any()


@settings(max_examples=100)
@given(arrays(np.float64, st.integers(0, 60), elements=st.floats(min_value=0)))
def test_a_distribution_is_of_the_logarithms_that_there_are(values: np.ndarray[Any, Any]) -> None:
    logs = np.log10(values[(values > 0) & np.isfinite(values)])
    # beside steps with other numbers, and with rows that are left out
    wide = np.append(values, 7.0) * np.ones((3, 1))
    wide[0], wide[2] = 1e9, 0.0
    _, found, nothing = read_back(of_magnitudes(wide, np.arange(len(values) + 1) < len(values) * np.ones((3, 1))))
    assert nothing is None
    if not logs.size:
        assert found is None
        return
    edges = [found.min, *found.bucket_limit]
    assert found.num == sum(found.bucket) == logs.size
    assert len(found.bucket) <= MOST_BUCKETS
    assert list(found.bucket) == np.histogram(logs, edges)[0].tolist()


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.just(5)), elements=st.sampled_from([0.0, -0.0, 1.5, -2.0, np.inf, np.nan])))
def test_a_number_that_is_zero_is_written_as_protobuf_does(numbers: np.ndarray[Any, Any]) -> None:
    n = len(numbers)
    found = read_back(Histograms(np.arange(n), numbers, np.arange(n * (n - 1) / 2), np.zeros(n * (n - 1) // 2, np.int64)))
    assert found[0] is None
    for i in range(1, n):
        first, *others = found[i].bucket_limit
        assert (first, len(others), list(found[i].bucket)) == (i * (i - 1) / 2, i - 1, [0] * i)
        read = [found[i].min, found[i].max, found[i].num, found[i].sum, found[i].sum_squares]
        assert np.array(read).tobytes() == numbers[i].tobytes()


def binned(step: int, tensors: dict[str, dict[str, Any]], inv: Any) -> Record:
    """A record that has a histogram of each tensor in it."""
    found = {kind: np.full((len(inv.rows), bins.BINS), ABSENT, np.int64) for kind in tensors}
    for kind, rows in tensors.items():
        for name, x in rows.items():
            found[kind][inv.position[name]] = counts_of(x)
    return replace(record(step, inv, tensors), histograms=found)


def read(folder: Path) -> Any:
    return event_accumulator.EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()


def test_histograms_of_a_small_model_are_under_the_names_of_its_parameters(tmp_path: Path) -> None:
    inv = inventory("0.weight", "1.bias", "2.weight", tied={"0.weight": ["2.weight"]})
    x = np.float32([1, 2, 3, np.nan, 1e30])
    events = EventFile(tmp_path)
    for step in range(20):
        some = {"0.weight": x * (step + 1), "1.bias": np.full(4, np.nan, np.float32)}
        events.write(binned(step, {"param": some, "grad": some}, inv))
    events.close()
    found = read(tmp_path)
    assert {tag for tag in found.Tags()["histograms"] if "(" not in tag} == {
        f"{kind}/{i}.weight" for kind in ("param", "grad") for i in "02"
    }
    points = found.Histograms("grad/2.weight")
    assert [point.step for point in points] == list(range(20))
    assert points[3].histogram_value.num == 4
    assert points[3].histogram_value.max == np.float32(4e30)


def test_histograms_of_a_large_model_are_of_its_blocks(tmp_path: Path) -> None:
    names = [f"layers.{i}.{leaf}" for i in range(40) for leaf in ("weight", "bias")]
    inv, rng = inventory(*names), np.random.default_rng(0)
    some = {name: rng.normal(size=50).astype(np.float32) for name in names}
    events = EventFile(tmp_path)
    events.write(binned(0, {"param": some}, inv))
    events.close()
    (point,) = read(tmp_path).Histograms("param/layers.7")
    both = histogram_of(np.concatenate([some["layers.7.weight"], some["layers.7.bias"]]))
    assert list(point.histogram_value.bucket) == list(both.bucket)
    assert list(point.histogram_value.bucket_limit) == pytest.approx(list(both.bucket_limit))
    assert point.histogram_value.sum_squares == pytest.approx(both.sum_squares, rel=1e-6)


def test_histograms_grow_rare_also_where_the_model_changes_all_the_time(tmp_path: Path) -> None:
    inventories = inventory("w"), inventory("w", "v")
    events = EventFile(tmp_path)
    for step in range(80):
        events.write(binned(step, {"param": {"w": np.float32([step + 1])}}, inventories[step % 2]))
    events.close()
    schedule = Digest(inventories[0], Budget(MAX_BYTES)).schedules["histograms"]
    steps = [point.step for point in read(tmp_path).Histograms("param/w")]
    assert steps == [step for step in range(80) if schedule.keeps(step)]
    assert len(steps) == 72
