"""What is written can be read: whole, while it grows, after a crash, and after a run was repeated."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc
from records import batch_of, inventory, random_record, record

from paramwatch import arrowfile
from paramwatch import store as store_module
from paramwatch.block import Block
from paramwatch.columns import ABSENT, LAYOUTS
from paramwatch.folder import File
from paramwatch.guard import ParamWatchError
from paramwatch.latest import Latest
from paramwatch.record import GRAD_STATES, Finding, Inventory, Record
from paramwatch.schedule import Schedule
from paramwatch.store import DiskFolder, Folder, MemoryFolder, Store, read
from paramwatch.streams import LONG, LongStream

NET = inventory("0.weight", "0.bias", "2.weight", "4.weight", tied={"2.weight": ["4.weight"]})
STEPS = {"skipped": False, "amp_scale": None, "evaluations": 1, "update_mode": "exact", "overhead_us": 1.5, "note": "a"}


def write(folder: Folder, records: Iterable[Record], *, session: str | None = None, findings: Iterable[Finding] = ()) -> None:
    store = Store(folder, max_bytes=10**9, session=session)
    for each in records:
        store.write(each)
    store.find(findings)
    store.close()


def assert_holds(block: Block, records: list[Record]) -> None:
    """The block is these records, parts that were not measured aside."""
    assert list(block.step) == [each.step for each in records]
    assert list(block.time) == [each.time for each in records]
    measured = np.stack([each.values["count"] for each in records]) >= 0
    for kind, part in records[0].inventory.layout:
        i = records[0].inventory.kinds.index(kind)
        wanted = np.stack([each.values[part][i] for each in records])
        got = block.values[part][:, i]
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got[measured[:, i]], wanted[measured[:, i]], part)
        np.testing.assert_array_equal(block.values["count"][:, i] < 0, ~measured[:, i])
    for name in ("stepped", "lr", "grad_state"):
        got, wanted = getattr(block, name), np.stack([getattr(each, name) for each in records])
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted, name)
    for key in records[0].steps:
        assert block.steps[key].to_pylist() == [each.steps[key] for each in records], key


def content(folder: Folder, name: str) -> bytes:
    return b"".join(piece.to_pybytes() for piece in folder.open(name))


def only(folder: Folder) -> Block:
    (block,) = read(folder).blocks
    return block


# ---- round trip -----------------------------------------------------------------------------


@pytest.mark.parametrize("detail", LAYOUTS)
def test_what_is_written_is_read_back(tmp_path: Path, detail: str) -> None:
    net = inventory("a", "b", layout=[pair for pair in LAYOUTS[detail] if pair[1] != "dot"])
    records = [random_record(step, net, **STEPS) for step in range(70)]
    write(DiskFolder(tmp_path), records)
    block = only(DiskFolder(tmp_path))
    assert block.inventory == net
    assert_holds(block, records)
    assert block.steps["full_rate"].to_pylist() == [True] * 70


def test_memory_and_disk_hold_the_same_bytes(tmp_path: Path) -> None:
    folders = DiskFolder(tmp_path), MemoryFolder()
    for folder in folders:
        write(folder, [random_record(step, NET, **STEPS) for step in range(300)], session="s", findings=[Finding(3, "r", "0.bias", "m")])
    disk, memory = ({name: content(folder, name) for name in folder.names()} for folder in folders)
    assert disk == memory
    assert list(disk) == ["s.0.rows", "s.0.steps", "s.findings"]


def test_products_beyond_float32_are_kept() -> None:
    folder, net, products = MemoryFolder(), inventory("a", "b", layout=LAYOUTS["full"]), np.array([1e-60, -1e60])
    wide = random_record(0, net)
    write(folder, [replace(wide, values=wide.values | {"dot": np.tile(products, (len(net.kinds), 1))})])
    np.testing.assert_array_equal(only(folder).values["dot"][0, net.kinds.index("update")], products)


def test_not_measured_is_null_and_nan_is_nan() -> None:
    folder, net = MemoryFolder(), inventory("a", "b")
    write(folder, [record(0, net, {"param": {"a": [1.0, np.nan]}, "grad": {"b": [np.inf, np.nan]}})])
    table = pa.ipc.open_stream(content(folder, folder.names()[0])).read_all()
    assert table["grad.count"].to_pylist() == [[None, 2]]
    assert table["grad.posinf"].to_pylist() == [[None, 1]]
    assert table["param.mean"].to_pylist() == [[1.0, None]]
    assert np.isnan(table["grad.mean"].to_pylist()[0][1])
    assert table["grad_state"].to_pylist() == [[GRAD_STATES.index("used"), None]]
    assert table["lr"].to_pylist() == [[0.1, None]]


def test_a_field_says_which_kind_and_part_it_is() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(0, NET)])
    schema = pa.ipc.open_stream(content(folder, folder.names()[0])).schema
    assert schema.field("grad.rms").metadata == {b"kind": b"grad", b"part": b"rms"}
    assert schema.field("grad.zero").type == pa.list_(pa.int64(), 3)
    assert schema.metadata[b"model"] == b"Net"


names = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=4, unique=True)


@given(names)
@settings(max_examples=30)
def test_names_are_data(names: list[str]) -> None:
    folder, net = MemoryFolder(), inventory(*names)
    write(folder, [random_record(0, net)], findings=[Finding(0, "rule", names[0], "line\nline")])
    assert only(folder).inventory == net
    assert read(folder).findings[0].parameter == names[0]


@pytest.mark.parametrize("name", ['a"b', "a/b", "a\nb", "0.block 2.0.weight", "größe.重み", "a\\b", "{}", "*"])
def test_odd_names_survive(tmp_path: Path, name: str) -> None:
    write(DiskFolder(tmp_path), [random_record(0, inventory(name, "b", tied={name: ["b"]}))])
    found = only(DiskFolder(tmp_path)).inventory
    assert found.rows[0].name == name
    assert found.ties[0].names == (name, "b")


def test_unknown_keys_are_kept_by_the_type_of_their_values() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(0, NET, a=True, b=np.int64(2), c=np.float32(0.5), d="x", e=None)])
    found = {key: (str(column.type), column[0].as_py()) for key, column in only(folder).steps.items()}
    assert found == {"full_rate": ("bool", True), "a": ("bool", True), "b": ("int64", 2), "c": ("double", 0.5), "d": ("string", "x")}


# ---- when it is written ---------------------------------------------------------------------


def test_a_session_that_never_stepped_leaves_nothing(tmp_path: Path) -> None:
    Store(DiskFolder(tmp_path / "new"), max_bytes=10**9).close()
    assert not (tmp_path / "new").exists()


def test_after_a_flush_another_reader_sees_everything(tmp_path: Path) -> None:
    store = Store(DiskFolder(tmp_path), max_bytes=10**9)
    for step in range(5):
        store.write(random_record(step, NET))
        store.flush()
        store.flush()
        assert list(only(DiskFolder(tmp_path)).step) == list(range(step + 1))
    store.close()


def test_another_process_reads_a_run_that_is_going_on(tmp_path: Path) -> None:
    store = Store(DiskFolder(tmp_path), max_bytes=10**9)
    for step in range(3):
        store.write(random_record(step, NET))
    store.flush()
    code = "import sys; from paramwatch.store import *; from pathlib import Path; "
    code += "print(len(read(DiskFolder(Path(sys.argv[1]))).blocks[0].step))"
    assert subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout == "3\n"
    store.close()


def test_a_batch_is_written_when_it_is_full_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, now = MemoryFolder(), [100.0]
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now[0])
    store = Store(folder, max_bytes=10**9)
    for step in range(store_module.BATCH_STEPS + 1):
        store.write(random_record(step, NET))
    assert len(only(folder).step) == store_module.BATCH_STEPS
    now[0] += 4.9
    store.tick()
    assert len(only(folder).step) == store_module.BATCH_STEPS
    now[0] += 0.1
    store.tick()
    assert len(only(folder).step) == store_module.BATCH_STEPS + 1


def test_lines_that_stay_change_and_come_back_are_read_back_in_batches_of_any_length(tmp_path: Path) -> None:
    store, records, step = Store(DiskFolder(tmp_path), max_bytes=10**9), list[Record](), 0
    for n, bad in ((1, 0), (4, 0), (4, 0), (2, 1), (4, 1), (4, 0), (4, 0), (1, 0)):
        for _ in range(n):
            each = random_record(step, NET, **STEPS)
            records.append(replace(each, values={**each.values, "nan": np.full_like(each.values["nan"], bad)}))
            store.write(records[-1])
            step += 1
        store.flush()
    store.close()

    # a checksum that does not fit what is there would be an error
    assert_holds(only(DiskFolder(tmp_path)), records)


def test_what_stays_the_same_is_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(arrowfile, "_sum", lambda column: seen.append(len(column)) or 0)
    store, batch = Store(MemoryFolder(), max_bytes=10**9), batch_of([random_record(step, NET, **STEPS) for step in range(4)])
    batch = replace(batch, values={part: np.ones_like(array) for part, array in batch.values.items()})
    store.write(batch.record(0))
    store.flush()
    for first in (1, 5, 9):
        seen.clear()
        store.write_batch(replace(batch, step=range(first, first + 4)))
        store.flush()

    columns = len(NET.layout) + 3
    assert len(seen) < columns, "the numbers of the steps, and what is known of them as a whole"


def test_a_large_step_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BATCH_BYTES", 100)
    folder = MemoryFolder()
    store = Store(folder, max_bytes=10**9)
    store.write(random_record(0, NET))
    assert len(only(folder).step) == 1


def test_a_folder_that_cannot_be_written_is_an_os_error_at_the_first_batch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(DiskFolder(tmp_path / "file"), max_bytes=10**9)
    store.write(random_record(0, NET))
    with pytest.raises(OSError, match="file"):
        store.flush()


# ---- what is kept ---------------------------------------------------------------------------


def test_a_long_run_is_thinned_by_the_schedule_and_stays_within_its_bytes() -> None:
    folder, budget = MemoryFolder(), 1_000_000
    store = Store(folder, max_bytes=budget)
    noise = [random_record(step, NET) for step in range(64)]
    for step in range(2000):
        store.write(replace(noise[step % 64], step=step))
    store.flush()
    assert store.schedule is not None
    assert list(only(folder).step) == [step for step in range(2000) if store.schedule.keeps(step)]
    assert only(folder).steps["full_rate"].to_pylist() == [store.schedule.full_rate(step) for step in only(folder).step]
    written = sum(len(content(folder, name)) for name in folder.names())
    assert written < budget * store.schedule.kept(2000) / store.schedule.kept(2**20) * 1.2


@pytest.mark.parametrize(("period", "phase"), [(2, 1), (3, 2), (64, 33)])
def test_an_optimizer_that_steps_rarely_is_never_thinned_away(period: int, phase: int) -> None:
    folder, net = MemoryFolder(), inventory("critic", "generator")
    store = Store(folder, max_bytes=1)
    x = np.ones(4)
    for step in range(1024):
        rows = ["critic", "generator"] if step % period == phase else ["critic"]
        store.write(record(step, net, {"param": dict.fromkeys(rows, x)}))
    store.close()
    block = only(folder)
    kept = block.step[block.stepped[:, 1]]
    assert kept[0] == phase
    assert all(gap <= 2 * max(store.schedule.stride(int(step)), period) for gap, step in zip(np.diff(kept), kept[1:], strict=True))
    assert len(block.step) < 3 * store.schedule.kept(1024)


def test_the_rest_of_a_kept_step_is_kept_and_that_of_a_dropped_one_is_not() -> None:
    folder = MemoryFolder()
    store = Store(folder, max_bytes=1)
    for step in range(100):
        store.write(record(step, NET, {"param": {"0.weight": np.ones(4)}}))
        store.write(record(step, NET, {"param": {"0.bias": np.ones(4)}}))
    store.close()
    block = only(folder)
    assert list(block.step) == [*range(64), *range(64, 100, 2)]
    assert block.stepped[:, :2].all()


def test_the_rest_of_a_step_kept_for_a_rare_row_is_kept() -> None:
    folder = MemoryFolder()
    store = Store(folder, max_bytes=1)
    for step in range(200):
        rare = {"0.bias": np.ones(4)} if step % 2 else {}
        store.write(record(step, NET, {"param": {"0.weight": np.ones(4), **rare}}))
        store.write(record(step, NET, {"param": {"2.weight": np.ones(4)}}))
    store.close()
    block = only(folder)
    assert any(block.step > 64)
    assert block.stepped[:, 2].all()


# ---- the latest steps -----------------------------------------------------------------------


def spoilt(step: int, skipped: bool = False) -> Record:
    return record(step, NET, {"grad": {"0.bias": [np.nan]}, "param": {"0.bias": [1.0]}}, skipped=skipped)


def finite(step: int) -> Record:
    return record(step, NET, {"grad": {"0.bias": [1.0]}, "param": {"0.bias": [1.0]}}, skipped=False)


def longest_full_rate(folder: Folder) -> tuple[int, int]:
    """The steps beyond the schedule's own stretch that are said to be at full rate, which have to be without a gap."""
    block = only(folder)
    full = [int(step) for step, known in zip(block.step, block.steps["full_rate"].to_pylist(), strict=True) if known and step >= 64]
    assert full == list(range(full[0], full[-1] + 1))
    return full[0], full[-1]


