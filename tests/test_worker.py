"""The background thread: when it works, in which order, what it holds, and what becomes of it when a sink fails or hangs."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from loops import mlp, sgd
from recorded import fresh, one_by_one, rounds_of
from torch import nn

import paramwatch
from paramwatch import Record, worker
from paramwatch.batch import Batch, BatchSink
from paramwatch.guard import Guard
from paramwatch.record import Finding, Sink
from paramwatch.rounds import Round
from paramwatch.rules import RULES
from paramwatch.testing import ListSink
from paramwatch.worker import Worker

pytestmark = pytest.mark.usefixtures("nothing_open")


@pytest.fixture(scope="module")
def rounds() -> list[Round]:
    """Forty of one form, with one at number 20 that has a NaN."""
    return rounds_of(["both"] * 20 + ["nan"] + ["both"] * 19)


def working(*sinks: Sink, said: list[Finding] | None = None) -> Worker:
    report = [] if said is None else said
    return Worker(sinks, [rule() for rule in RULES], report.extend, Guard("", lambda: None))


def submit(to: Worker, rounds: Sequence[Round]) -> None:
    for done in fresh(rounds):
        to.submit(done, "exact")


class Batches(BatchSink):
    """A sink of our own that keeps what it is given, as it is given."""

    def __init__(self) -> None:
        self.given: list[Record | Batch] = []

    def write(self, record: Record) -> None:
        self.given.append(record)

    def write_batch(self, batch: Batch) -> None:
        self.given.append(batch)

    def close(self) -> None:
        pass


class Stuck(ListSink):
    """Hangs at its first record until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.free = threading.Event(), threading.Event()

    def write(self, record: Record) -> None:
        super().write(record)
        self.entered.set()
        assert self.free.wait(timeout=60)


# ---- when it works ------------------------------------------------------------------------------


def test_rounds_wait_without_waking_the_thread_and_are_looked_for_by_itself(rounds: list[Round]) -> None:
    sink = ListSink()
    thread = working(sink)
    time.sleep(0.01)
    submit(thread, rounds)
    at_once, rung = len(sink.records), thread._rung
    until = time.monotonic() + 10
    while len(sink.records) < len(rounds) and time.monotonic() < until:
        time.sleep(0.01)
    thread.stop(wait=True)

    assert (at_once, rung) == (0, False)
    assert len(sink.records) == len(rounds)


@pytest.mark.parametrize("limit", ["MANY", "MANY_BYTES"])
def test_many_rounds_wake_it(limit: str, rounds: list[Round], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, limit, 10)
    monkeypatch.setattr(worker, "PERIOD_SECONDS", 600.0)
    sink = ListSink()
    thread = working(sink)
    submit(thread, rounds)
    until = time.monotonic() + 10
    while not sink.records and time.monotonic() < until:
        time.sleep(0.001)
    thread.stop(wait=True)

    assert len(sink.records) == len(rounds)


def test_after_it_was_closed_a_sink_is_not_asked_what_has_waited_too_long(rounds: list[Round], monkeypatch: pytest.MonkeyPatch) -> None:
    class Buffering(ListSink):
        asked = asked_late = 0
        closed = False

        def tick(self) -> None:
            self.asked += 1
            self.asked_late += self.closed

        def close(self) -> None:
            super().close()
            self.closed = True

    monkeypatch.setattr(worker, "PERIOD_SECONDS", 0.0)
    sink = Buffering()
    thread = working(sink)
    submit(thread, rounds)
    thread.stop(wait=True)

    assert sink.closed
    assert sink.asked
    assert not sink.asked_late


def test_handing_over_in_the_middle_of_handing_over_is_safe(rounds: list[Round]) -> None:
    """The collector may close a Watch of a model that is gone at any allocation, also one that the thread or `submit` makes."""
    thread, done = working(ListSink()), []

    class Gone:
        def __del__(self) -> None:
            thread.later(lambda: done.append(1))

    gc.set_threshold(1)
    try:
        for one in fresh(rounds):
            circle = [Gone()]
            circle.append(circle)  # type: ignore[arg-type]
            del circle
            thread.submit(one, "exact")
            thread.later(lambda: None)
    finally:
        gc.set_threshold(700)
    gc.collect()
    thread.stop(wait=True)

    assert len(done) == len(rounds)


def test_what_is_called_runs_after_what_was_handed_over_before_and_before_what_comes_later(rounds: list[Round]) -> None:
    sink, seen = ListSink(), []
    thread = working(sink)
    submit(thread, rounds[:10])
    thread.call(lambda: seen.append(len(sink.records)))
    last = thread.last
    submit(thread, rounds[10:15])
    thread.later(lambda: seen.append(len(sink.records)))
    submit(thread, rounds[15:])
    thread.stop(wait=True)

    assert seen == [10, 15]
    assert last is not None
    assert last.step == sink.records[9].step
    assert len(sink.records) == len(rounds)


