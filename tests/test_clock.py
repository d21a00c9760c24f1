"""What watching took of a GPU, by events that only pretend: from where to where, that nobody waits, and what is recorded."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from records import inventory
from torch import nn

import paramwatch
from paramwatch import clock
from paramwatch.clock import Clock, Spent
from paramwatch.measure import capture
from paramwatch.testing import ListSink

now = 0.0
"""Milliseconds, as the device has them; everything up to `done` has been done."""
done = 0.0


class Event:
    """An event of a device whose clock is told what time it is."""

    made = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        Event.made += 1
        self.at = -1.0

    def record(self, stream: Any) -> None:
        global now
        now += 1
        self.at = now

    def query(self) -> bool:
        return self.at <= done

    def synchronize(self) -> None:
        global done
        done = max(done, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query()
        return end.at - self.at


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are said to be on a GPU, and its events are these."""
    global now, done
    now = done = 0.0
    Event.made = 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)


def on_gpu() -> Any:
    rows = inventory("a", "b")
    for row in rows.rows:
        object.__setattr__(row, "device", "cuda:1")
    return rows


def on_device(watch: paramwatch.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its rows were there."""
    events = clock.Events(torch.device("cuda", 0))
    monkeypatch.setattr(watch.recorder._clock, "_events", events)
    monkeypatch.setattr(watch.recorder._clock, "start", partial(clock._started, events))
    monkeypatch.setattr(Clock, "look", lambda self: None)


def test_what_lies_between_two_events_is_known_when_the_second_has_come_and_events_are_used_again() -> None:
    global done
    rows, spent = on_gpu(), Spent()
    timer = Clock(SimpleNamespace(current=rows))  # type: ignore[arg-type]  # all that is asked
    for to in (None, spent):
        timer.stop(timer.start(), to)
    assert not spent.ready
    done = 3
    assert not spent.ready
    assert spent.device_us is not None or spent.spans
    done = 4
    assert spent.ready

    assert spent.device_us == 2000
    timer.stop(timer.start(), Spent())
    assert Event.made == 4


def test_they_can_be_waited_for() -> None:
    rows, spent = on_gpu(), Spent()
    timer = Clock(SimpleNamespace(current=rows))  # type: ignore[arg-type]  # all that is asked
    timer.stop(timer.start(), spent)
    spent.wait()

    assert spent.device_us == 1000


def test_while_a_graph_is_captured_no_event_is_recorded_or_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, spent = on_gpu(), Spent()
    timer = Clock(SimpleNamespace(current=rows))  # type: ignore[arg-type]  # all that is asked
    timer.stop(timer.start(), spent)
    monkeypatch.setattr(clock, "capturing", lambda: True)
    monkeypatch.setattr(Event, "query", None)
    timer.stop(timer.start(), spent)

    assert not spent.ready
    assert (now, len(spent.spans)) == (2, 1)


def test_without_a_gpu_it_is_the_time_of_the_training_thread() -> None:
    rows, spent = inventory("a"), Spent()
    timer = Clock(SimpleNamespace(current=rows))  # type: ignore[arg-type]  # all that is asked
    timer.stop(timer.start(), spent)

    assert spent.ready
    assert spent.device_us is None
    assert spent.host_us > 0
    assert Event.made == 0


def test_a_step_records_both_and_is_handed_over_when_the_last_event_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    global done
    net, sink = nn.Linear(2, 1), ListSink()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = paramwatch.attach(net, sinks=[sink])
    on_device(watch, monkeypatch)
    for _ in range(3):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert len(watch._handover._waiting) == 3
    done = 100
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    waiting = len(watch._handover._waiting)
    watch.close()

    assert waiting == 0
    assert [record.steps["overhead_us"] % 1000 for record in sink.records] == [0] * 4
    assert all(1000 <= record.steps["overhead_us"] <= 3000 for record in sink.records)
    assert all(0 < record.steps["overhead_host_us"] < 1e6 for record in sink.records)


def test_a_flush_while_a_graph_is_captured_waits_for_nothing_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    global done
    capture._say_unread.cache_clear()
    net, sink = nn.Linear(2, 1), ListSink()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, sinks=[sink]) as watch:
        on_device(watch, monkeypatch)
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        with monkeypatch.context() as captured:
            for module in (capture, clock):
                captured.setattr(module, "capturing", lambda: True)
            captured.setattr(Event, "synchronize", None)
            watch.flush()
            watch.flush()
            assert not sink.records
        done = 100
        watch.flush()
        assert len(sink.records) == 1
    assert len([line for line in caplog.messages if "nobody can wait for the device" in line]) == 1


def test_no_time_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class CallsOnce(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it gives no loss
            if not self.state:
                self.state["called"] = closure()

    # a microsecond passes whenever the clock is asked, and at no other time
    asked = itertools.count(step=1000)
    monkeypatch.setattr(clock, "perf_counter_ns", lambda: next(asked))
    net, sink = nn.Linear(2, 1), ListSink()
    optimizer = CallsOnce(net.parameters(), lr=0.1)
    with paramwatch.attach(net, sinks=[sink]) as watch:
        for _ in range(2):
            optimizer.step(lambda: net(torch.ones(1, 2)).sum().backward())
        watch.recorder.skipped(optimizer)

    assert len(sink.records) == 3
    assert sum(record.steps["overhead_us"] for record in sink.records) == next(asked) / 1000 / 2