def small(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of the smallest base, that holds batches of 16 steps, and some of those that it drops."""
    monkeypatch.setattr(store_module, "BATCH_STEPS", 16)
    store = Store(folder, max_bytes=1)
    store._latest = Latest(60_000)
    return store


def test_the_last_steps_are_there_at_full_rate_without_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MemoryFolder()
    store = small(folder, monkeypatch)
    for step in range(1001):
        store.write(finite(step))
    store.flush()
    before = set(only(folder).step.tolist())
    store.close()
    first, last = longest_full_rate(folder)
    assert first < 990 < last == 1000
    assert first - 1 not in before
    assert only(folder).step.tolist() == sorted(before | set(range(first, 1001)))
    files = [file for file in folder.names() if file.endswith("rows")]
    lines = [step for file in files for step in pa.ipc.open_stream(content(folder, file)).read_all()["step"].to_pylist()]
    assert len(lines) == len(set(lines))


def test_steps_that_the_schedule_kept_are_at_full_rate_as_far_as_the_latest_ones_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MemoryFolder()
    store = small(folder, monkeypatch)
    for step in range(90):
        store.write(finite(step))
    store.write(spoilt(90))
    for step in range(91, 150):
        store.write(finite(step))
    store.close()
    assert longest_full_rate(folder) == (64, 149)


def test_a_store_of_few_bytes_has_the_last_steps_as_well() -> None:
    folder, step, fewest = MemoryFolder(), 0, 5
    store = Store(folder, max_bytes=60_000)
    # the fewest there can be: one more has come after what was given up
    while step < 500 or store._dropped_steps.steps != 1:
        store.write(finite(step))
        step += 1
    store.close()
    block = only(folder)
    assert block.step[-fewest:].tolist() == list(range(step - fewest, step))
    assert all(block.steps["full_rate"].to_pylist()[-fewest:])


def test_what_came_before_the_first_step_that_is_not_finite_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MemoryFolder()
    store = small(folder, monkeypatch)
    for step in range(501):
        store.write(finite(step))
    store.write(spoilt(501, skipped=True))
    assert only(folder).step[-1] < 500
    store.write(spoilt(502))
    first, last = longest_full_rate(folder)
    assert first < 495 < last == 502
    store.write(spoilt(503))
    for step in range(504, 705):
        store.write(finite(step))
    store.write(spoilt(705))
    assert longest_full_rate(folder) == (first, last)


def test_a_run_that_was_never_finite_is_written_and_nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MemoryFolder()
    store = small(folder, monkeypatch)
    store.write(finite(0))
    store.write(spoilt(1))
    assert list(only(folder).step) == [0, 1]


def test_the_latest_steps_keep_to_their_bytes_and_to_their_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MemoryFolder()
    store = small(folder, monkeypatch)
    for step in range(400):
        store.write(finite(step))
    assert 40_000 < sum(held.size for held in store._latest._held) <= 60_000
    for step in range(400, 420):
        store.write(record(step, inventory("0.bias"), {"param": {"0.bias": [1.0]}}, note=1 if step == 410 else None))
    store.close()
    later = read(folder).epochs
    assert [len(epoch.inventory.rows) for epoch in later] == [3, 1, 1]
    assert sorted(np.concatenate([epoch.step for epoch in later[1:]])) == list(range(400, 420))


# ---- steps in parts -------------------------------------------------------------------------


def test_parts_of_one_step_are_merged_and_the_later_number_wins() -> None:
    folder, net = MemoryFolder(), inventory("a", "b", "c")
    keys: dict[str, Any] = {"evaluations": 1, "overhead_us": 2.0, "update_mode": "exact"}
    first = record(5, net, {"param": {"a": [1.0], "b": [2.0]}}, skipped=False, amp_scale=None, **keys)
    keys["update_mode"] = None
    states = {"b": "zero", "c": "frozen"}
    second = record(5, net, {"param": {"b": [3.0]}}, lr=0.5, states=states, skipped=True, amp_scale=8.0, **keys)
    write(folder, [first, second, record(6, net, {"param": {"c": [4.0]}})])
    block = only(folder)
    assert list(block.step) == [5, 6]
    np.testing.assert_array_equal(block.values["mean"][0, 0], [1.0, 3.0, np.nan])
    np.testing.assert_array_equal(block.values["count"][0, 0], [1, 1, ABSENT])
    np.testing.assert_array_equal(block.stepped[0], [True, True, False])
    np.testing.assert_array_equal(block.lr[0], [0.1, 0.5, np.nan])
    np.testing.assert_array_equal(block.grad_state[0], [GRAD_STATES.index(state) for state in ("used", "zero", "frozen")])
    assert {key: column[0].as_py() for key, column in block.steps.items()} == {
        "full_rate": True,
        "skipped": True,
        "evaluations": 2,
        "overhead_us": 4.0,
        "update_mode": "exact",
        "amp_scale": 8.0,
    }


@given(st.lists(st.tuples(st.integers(0, 5), st.sets(st.sampled_from("abc"))), min_size=1, max_size=12))
def test_parts_merge_as_a_dict_would(parts: list[tuple[int, set[str]]]) -> None:
    folder, net = MemoryFolder(), inventory("a", "b", "c")
    wanted: dict[int, dict[str, float]] = {}
    records = []
    for i, (step, rows) in enumerate(sorted(parts, key=lambda part: part[0])):
        records.append(record(step, net, {"grad": {row: [float(i)] for row in rows}}, stepped=sorted(rows), lr=float(i)))
        wanted.setdefault(step, {}).update(dict.fromkeys(rows, float(i)))
    write(folder, records)
    block = only(folder)
    means = block.values["mean"][:, net.kinds.index("grad")]
    assert list(block.step) == list(wanted)
    for got in (means, block.lr):
        assert [{row: x for row, x in zip("abc", line, strict=True) if not np.isnan(x)} for line in got] == list(wanted.values())


# ---- long streams ---------------------------------------------------------------------------


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of the words in a record's histograms."""
    schema = pa.schema([("step", pa.int64()), ("word", pa.string()), ("counts", pa.list_(pa.int64()))])

    def lines(record: Record) -> dict[str, Any]:
        return {"word": list(record.histograms), "counts": list(record.histograms.values())} if record.histograms else {}

    monkeypatch.setitem(LONG, "words", LongStream(schema, lines))
    monkeypatch.delitem(LONG, "histograms")


def counted(step: int, **counts: list[int]) -> Record:
    return replace(random_record(step, NET), histograms={word: np.array(found) for word, found in counts.items()})


@pytest.mark.usefixtures("words")
def test_a_long_stream_has_lines_for_those_records_that_hold_any() -> None:
    folder = MemoryFolder()
    write(folder, [counted(0), counted(3, a=[1, 2], b=[]), counted(5, c=[2**53 + 1])], session="s")
    assert folder.names() == ["s.0.rows", "s.0.steps", "s.words"]
    assert read(folder).lines["words"].to_pylist() == [
        {"step": 3, "word": "a", "counts": [1, 2]},
        {"step": 3, "word": "b", "counts": []},
        {"step": 5, "word": "c", "counts": [2**53 + 1]},
    ]
    assert read(folder).lines["findings"].num_rows == 0


@pytest.mark.usefixtures("words")
def test_a_later_session_hides_long_lines_too() -> None:
    folder = MemoryFolder()
    write(folder, [counted(step, a=[step]) for step in range(5)], session="1")
    write(folder, [counted(2, b=[9])], session="2")
    assert read(folder).lines["words"]["counts"].to_pylist() == [[0], [1], [9]]


@pytest.mark.usefixtures("words")
def test_long_lines_are_thinned_by_how_often_there_were_any() -> None:
    folder = MemoryFolder()
    store = Store(folder, max_bytes=1)
    for step in range(0, 400, 2):
        store.write(counted(step, a=[step]))
    store.close()
    assert [2 * i for i in range(200) if Schedule(1, 1).keeps(i)] == read(folder).lines["words"]["step"].to_pylist()


def test_what_is_no_unicode_text_is_written_out() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(0, NET, note="a\udc80")], findings=[Finding(0, "rule", "\ud800", "m")])
    assert read(folder).findings[0].parameter == "\\ud800"
    assert only(folder).steps["note"].to_pylist() == ["a\\udc80"]


