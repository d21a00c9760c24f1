"""The quick way through a step of a model on a GPU: what it queues, and that it gives the records of the general way.

Tensors on the CPU stand in for those on a device. What the kernels find is in test_gpu.py, and a device in test_gpu_watched.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dispatched import Dispatched
from planned import WAYS, as_if_on_a_gpu, failing, trained
from torch import Tensor, nn

import paramwatch
from paramwatch import deviceplan
from paramwatch.deviceplan import DevicePlan, FoldedOnDevice, Located
from paramwatch.measure import capture, tables
from paramwatch.plan import ENTERED
from paramwatch.testing import ListSink


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that were launched, by name. Memory for copies is the same at each step, as the allocator of a device mostly has it."""
    room, rooms = DevicePlan.room, dict[DevicePlan, Tensor]()
    monkeypatch.setattr(DevicePlan, "room", lambda self: rooms.setdefault(self, room(self)))
    with as_if_on_a_gpu() as launched:
        yield launched


SETTLED = 11
"""Steps after which some go the quick way in a row: at powers of two the model is read anew, and the next step makes a plan."""


class Still(torch.optim.Optimizer):
    """Does nothing: nothing that is dispatched in its steps is its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it gives no loss
        """Nothing."""


def model(rows: int) -> tuple[nn.ParameterList, Still]:
    net = nn.ParameterList([nn.Parameter(torch.ones(3 + i)) for i in range(rows)])
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return net, Still(net.parameters())


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tables that were sent to the device."""
    sizes: list[int] = []
    send = tables._sent
    monkeypatch.setattr(tables, "_sent", lambda device, numbers: (sizes.append(len(numbers)), send(device, numbers))[1])
    return sizes


def test_what_a_step_queues_does_not_depend_on_the_number_of_rows(launched: list[str], sent: list[int]) -> None:
    found = []
    for rows in (3, 400):
        net, optimizer = model(rows)
        with paramwatch.attach(net, update="exact"):
            for _ in range(SETTLED):
                optimizer.step()
            launched.clear()
            sent.clear()
            with Dispatched() as dispatched:
                optimizer.step()
            found.append((dispatched.names, [*launched], [*sent]))

    assert found[0] == found[1]
    _, launches, tables_sent = found[0]
    assert len(dispatched) <= 14
    assert launches == ["measure_chunks", "fold"] * 2 + ["measure_updates", "fold"]
    assert tables_sent == []


def test_a_step_that_is_scaled_queues_as_little(launched: list[str]) -> None:
    found = []
    for rows in (3, 400):
        net, optimizer = model(rows)
        with paramwatch.attach(net, update="exact"):
            for _ in range(SETTLED + 1):
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)  # type: ignore[attr-defined]  # as a scaler
                with Dispatched() as dispatched:
                    optimizer.step()
            found.append(dispatched.names)

    assert found[0] == found[1]
    assert len(dispatched) <= 28


def test_only_the_table_of_what_has_moved_is_sent_again(launched: list[str], sent: list[int]) -> None:
    net, optimizer = model(5)
    with paramwatch.attach(net, update="exact"):
        for _ in range(SETTLED):
            optimizer.step()
        sent.clear()
        kept = net[2].grad
        net[2].grad = torch.ones(5)
        optimizer.step()
        assert sent == [5]
        net[2].grad = kept
        optimizer.step()
        optimizer.step()

    assert sent == [5]  # that one was known


