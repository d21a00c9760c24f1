"""The ring that numbers travel to the host by: in what order, into which memory, and that nobody waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.measure import reading
from paramwatch.measure import ring as ring_module
from paramwatch.measure.ring import Cuda, Ring, Slot, end_to_end


class Landing:
    """A copy that is made when the clock says so, and not before."""

    def __init__(self, tensor: Tensor, to: Tensor) -> None:
        self.tensor, self.to = tensor, to
        self.done = False
        self.waited = False

    def land(self) -> None:
        if not self.done:
            self.to.copy_(self.tensor)
        self.done = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited = True
        self.land()


class Slow:
    """A transport whose copies land one at a time, in the order of the queue."""

    def __init__(self) -> None:
        self.under_way: list[Landing] = []
        self.rooms: list[int] = []
        self.packs = 0

    def room(self, size: int) -> Tensor:
        self.rooms.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    def queue(self, tensor: Tensor) -> str:
        return "default"

    def packed(self, tensors: Sequence[Tensor], queue: Any) -> Tensor:
        self.packs += 1
        return end_to_end(tensors)

    def copy(self, tensor: Tensor, to: Tensor, queue: Any) -> Landing:
        assert queue == "default"
        self.under_way.append(Landing(tensor.clone(), to))
        return self.under_way[-1]

    def tick(self) -> None:
        next(landing for landing in self.under_way if not landing.done).land()


def numbers(value: float, n: int = 3) -> Tensor:
    return torch.full((n, 2), value, dtype=torch.float64)


def send(ring: Ring, tensor: Tensor) -> Slot | None:
    return ring.send([tensor], ring.queue(tensor))


def got(slot: Slot) -> Array:
    """What `numbers` were sent."""
    return slot.numpy().view(np.float64).reshape(-1, 2)


def sent(ring: Ring, *values: float) -> list[Slot]:
    slots = [send(ring, numbers(value)) for value in values]
    assert None not in slots
    return [slot for slot in slots if slot is not None]


def test_a_slot_is_ready_when_its_copy_has_landed_and_not_before() -> None:
    slow = Slow()
    first, second = sent(Ring(transport=slow), 1, 2)

    assert not first.ready
    with pytest.raises(RuntimeError, match="not there yet"):
        first.numpy()
    slow.tick()
    assert first.ready
    assert not second.ready
    np.testing.assert_array_equal(got(first), numbers(1))


def test_when_all_slots_are_taken_a_tensor_waits_and_goes_when_one_is_released() -> None:
    slow = Slow()
    ring = Ring(slots=2, transport=slow)
    first, _, third = sent(ring, 1, 2, 3)
    slow.tick()
    slow.tick()

    assert len(slow.under_way) == 2
    assert not third.ready
    first.release()
    assert not third.ready  # on its way now
    slow.tick()
    np.testing.assert_array_equal(got(third), numbers(3))
    assert not first.ready


def test_those_that_wait_go_in_the_order_in_which_they_were_sent() -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    slots = sent(ring, 1, 2, 3)
    seen = []
    for slot in slots:
        assert not slots[-1].ready
        slow.tick()
        seen.append(got(slot)[0, 0])
        slot.release()

    assert seen == [1, 2, 3]
    assert slow.rooms == [48]


def test_a_later_one_does_not_overtake_what_waits() -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    first, second = sent(ring, 1, 2)
    slow.tick()
    first.release()
    (third,) = sent(ring, 3)

    assert [landing.tensor.view(torch.float64)[0].item() for landing in slow.under_way] == [1, 2]
    assert not second.ready
    assert not third.ready


def test_what_is_too_much_is_dropped_and_counted_and_the_rest_is_not_disturbed() -> None:
    slow = Slow()
    ring = Ring(slots=1, waiting=2, transport=slow)
    slots = [send(ring, numbers(value)) for value in range(5)]

    assert slots[3:] == [None, None]
    assert ring.dropped == 2
    for value, slot in enumerate(slots[:3]):
        assert slot is not None
        assert not slot.ready
        slow.tick()
        assert got(slot)[0, 0] == value
        slot.release()
    assert send(ring, numbers(9)) is not None


def test_waiting_for_one_that_has_no_slot_yet_takes_memory_for_it_alone() -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    first, second, third = sent(ring, 1, 2, 3)
    third.wait()

    np.testing.assert_array_equal(got(third), numbers(3))
    assert not second.ready
    third.release()
    first.wait()
    first.release()
    assert not second.ready
    second.wait()
    np.testing.assert_array_equal(got(second), numbers(2))
    assert len(slow.rooms) == 2


def test_nothing_but_wait_ever_waits() -> None:
    slow = Slow()
    ring = Ring(slots=2, waiting=1, transport=slow)
    for value in range(6):
        slot = send(ring, numbers(value))
        assert slot is None or not slot.ready

    assert not any(landing.waited for landing in slow.under_way)


def test_a_slot_grows_to_what_is_sent_and_keeps_its_size() -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    for n in (1, 5, 2, 5, 0):
        slot = send(ring, numbers(n, n))
        assert slot is not None
        slot.wait()
        np.testing.assert_array_equal(got(slot), numbers(n, n))
        slot.release()

    assert slow.rooms == [16, 80]


def test_a_slot_given_up_while_its_copy_is_under_way_is_not_used_before_it_has_landed() -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    (first,) = sent(ring, 1)
    first.release()
    (second,) = sent(ring, 2)

    assert len(slow.under_way) == 1
    slow.tick()
    assert not second.ready
    slow.tick()
    np.testing.assert_array_equal(got(second), numbers(2))


def test_one_given_up_while_it_waits_is_passed_over() -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    first, second, third = sent(ring, 1, 2, 3)
    second.release()
    slow.tick()
    first.release()

    assert not third.ready
    slow.tick()
    np.testing.assert_array_equal(got(third), numbers(3))


def test_while_it_waits_a_tensor_is_held_and_not_after() -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    sent(ring, 1)
    (second,) = sent(ring, 2)
    assert second._tensor is not None
    second.wait()

    assert second._tensor is None


# ---- a reading, which travels by it -----------------------------------------------------------


def reading_by(monkeypatch: pytest.MonkeyPatch, ring: Ring, *values: float) -> list[reading.Reading]:
    monkeypatch.setattr(reading, "ring_of", lambda device: ring)
    made = [reading.Reading([([0, 2], numbers(value, 2))], (3, 2)) for value in values]
    for each in made:
        reading.send([each])
    return made


def test_a_reading_frees_its_slot_when_it_is_there_and_never_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    first, second = reading_by(monkeypatch, Ring(slots=1, transport=slow), 1, 2)

    assert not first.ready
    slow.tick()
    assert first.ready
    assert not second.ready  # on its way now, in the memory of the first
    slow.tick()
    assert second.ready
    monkeypatch.setattr(Landing, "query", None)
    for found, value in ((first, 1), (second, 2)):
        np.testing.assert_array_equal(found.numpy(), [[value] * 2, [np.nan] * 2, [value] * 2])


def test_a_reading_can_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in reading_by(monkeypatch, Ring(slots=1, transport=Slow()), 1, 2, 3):
        found.wait()
        assert found.ready


def test_readings_travel_by_one_copy_each_with_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setattr(reading, "ring_of", lambda device: ring)
    ring = Ring(transport=slow)
    counts, odd = torch.arange(6).reshape(2, 3), torch.tensor([[np.nan, -0.0]]).double()
    first = reading.Reading([([0, 2], numbers(1, 2)), ([1], odd)], (3, 2))
    second = reading.Reading([(range(2), counts)], (2, 3))
    assert slow.under_way == []
    reading.send([first, second, first])

    assert len(slow.under_way) == slow.packs == 1
    assert not first.ready
    slow.tick()
    assert first.ready
    assert second.ready
    np.testing.assert_array_equal(first.numpy(), [[1, 1], [np.nan, -0.0], [1, 1]])
    assert np.signbit(first.numpy()[1, 1])
    np.testing.assert_array_equal(second.numpy(), counts)
    assert second.numpy().dtype == np.int64


def test_what_was_made_on_two_streams_is_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    ring = Ring(transport=slow)
    monkeypatch.setattr(reading, "ring_of", lambda device: ring)
    made = []
    for queue in ("default", "default", "side"):
        monkeypatch.setattr(slow, "queue", lambda tensor, queue=queue: queue)
        made.append(reading.Reading([(range(3), numbers(len(made)))], (3, 2)))
    packed: list[tuple[int, str]] = []
    monkeypatch.setattr(slow, "copy", lambda tensor, to, queue: (packed.append((tensor.numel(), queue)), Landing(tensor, to))[1])
    reading.send(made)

    assert packed == [(12, "default"), (6, "side")]


def test_a_reading_writes_to_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, block = Slow(), np.zeros((2, 3, 2))
    ring = Ring(transport=slow)
    monkeypatch.setattr(reading, "ring_of", lambda device: ring)
    found = reading.Reading([(range(3), numbers(7))], (3, 2), into=block[1])
    found.wait()

    assert found.numpy() is found.numpy()
    np.testing.assert_array_equal(block, [np.zeros((3, 2)), numbers(7)])


def test_while_a_graph_is_captured_nothing_is_sent_and_it_is_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    ring = Ring(transport=slow)
    monkeypatch.setattr(reading, "ring_of", lambda device: ring)
    found = reading.Reading([(range(3), numbers(7))], (3, 2))
    monkeypatch.setattr(reading, "capturing", lambda: True)
    reading.send([found])
    assert not found.ready
    assert slow.packs == 0
    monkeypatch.setattr(reading, "capturing", lambda: False)
    assert not found.ready
    assert slow.packs == 1


def test_what_was_dropped_is_null_and_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    ring = Ring(slots=1, waiting=1, transport=slow)
    *_, third, fourth = reading_by(monkeypatch, ring, 1, 2, 3, 4)

    assert third.ready
    assert fourth.ready
    assert np.isnan(third.numpy()).all()
    assert ring.dropped == 2
    assert len(caplog.records) == 1
    assert "so far behind that measurements there are dropped" in caplog.text


def test_a_reading_that_nobody_comes_for_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    reading_by(monkeypatch, ring, 1)
    slow.tick()
    (second,) = reading_by(monkeypatch, ring, 2)
    slow.tick()

    assert second.ready


def test_while_a_graph_is_captured_no_event_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    (found,) = reading_by(monkeypatch, Ring(transport=slow), 1)
    slow.tick()
    monkeypatch.setattr(ring_module, "capturing", lambda: True)
    assert not found.ready
    monkeypatch.setattr(ring_module, "capturing", lambda: False)
    assert found.ready


def test_while_a_graph_is_captured_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    ring = Ring(slots=1, transport=slow)
    first, second = send(ring, numbers(1)), send(ring, numbers(0))
    assert first is not None
    assert second is not None
    slow.tick()
    assert first.ready
    monkeypatch.setattr(ring_module, "capturing", lambda: True)
    first.release()
    assert not second.ready
    assert second._room is None
    monkeypatch.setattr(ring_module, "capturing", lambda: False)
    ring.advance()
    assert second._room is not None


# ---- on a device ------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_device_numbers_arrive_as_they_were_when_sent() -> None:
    ring = Ring(slots=2, waiting=3, transport=Cuda())
    x = torch.zeros(1000, 11, dtype=torch.float64, device="cuda")
    slots = []
    for value in range(5):
        torch.cuda._sleep(1_000_000)
        slots.append(send(ring, x + value))
    assert ring.dropped == 0
    for value, slot in enumerate(slots):
        assert slot is not None
        slot.wait()
        assert (slot.numpy().view(np.float64) == value).all()
        slot.release()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_device_sending_and_asking_never_wait() -> None:
    ring = Ring(slots=2, waiting=2)
    x = torch.ones(100, 11, dtype=torch.float64, device="cuda")
    for slot in [send(ring, x), send(ring, x)]:
        assert slot is not None
        slot.wait()
        slot.release()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        slots = [send(ring, x) for _ in range(6)]
        assert [slot is None or slot.ready for slot in slots] == [False] * 4 + [True] * 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