# ---- epochs ---------------------------------------------------------------------------------


def test_a_new_inventory_opens_new_files() -> None:
    folder, grown = MemoryFolder(), inventory("a", "b")
    write(folder, [random_record(0, inventory("a")), random_record(1, grown), random_record(2, grown)], session="s")
    assert folder.names() == ["s.0.rows", "s.0.steps", "s.1.rows", "s.1.steps"]
    assert [(len(block.inventory.rows), list(block.step)) for block in read(folder).blocks] == [(1, [0]), (2, [1, 2])]


def test_an_equal_inventory_made_anew_does_not() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(step, inventory("a", "b")) for step in range(3)])
    assert list(only(folder).step) == [0, 1, 2]


def test_a_new_key_opens_new_files_and_a_missing_one_is_null() -> None:
    folder = MemoryFolder()
    keys: list[dict[str, Any]] = [{"x": 1}, {"x": 2, "y": "b"}, {}, {"y": "c"}]
    write(folder, [random_record(step, NET, **found) for step, found in enumerate(keys)])
    first, second = read(folder).blocks
    assert "y" not in first.steps
    assert second.steps["x"].to_pylist() == [2, None, None]
    assert second.steps["y"].to_pylist() == ["b", None, "c"]


def test_a_value_of_a_wider_type_opens_new_files() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(step, NET, x=x) for step, x in enumerate([1, 2.5, 3, "four"])])
    assert [block.steps["x"].to_pylist() for block in read(folder).blocks] == [[1], [2.5, 3.0], ["four"]]