@pytest.mark.parametrize("begun", ["before the gradients", "after them"])
def test_what_was_entered_before_a_graph_is_captured_queues_nothing_into_it(
    launched: list[str], monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    net, optimizer = model(3)
    sink = ListSink()
    with paramwatch.attach(net, update="exact", sinks=[sink]) as watch:
        for _ in range(SETTLED):
            optimizer.step()
        token = watch.recorder.begin(optimizer)
        assert token is not None
        if begun == "after them":
            watch.recorder.gradients(token, optimizer, evaluation=False)
        monkeypatch.setattr(capture, "capturing", lambda: True)
        launched.clear()
        with Dispatched() as dispatched:
            if begun == "before the gradients":
                watch.recorder.gradients(token, optimizer, evaluation=True)
            watch.recorder.end(token)
        monkeypatch.setattr(capture, "capturing", bool)
        assert (launched, dispatched.names) == ([], [])
        optimizer.step()

    assert [record.step for record in sink.records] == [*range(SETTLED), SETTLED + 1]


def test_a_row_whose_memory_was_taken_away_is_not_read(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    located = Located([torch.ones(4), torch.ones(9)])
    there, gone = [torch.ones(4), torch.ones(9)], torch.ones(9)
    gone.untyped_storage().resize_(0)

    assert located.find(there)
    assert not located.find([there[0], gone])
    assert located.addresses == [x.data_ptr() for x in there]


def test_where_memory_is_short_a_step_goes_the_general_way(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = model(3)
    sink, plans = ListSink(), []
    enter = DevicePlan.enter

    def out_of_memory(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    def short(self: DevicePlan, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "full", out_of_memory)
            plans.append(enter(self, *args))
        return plans[-1]

    with paramwatch.attach(net, sinks=[sink], update="exact"):
        for _ in range(6):
            optimizer.step()
        monkeypatch.setattr(DevicePlan, "enter", short)
        optimizer.step()
        monkeypatch.setattr(DevicePlan, "enter", enter)
        optimizer.step()

    assert plans == [None]
    assert [record.step for record in sink.records] == list(range(8))


def test_the_numbers_of_a_step_lie_where_those_of_a_step_on_the_cpu_do(launched: list[str]) -> None:
    net, optimizer = model(2)
    watch = paramwatch.attach(net, update="exact")
    for _ in range(7):
        optimizer.step()
    plan = watch.recorder._plans.of(optimizer)
    assert isinstance(plan, DevicePlan)
    folded = plan.enter(list(net.parameters()), with_grads=True)
    assert folded is not None
    folded._numbers[ENTERED] = 7.0  # type: ignore[attr-defined]  # a step on a device has them
    assert folded.end(optimizer, list(net.parameters()))
    watch.close()

    assert folded.on_way is not None
    assert folded.on_way.ready
    assert (folded.block[folded.position, ENTERED] == 7).all()
    assert (folded.reading(ENTERED).numpy() == 7).all()


@pytest.mark.parametrize("way", WAYS)
def test_the_quick_way_through_a_step_gives_the_records_of_the_general_one(way: str) -> None:
    (found, ended), (expected, none) = trained(way, True), trained(way, False)

    assert (ended, none) == (WAYS[way][2], 0)
    assert len(found) == len(expected) == 8
    for (values, *rest), (known, *others) in zip(found, expected, strict=True):
        for part, array in known.items():
            np.testing.assert_array_equal(values[part], array, part)
        for one, other in zip(rest, others, strict=True):
            np.testing.assert_equal(one, other)


def test_where_the_kernels_fail_in_a_step_it_is_measured_in_plain_torch() -> None:
    found, expected = failing(True), failing(False)

    assert len(found) == len(expected) == 8
    for (values, *_), (known, *_) in zip(found, expected, strict=True):
        for part, array in known.items():
            np.testing.assert_array_equal(values[part], array, part)


def test_a_step_that_goes_on_in_another_stream_waits_for_the_first_one_and_keeps_its_memory(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, optimizer = model(2)
    followed: list[Any] = []
    monkeypatch.setattr(deviceplan, "follow", lambda *given: followed.append(given))
    with paramwatch.attach(net, update="exact") as watch:
        for _ in range(SETTLED):
            optimizer.step()
        plan = watch.recorder._plans.of(optimizer)
        assert isinstance(plan, DevicePlan)
        for streams in ("AAA", "ABB", "AAB"):
            stream = iter(streams)
            monkeypatch.setattr(deviceplan, "stream_now", lambda device, stream=stream: next(stream))
            folded = plan.enter(list(net.parameters()))
            assert isinstance(folded, FoldedOnDevice)
            numbers, copies = folded._numbers, folded._copies
            assert folded.see([p.grad for p in net.parameters()])
            assert folded.end(optimizer, list(net.parameters()))
            monkeypatch.setattr(deviceplan, "stream_now", lambda device: None)

    assert [(stream, earlier) for stream, earlier, _ in followed] == [("B", "A")] * 2
    assert [id(x) for x in followed[-1][2]] == [id(numbers), id(copies)]


def test_gradients_that_are_elsewhere_are_not_measured_here(launched: list[str]) -> None:
    net, optimizer = model(2)
    with paramwatch.attach(net, update="exact") as watch:
        for _ in range(SETTLED):
            optimizer.step()
        plan = watch.recorder._plans.of(optimizer)
        assert isinstance(plan, DevicePlan)
        grads = [p.grad for p in net.parameters()]
        assert plan.grads_of(grads) is not None
        other = DevicePlan(optimizer, {str(i): p for i, p in enumerate(net)}, watch._live, True, True)
        other.device = torch.device("meta")

    assert other.grads_of(grads) is None