# ---- what it hands on ---------------------------------------------------------------------------


def test_a_users_sink_gets_records_one_by_one_and_one_of_ours_gets_batches(rounds: list[Round]) -> None:
    plain, ours = ListSink(), Batches()
    thread = working(plain, ours)
    submit(thread, rounds)
    thread.stop(wait=True)

    wanted = one_by_one(rounds)
    assert [each.step for each in plain.records] == [each.step for each in wanted]
    assert [each.steps for each in plain.records] == [each.steps for each in wanted]
    sizes = [len(each) for each in ours.given if isinstance(each, Batch)]
    assert max(sizes) > 5
    assert sum(sizes) + sum(isinstance(each, Record) for each in ours.given) == len(wanted)


def test_findings_are_those_of_each_record_in_order_and_come_before_their_record_is_written(rounds: list[Round]) -> None:
    said: list[Finding] = []
    when: list[int] = []

    class Sees(ListSink):
        def write(self, record: Record) -> None:
            super().write(record)
            when.append(len(said))

    sink = Sees()
    thread = working(sink, said=said)
    submit(thread, rounds)
    thread.stop(wait=True)

    rules = [rule() for rule in RULES]
    assert said == [finding for each in one_by_one(rounds) for rule in rules for finding in rule(each)]
    (finding,) = said
    assert finding.step == 20
    assert when[[each.step for each in sink.records].index(20)] == 1


class Failing(ListSink):
    def write(self, record: Record) -> None:
        super().write(record)
        if record.step == 27:
            raise OSError("no space left")


def test_a_sink_that_fails_in_the_middle_of_a_batch_gets_no_more_and_is_named_with_the_step(
    rounds: list[Round], caplog: pytest.LogCaptureFixture
) -> None:
    failing, sound, ours = Failing(), ListSink(), Batches()
    thread = working(failing, sound, ours)
    submit(thread, rounds)
    thread.stop(wait=True)

    assert any(isinstance(each, Batch) and each.step[0] < 27 < each.step[-1] for each in ours.given)
    assert failing.records[-1].step == 27
    assert len(sound.records) == len(rounds)
    assert [entry.message for entry in caplog.records if "Failing" in entry.message] == [
        "paramwatch failed while writing step 27 to Failing (OSError: no space left). "
        "Failing is switched off; recording and training go on."
    ]


def test_one_of_ours_that_fails_at_a_batch_is_switched_off_and_the_others_go_on(
    rounds: list[Round], caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Batches):
        def write_batch(self, batch: Batch) -> None:
            super().write_batch(batch)
            raise OSError("no space left")

    full, sound = Full(), ListSink()
    thread = working(full, sound)
    submit(thread, rounds)
    thread.stop(wait=True)

    assert sum(isinstance(each, Batch) for each in full.given) == 1
    assert len(sound.records) == len(rounds)
    assert caplog.text.count("to Full (OSError: no space left). Full is switched off") == 1


def test_a_failure_of_ours_in_a_batch_costs_that_batch_alone(
    rounds: list[Round], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink, batch, failed = ListSink(), worker.Batching.batch, []

    def once(*args: object) -> Batch:
        if not failed:
            failed.append(len(args[1]))  # type: ignore[arg-type]
            raise ZeroDivisionError("ours")
        return batch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.Batching, "batch", once)
    thread = working(sink)
    submit(thread, rounds)
    thread.stop(wait=True)

    assert len(sink.records) == len(rounds) - failed[0]
    assert caplog.text.count("ZeroDivisionError: ours") == 2, "the message, and the traceback below"


# ---- memory ---------------------------------------------------------------------------------------