def test_more_than_ten_epochs_stay_in_order() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(step, inventory(*"abcdefghijkl"[: step + 1])) for step in range(12)])
    assert [int(block.step[0]) for block in read(folder).blocks] == list(range(12))


# ---- sessions -------------------------------------------------------------------------------


def said(*steps: int) -> list[Finding]:
    return [Finding(step, "rule", "", f"at {step}") for step in steps]


def test_a_resumed_session_continues_and_hides_what_it_does_again() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(step, NET) for step in range(10)], session="1", findings=said(2, 6, 8))
    write(folder, [random_record(step, NET) for step in range(6, 9)], session="2", findings=said(7))
    found = read(folder)
    assert [(epoch.session, list(epoch.step)) for epoch in found.epochs] == [("1", list(range(6))), ("2", [6, 7, 8])]
    assert [finding.step for finding in found.findings] == [2, 7]


def test_a_rerun_replaces_all_earlier_sessions() -> None:
    folder = MemoryFolder()
    for session, steps in (("1", range(5)), ("2", range(5, 9)), ("3", range(2))):
        write(folder, [random_record(step, NET) for step in steps], session=session, findings=said(steps[-1]))
    found = read(folder)
    assert [epoch.session for epoch in found.epochs] == ["3"]
    assert [finding.step for finding in found.findings] == [1]


