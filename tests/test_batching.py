"""What is put together at once is what is put together one by one: records, files, counts and findings."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recorded import ACTIONS, event, fresh, one_by_one, rounds_of
from records import batch_of, inventory, random_record, record
from tensorboard.compat.proto import event_pb2, summary_pb2

from paramwatch.absence import Tally
from paramwatch.batch import Batch
from paramwatch.batching import Batching
from paramwatch.cost import Cost
from paramwatch.folder import MemoryFolder
from paramwatch.record import Finding, Record
from paramwatch.rounds import Round
from paramwatch.rules import RULES, worth_reading
from paramwatch.schedule import Schedule
from paramwatch.store import Store, read
from paramwatch.tensorboard import events
from paramwatch.tensorboard.curves import Curves

LOOPS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 3)), min_size=1, max_size=6).map(
    lambda parts: [action for action, times in parts for _ in range(times)]
)
"""Actions, most of them more than once in a row."""
MOST = st.sampled_from([1, 2, 3, 256])


def put_together(rounds: Sequence[Round], most: int = 256) -> Iterator[Record | Batch]:
    """As the background thread does it, where so many rounds wait."""
    batching, handed = Batching(), [(done, "exact") for done in fresh(rounds)]
    assembled = one_by_one(rounds)
    while handed:
        n = batching.alike(handed[:most])
        yield batching.batch(handed[:n]) if n else assembled[len(assembled) - len(handed)]
        # what the rounds in between left has to be known
        for done, _ in handed[: 0 if n else 1]:
            for step in done.optimizer_steps:
                done.changed(step, done.step)
        handed = handed[n or 1 :]


def assert_same(got: Record, wanted: Record) -> None:
    assert (got.step, got.time, got.steps, got.changes) == (wanted.step, wanted.time, wanted.steps, wanted.changes)
    assert list(got.steps) == list(wanted.steps)
    assert got.inventory is wanted.inventory
    assert list(got.values) == list(wanted.values)
    arrays = [(got.values[part], wanted.values[part], part) for part in wanted.values]
    arrays += [(getattr(got, name), getattr(wanted, name), name) for name in ("stepped", "lr", "grad_state")]
    for array, expected, name in arrays:
        np.testing.assert_array_equal(array, expected, err_msg=f"{name} of step {wanted.step}")
        assert (array.dtype, array.flags.writeable) == (expected.dtype, False)


@settings(max_examples=40)
@given(
    LOOPS,
    st.sampled_from(["default", "full", "cheap"]),
    st.sampled_from(["exact", "sampled", "off"]),
    st.integers(1, 2),
    st.booleans(),
    MOST,
)
@example(["both", "both", "both", "raises", "outside", "both"], "default", "exact", 1, False, 1)
@example([*["both"] * 5, "share", "both", "both"], "default", "exact", 1, False, 256)
def test_many_rounds_at_once_are_the_records_of_each(loop: list[str], detail: Any, update: Any, every: int, raw: bool, most: int) -> None:
    rounds = rounds_of(loop, detail=detail, update=update, every=every, raw=raw)
    wanted = one_by_one(rounds)
    got = [each for part in put_together(rounds, most) for each in (part if isinstance(part, Batch) else [part])]

    assert len(got) == len(wanted)
    for each, expected in zip(got, wanted, strict=True):
        assert_same(each, expected)


def test_rounds_of_one_form_are_one_batch_and_the_first_of_an_inventory_is_alone() -> None:
    # steps that go the quick way are of another form than the few between them that do not
    rounds = rounds_of(["both"] * 9 + ["grow"] + ["both"] * 5, plans=False)
    sizes = [len(part) if isinstance(part, Batch) else 0 for part in put_together(rounds)]
    # other rows are measured at powers of two, and once they are in an optimizer no more; of step 12 no epoch is known
    assert sizes == [0, 0, 0, 1, 0, 3, 0, 0, 2, 1, 2]


# ---- the sinks ----------------------------------------------------------------------------------


def batches_of(records: Sequence[Record], sizes: Sequence[int]) -> Iterator[Record | Batch]:
    """Records of one inventory and the same stepped rows, by turns alone and together."""
    yield records[0]
    rest, i = list(records[1:]), 0
    while rest:
        some, rest = rest[: sizes[i % len(sizes)]], rest[sizes[i % len(sizes)] :]
        i += 1
        yield some[0] if len(some) == 1 else batch_of(some)


def feed(sink: Any, parts: Sequence[Record | Batch]) -> Any:
    for part in parts:
        (sink.write_batch if isinstance(part, Batch) else sink.write)(part)
    return sink


def content(folder: MemoryFolder) -> dict[str, bytes]:
    return {name: [piece.to_pybytes() for piece in folder.open(name)] for name in folder.names()}


def payloads(folder: Path) -> list[bytes]:
    """Of the records in the one event file of a folder."""
    (file,) = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + length])
        data = data[16 + length :]
    return found


def curves_in(folder: Path) -> list[bytes]:
    """The events of that file that draw curves, and of these the curves alone."""
    found = []
    for payload in payloads(folder):
        each = event_pb2.Event.FromString(payload)
        curves = [value for value in each.summary.value if value.HasField("simple_value")]
        if curves:
            only = event_pb2.Event(wall_time=each.wall_time, step=each.step, summary=summary_pb2.Summary(value=curves))
            found.append(only.SerializeToString())
    return found


@settings(max_examples=25)
@given(LOOPS, st.booleans(), MOST)
@example([*["both"] * 5, "first", "read", "both"], False, 256)
@example(["both", "both", "first", "read", "read", "read", "both"], False, 1)
@example([*["both"] * 6, "nan", "both", "both"], False, 2)
def test_every_sink_of_ours_does_with_a_batch_what_it_does_with_its_records(loop: list[str], raw: bool, most: int) -> None:
    rounds = rounds_of(loop, raw=raw)
    parts, records = list(put_together(rounds, most)), one_by_one(rounds)
    net = records[-1].inventory

    tallies = feed(Tally(), parts), feed(Tally(), records)
    assert tallies[0].absence(net) == tallies[1].absence(net)
    shares = feed(Cost(), parts).share, feed(Cost(), records).share
    # sums of sums differ in the last bit
    assert shares == (None, None) or shares[0] == pytest.approx(shares[1], rel=1e-12)
    folders = MemoryFolder(), MemoryFolder()
    for folder, given_ in zip(folders, (parts, records), strict=True):
        feed(Store(folder, max_bytes=10**6, session="s"), given_).close()
    assert content(folders[0]) == content(folders[1])
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        feed(events.EventFile(Path(one)), parts).close()
        feed(events.EventFile(Path(other)), records).close()
        assert payloads(Path(one)) == payloads(Path(other))


@pytest.mark.parametrize(
    "loop", [["both"] * 12, ["both", "nan", "infinite", "skipped", "zero", "without", "both", "both"] * 2, ["first"] * 5]
)
@pytest.mark.parametrize("most_lines", [64, 5])
def test_an_event_of_a_batch_has_the_bytes_of_the_event_of_its_record(
    loop: list[str], most_lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paramwatch.tensorboard.curves.MOST_LINES", most_lines)
    rounds = rounds_of(loop)
    feed(events.EventFile(tmp_path), list(put_together(rounds))).close()
    # of a step that came in parts the last whole one stands; the last record here measures other rows once more
    records = one_by_one(rounds)[:-1]
    wanted = [event(each, Curves.of(each.inventory)) for each in records]

    found = curves_in(tmp_path)
    assert len(wanted) >= 4
    assert [payload for payload in wanted if payload not in found] == [wanted[-1]] * (rounds[-1].step == rounds[-2].step)


def test_one_step_of_a_batch_may_draw_other_curves_than_the_next(tmp_path: Path) -> None:
    net = inventory("a", "b")
    tensors = [{"param": {"a": [1.0], "b": [x]}, "grad": {"a": [x]}} for x in (1.0, np.nan, 0.0, np.inf, 2.0)]
    records = [record(i, net, each, stepped=["a", "b"]) for i, each in enumerate([tensors[0], *tensors])]
    feed(events.EventFile(tmp_path), [records[0], batch_of(records[1:])]).close()

    assert curves_in(tmp_path) == [event(each, Curves.of(net)) for each in records]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(5, 7), st.integers(0, 300), st.integers(1, 3))
def test_the_store_keeps_of_a_batch_what_its_schedule_keeps_and_what_would_vanish(
    sizes: list[int], base: int, first: int, stride: int
) -> None:
    net = inventory("a", "b")
    noise = random_record(0, net)
    numbers = range(first, first + 100 * stride, stride)
    # where the rows are not always the same, no two steps make a batch
    odd = np.array([True, False])
    records = [replace(noise, step=step, stepped=odd if step % 2 and stride > 1 else noise.stepped) for step in numbers]
    alike = [records[:1], records[1:]] if stride == 1 else [[each] for each in records]
    folder, schedule = MemoryFolder(), Schedule(1, 2**40, max_base=2**base)
    store = Store(folder, max_bytes=10**9)
    store.write(records[0])
    store.schedule = schedule
    for some in alike[1:]:
        feed(store, list(batches_of(some, sizes)))
    store.flush()

    kept, latest = [], dict.fromkeys(range(2), -(10**9))
    for each in records:
        stepped = np.flatnonzero(each.stepped).tolist()
        if schedule.keeps(each.step) or any(each.step - latest[row] >= schedule.stride(each.step) for row in stepped):
            kept.append(each.step)
            latest |= dict.fromkeys(stepped, each.step)
    assert [step for block in read(folder).blocks for step in block.step.tolist()] == kept


def test_a_batch_with_new_keys_or_types_opens_new_files_at_the_step_that_has_them() -> None:
    net = inventory("a")
    keys: list[dict[str, Any]] = [{}, {}, {"mine": 1}, {"mine": 2}, {"mine": 0.5}, {}]
    records = [random_record(i, net, skipped=False, **more) for i, more in enumerate(keys)]
    folders = MemoryFolder(), MemoryFolder()
    together = [*records[:2], batch_of(records[2:5]), records[5]]
    for folder, parts in zip(folders, (together, records), strict=True):
        feed(Store(folder, max_bytes=10**6, session="s"), parts).close()

    assert content(folders[0]) == content(folders[1])
    assert len(folders[0].names()) == 6


def test_the_batches_that_are_written_hold_as_many_steps_however_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramwatch.store.BATCH_STEPS", 4)
    net = inventory("a")
    same = [random_record(i, net) for i in range(23)]
    folders = MemoryFolder(), MemoryFolder()
    for folder, parts in zip(folders, (list(batches_of(same, [1, 9, 2])), same), strict=True):
        feed(Store(folder, max_bytes=10**6, session="s"), parts).close()

    assert content(folders[0]) == content(folders[1])


# ---- the rules ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(LOOPS, MOST)
def test_no_finding_is_lost_by_asking_of_some_records_only(loop: list[str], most: int) -> None:
    rounds = rounds_of(["both", *loop, "both", "both", "outside", "both"])

    def said(records: Sequence[Record]) -> list[Finding]:
        rules = [rule() for rule in RULES]
        return [finding for each in records for rule in rules for finding in rule(each)]

    asked = []
    for part in put_together(rounds, most):
        asked += [part.record(i) for i in worth_reading(part)] if isinstance(part, Batch) else [part]
    findings = said(one_by_one(rounds))
    # what a step that raised may have changed is unsure for as long as anything holds it
    assert findings or "raises" in loop
    assert said(asked) == findings