def test_training_waits_for_a_thread_that_is_behind(rounds: list[Round], monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(ListSink):
        def write(self, record: Record) -> None:
            time.sleep(0.002)
            super().write(record)

    monkeypatch.setattr(worker, "FULL", 16)
    monkeypatch.setattr(worker, "MANY", 8)
    monkeypatch.setattr(worker, "MOST", 4)
    thread, most = working(Slow()), 0
    for done in fresh(rounds):
        thread.submit(done, "exact")
        most = max(most, len(thread._waiting))
    thread.stop(wait=True)

    assert 8 <= most <= 16


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FULL": 16, "MANY": 1, "STUCK_SECONDS": 0.3, "PATIENCE_SECONDS": 0.3}.items():
        monkeypatch.setattr(worker, name, value)


@pytest.mark.usefixtures("impatient")
def test_a_sink_that_hangs_is_passed_over_by_name_until_it_returns_and_the_others_get_all(
    rounds: list[Round], caplog: pytest.LogCaptureFixture
) -> None:
    stuck, sound = Stuck(), ListSink()
    thread, most = working(stuck, sound), 0
    started = time.monotonic()
    for done in fresh(rounds)[:35]:
        thread.submit(done, "exact")
        most = max(most, len(thread._waiting))
    took = time.monotonic() - started
    thread.flush()
    got = len(sound.records)
    stuck.free.set()
    until = time.monotonic() + 10
    while thread._outlets[2]._call and time.monotonic() < until:
        time.sleep(0.001)
    for done in fresh(rounds)[35:]:
        thread.submit(done, "exact")
    thread.stop(wait=True)

    assert 0.3 <= took < 4.0, "once, not at every step"
    assert most <= 16
    assert got == 35
    assert [each.step for each in sound.records] == [done.step for done in rounds]
    assert [each.step for each in stuck.records] == [rounds[0].step, *(done.step for done in rounds[35:])]
    said = [entry.message for entry in caplog.records if "Stuck" in entry.message]
    assert len(said) == 2
    assert "writing step 0 to Stuck has taken more than 0.3 s and goes on. Stuck is passed over until it is done" in said[0]
    assert "Stuck was not given 34 records, while it was passed over." in said[1]


@pytest.mark.usefixtures("impatient")
def test_what_a_thread_that_does_not_get_on_cannot_take_is_dropped_counted_and_said(
    rounds: list[Round], caplog: pytest.LogCaptureFixture
) -> None:
    free, sink = threading.Event(), ListSink()

    def rule(record: Record) -> list[Finding]:
        assert free.wait(timeout=60)
        return []

    thread = Worker([sink], [rule], lambda said: None, Guard("", lambda: None))
    submit(thread, rounds[:1])
    time.sleep(0.3)
    submit(thread, rounds[1:])
    held = len(thread._waiting) + len(thread._rounds)
    thread.call(lambda: None)
    free.set()
    thread.stop(wait=True)

    assert held <= 17
    assert thread.dropped == len(rounds) - held > 0
    assert len(sink.records) == held
    assert caplog.text.count("is not recorded, and others will not be; training goes on") == 1
    assert f"{thread.dropped} records were dropped" in caplog.text


def test_for_a_slow_disk_training_waits_once_and_what_is_too_much_is_dropped_and_counted(
    rounds: list[Round], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class SlowDisk(ListSink):
        def write(self, record: Record) -> None:
            time.sleep(0.1)
            super().write(record)

    for name, value in {"FULL": 16, "MANY": 1, "SLOW_SECONDS": 0.2, "STUCK_SECONDS": 30.0}.items():
        monkeypatch.setattr(worker, name, value)
    sink, waits = SlowDisk(), list[bool]()
    thread = working(sink)
    waiting = thread._wait_until

    def waited(*asked: Any) -> bool:
        waits.append(waiting(*asked))
        return waits[-1]

    monkeypatch.setattr(thread, "_wait_until", waited)
    submit(thread, rounds)
    in_vain = waits.count(False)
    thread.stop(wait=True)

    assert in_vain == 1
    assert thread.dropped > 1
    assert len(sink.records) == len(rounds) - thread.dropped
    assert caplog.text.count("not fast enough (a slow disk?)") == 1


@pytest.mark.usefixtures("impatient")
def test_a_watch_can_be_read_and_closed_while_a_sink_hangs() -> None:
    net, stuck = mlp(), Stuck()
    optimizer, watch = sgd(net), paramwatch.attach(net, sinks=[stuck])
    for param in net.parameters():
        param.grad = param.detach().clone()
    for _ in range(50):
        optimizer.step()
    read = watch.frame("grad_norm")
    optimizer.step()
    watch.close()
    closed = watch.frame("grad_norm")
    stuck.free.set()

    assert list(read.index) == list(range(50))
    assert list(closed.index) == list(range(51))


def test_nothing_of_a_model_is_held_by_what_waits() -> None:
    net: nn.Module = mlp()
    optimizer, stuck = sgd(net), Stuck()
    watch = paramwatch.attach(net, sinks=[stuck])
    for param in net.parameters():
        param.grad = param.detach().clone()
    for _ in range(5):
        optimizer.step()
    assert stuck.entered.wait(timeout=10)
    del net, optimizer, param
    gc.collect()
    gone = watch.watched() is None
    stuck.free.set()
    watch.flush()

    assert gone
    assert len(stuck.records) == 5


# ---- its end ----------------------------------------------------------------------------------------


def test_after_it_was_stopped_nothing_waits_for_it(rounds: list[Round]) -> None:
    thread = working(ListSink())
    thread.stop(wait=True)
    submit(thread, rounds)
    thread.flush()
    thread.call(lambda: None)
    thread.stop(wait=True)

    assert not thread._thread.is_alive()