def test_a_session_hides_from_its_first_step_also_where_that_was_not_its_first_kept() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(step, NET) for step in range(0, 200, 2)], session="1")
    store = Store(folder, max_bytes=1, session="2")
    for step in range(101, 110):
        store.write(random_record(step, NET))
    store.close()
    first, second = read(folder).blocks
    assert first.step[-1] == 100
    assert list(second.step) == [101, 102, 104, 106, 108]


def test_sessions_are_named_by_their_start_so_that_they_sort() -> None:
    made = [Store(MemoryFolder(), max_bytes=1).session for _ in range(3)]
    assert made == sorted(made)
    assert len(made[0].split("-")[0]) == len("20250131T120000")


def test_a_session_comes_after_those_before_it_also_where_its_clock_is_behind_theirs() -> None:
    folder = MemoryFolder()
    write(folder, [random_record(step, NET) for step in range(4)], session="29990131T120000-000000-77")
    for first in (3, 5):
        store = Store(folder, max_bytes=10**9)
        for step in (first, first + 1):
            store.write(random_record(step, NET))
        store.close()
    assert [list(epoch.step) for epoch in read(folder).epochs] == [[0, 1, 2], [3, 4], [5, 6]]


def test_ranks_write_side_by_side_and_read_their_own(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(DiskFolder(tmp_path, rank), [random_record(step, NET) for step in range(rank, 3)], session=f"s{rank}")
    assert [list(only(DiskFolder(tmp_path, rank)).step) for rank in (0, 1)] == [[0, 1, 2], [1, 2]]
    assert {path.name for path in tmp_path.glob("s1*")} == {"s1.0.rows.r1.arrow", "s1.0.steps.r1.arrow"}


# ---- torn, foreign, newer -------------------------------------------------------------------


class Torn:
    """A folder of which one file ends early, with zeros in place of the rest if asked for."""

    def __init__(self, files: dict[str, bytes], name: str, size: int, *, zeros: bool) -> None:
        self._files = files | {name: files[name][:size] + b"\0" * (len(files[name]) - size) * zeros}

    def names(self) -> list[str]:
        return sorted(self._files)

    def create(self, name: str) -> File:
        raise AssertionError(name)

    def open(self, name: str) -> list[Any]:
        return [pa.py_buffer(self._files[name])]

    def where(self, name: str) -> str:
        return name


def two_batches() -> tuple[dict[str, bytes], dict[str, int]]:
    """The bytes of a small store of two batches of two steps, and the size of its files after the first."""
    folder, net = MemoryFolder(), inventory("a", layout=LAYOUTS["cheap"][:5])
    store = Store(folder, max_bytes=10**9, session="s")
    for step in (0, 1):
        store.write(random_record(step, net, x=1))
    store.find([Finding(0, "rule", "a", "message")])
    store.flush()
    sizes = {name: len(content(folder, name)) for name in folder.names()}
    for step in (2, 3):
        store.write(random_record(step, net, x=1))
    store.find([Finding(3, "rule", "a", "message")])
    store.flush()
    return {name: content(folder, name) for name in folder.names()}, sizes


@pytest.mark.parametrize("name", ["s.0.rows", "s.0.steps"])
def test_a_torn_tail_costs_only_the_batch_it_is_in(name: str) -> None:
    files, sizes = two_batches()
    for size in range(sizes[name], len(files[name])):
        (epoch,) = read(Torn(files, name, size, zeros=False)).epochs
        assert list(epoch.step) == [0, 1], size
        if size % 16 == 0:
            assert len(epoch.block().values["rms"]) == 2
    assert list(only(Torn(files, name, len(files[name]), zeros=False)).step) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["s.0.rows", "s.0.steps"])
def test_a_tail_of_zeros_after_a_power_cut_costs_only_the_batch_it_is_in(name: str) -> None:
    files, sizes = two_batches()
    for size in range(sizes[name], len(files[name]) - 16, 3):
        assert list(only(Torn(files, name, size, zeros=True)).step) == [0, 1], size


@pytest.mark.parametrize("name", ["s.0.rows", "s.0.steps", "s.findings"])
def test_a_damaged_file_is_an_error_that_names_it_or_costs_only_its_last_batch(name: str) -> None:
    files, sizes = two_batches()
    wanted, damaged, whole = sorted(said_of(Torn(files, name, len(files[name]), zeros=False))), 0, 0
    random = np.random.default_rng(0)
    for at in (each := range(0, len(files[name]), 7)):
        content = bytearray(files[name])
        content[at] ^= 1 << int(random.integers(8))
        folder = Torn(files | {name: bytes(content)}, name, len(content), zeros=False)
        try:
            got = said_of(folder)
        except ParamWatchError as error:
            damaged += name in str(error)
        else:
            whole += 1
            assert sorted(got) == wanted or (at >= sizes[name] and set(got) < set(wanted)), at
    assert damaged + whole == len(each)
    # what the other batch holds as well is not looked at
    assert damaged > 0.6 * (damaged + whole)


@pytest.mark.parametrize("name", ["s.0.rows", "s.0.steps", "s.findings"])
def test_of_a_file_that_was_closed_no_damage_costs_a_batch_in_silence(name: str) -> None:
    files, _ = two_batches()
    # as Arrow ends a stream, and so each file of a run that is closed
    files[name] += b"\xff\xff\xff\xff\0\0\0\0"
    wanted = sorted(said_of(Torn(files, name, len(files[name]), zeros=False)))
    named = same = 0
    random = np.random.default_rng(0)
    for i, at in enumerate(each := range(0, len(files[name]) - 8, 11)):
        content = bytearray(files[name])
        if i % 3 == 0:
            content[at] ^= 1 << int(random.integers(8))
        else:
            # a byte too many, or one too few
            content[at : at + i % 3 - 1] = b"\7" * (i % 3 == 1)
        try:
            got = said_of(Torn(files | {name: bytes(content)}, name, len(content), zeros=False))
        except ParamWatchError as error:
            named += name in str(error)
        else:
            assert sorted(got) == wanted, at
            same += 1
    assert named + same == len(each)


def test_zeros_before_the_mark_of_a_closed_file_do_not_hide_damage_and_what_looks_like_the_mark_is_none() -> None:
    folder, name, mark = MemoryFolder(), "s.0.rows", b"\xff\xff\xff\xff\0\0\0\0"
    x, net = np.ones(4), inventory("a", "b")
    given = {kind: {"a": x, "b": x} for kind in ("param", "grad")}
    write(folder, [record(step, net, given) for step in range(9)], session="s")
    files = {each: content(folder, each) for each in folder.names()}
    whole = files[name]
    assert whole.endswith(bytes(16) + mark)
    damaged = whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:]
    with pytest.raises(ParamWatchError, match=r"s\.0\.rows is damaged: batch 1 of 1"):
        only(Torn(files | {name: damaged}, name, len(whole), zeros=False))
    alike = [i for i in range(len(mark), len(whole)) if whole[:i].endswith(mark)]
    assert alike
    assert [read(Torn(files, name, size, zeros=False)).blocks for size in alike] == [[]] * len(alike)


def said_of(folder: Folder) -> list[str]:
    """Everything that is in a small folder, step by step."""
    found = read(folder)
    lines = [str(line) for line in found.lines["findings"].to_pylist()]
    return lines + [
        repr((block.inventory, [(part, array[i].tolist()) for part, array in block.values.items()], block.lr[i].tolist()))
        + repr([(key, column[i].as_py()) for key, column in block.steps.items()])
        for block in found.blocks
        for i in range(len(block.step))
    ]


@pytest.mark.parametrize("name", ["s.0.rows", "s.0.steps"])
def test_a_file_torn_in_its_first_batch_is_empty_but_for_rows_without_a_header_where_there_are_steps(name: str) -> None:
    files, sizes = two_batches()
    header = 8 + ipc.read_message(files[name]).metadata.size
    for size in (*range(8), *range(8, sizes[name], 7)):
        torn = Torn(files, name, size, zeros=False)
        if name == "s.0.rows" and size < header:
            with pytest.raises(ParamWatchError, match=r"s\.0\.rows is damaged: not even its header is whole"):
                read(torn)
        else:
            assert read(torn).blocks == [], size


@pytest.mark.parametrize(("content", "message"), [(b"\0", "is damaged: it begins with zeros"), (b"a", "is not a file of paramwatch")])
def test_a_file_of_a_few_bytes_is_judged_as_a_longer_one(tmp_path: Path, content: bytes, message: str) -> None:
    for size in range(1, 6):
        (tmp_path / "x.0.rows.arrow").write_bytes(content * size)
        with pytest.raises(ParamWatchError, match=message):
            read(DiskFolder(tmp_path))


@pytest.mark.parametrize("content", [b"hello, world", b"ARROW1\0\0 and so on"], ids=["text", "arrow file"])
@pytest.mark.parametrize("kind", ["rows", "findings"])
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / f"mine.{kind}.arrow").write_bytes(content)
    with pytest.raises(ParamWatchError, match=rf"mine\.{kind}\.arrow is not a file of paramwatch"):
        read(DiskFolder(tmp_path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({}, "is not a file of paramwatch"), ({"format": "paramwatch", "version": "99"}, "newer paramwatch .format 99")],
    ids=["other", "newer"],
)
def test_a_stream_of_another_format_or_version_is_named(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    with pa.ipc.new_stream(tmp_path / "x.0.rows.arrow", pa.schema([("a", pa.int64())], metadata)):
        pass
    with pytest.raises(ParamWatchError, match=rf"x\.0\.rows\.arrow.*{message}"):
        read(DiskFolder(tmp_path))


@pytest.mark.parametrize("kind", ["rows", "steps", "findings"])
def test_a_file_that_cannot_be_read_or_lost_all_it_held_is_named(tmp_path: Path, kind: str) -> None:
    write(DiskFolder(tmp_path), [random_record(0, NET)], session="a", findings=[Finding(0, "rule", "", "m")])
    write(DiskFolder(tmp_path), [random_record(1, NET)], session="b")
    (file,) = tmp_path.glob(f"a.*{kind}.arrow")
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(ParamWatchError, match=rf"{file.name} is damaged: it begins with zeros"):
        read(DiskFolder(tmp_path))
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(ParamWatchError, match=rf"{file.name} cannot be read: No such file"):
        read(DiskFolder(tmp_path))
    file.unlink()
    file.mkdir()
    with pytest.raises(ParamWatchError, match=rf"{file.name} cannot be read"):
        read(DiskFolder(tmp_path))


def test_files_that_do_not_bear_our_endings_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.arrow").write_text("mine")
    assert read(DiskFolder(tmp_path)).blocks == []
    assert read(DiskFolder(tmp_path / "nowhere")).blocks == []


def test_the_inventory_of_a_model_without_ties_and_one_with_are_told_apart() -> None:
    found: list[Inventory] = []
    for net in (inventory("a", "b"), inventory("a", "b", tied={"a": ["b"]})):
        folder = MemoryFolder()
        write(folder, [random_record(0, net)])
        found.append(only(folder).inventory)
        assert found[-1] == net
    assert found[0] != found[1]
