"""Numbers on their way from a device to the host: a ring of pinned slots that nobody waits for.

The training thread sends a tensor, which queues one copy and one event, and asks a slot later whether it is there. When all slots are taken
the tensor stays on its device until one is free again; when too many stay there, the newest is dropped and counted. A slot that is there
may be read and released by any thread; all else belongs to the training thread, which alone knows that no CUDA graph is being captured:
while one is, no event may be asked.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from paramwatch.columns import Array
from paramwatch.guard import logger
from paramwatch.measure.capture import capturing

SLOTS, WAITING = 32, 96
"""By default: a step is sent by one copy, and a GPU may be some steps behind. Slots are made when they are needed."""


class Mark(Protocol):
    """What tells that a copy has been made, as `torch.cuda.Event` does."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Transport(Protocol):
    """How tensors get from a device to the host."""

    def room(self, size: int) -> Tensor:
        """Bytes on the host that a device can write to by itself."""

    def queue(self, tensor: Tensor) -> Any:
        """Where work on a tensor is queued at this moment."""

    def packed(self, tensors: Sequence[Tensor], queue: Any) -> Tensor:
        """Tensors of 8 bytes an element end to end, as one of int64, behind all that is in a queue."""

    def copy(self, tensor: Tensor, to: Tensor, queue: Any) -> Mark:
        """Queue a copy behind all that is in a queue."""


class Cuda:
    """Pinned memory, streams and events."""

    def room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def queue(self, tensor: Tensor) -> torch.cuda.Stream:
        return torch.cuda.current_stream(tensor.device)

    def packed(self, tensors: Sequence[Tensor], queue: torch.cuda.Stream) -> Tensor:
        with torch.cuda.stream(queue):
            return end_to_end(tensors)

    def copy(self, tensor: Tensor, to: Tensor, queue: torch.cuda.Stream) -> Mark:
        with torch.cuda.stream(queue):
            to.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record(queue)
        return event


def end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of int64: as such, no bit of a number that is none is changed on the way."""
    flat = [tensor.reshape(-1).view(torch.int64) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


class _Room:
    """Memory of one slot, and the mark of the last copy to it."""

    __slots__ = ("host", "mark", "of_ring")

    def __init__(self, host: Tensor, of_ring: bool = True) -> None:
        self.host = host
        self.of_ring = of_ring
        self.mark: Mark | None = None

    @property
    def idle(self) -> bool:
        # asked once only after it was so: who comes later need not be a thread that may ask
        if self.mark is not None and not capturing() and self.mark.query():
            self.mark = None
        return self.mark is None


class Slot:
    """What was sent by one copy."""

    __slots__ = ("_queue", "_ring", "_room", "_tensor", "_view")

    def __init__(self, ring: Ring, tensor: Tensor, queue: Any) -> None:
        self._ring = ring
        self._tensor: Tensor | None = tensor
        self._queue = queue
        self._room: _Room | None = None
        self._view: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether `numpy` may be called. Never waits."""
        if self._tensor is not None:
            self._ring.advance()
        return self._room is not None and self._room.idle

    def numpy(self) -> Array:
        """The numbers, in memory of the slot: they are gone when it has been released."""
        if not self.ready:
            raise RuntimeError("the numbers are not there yet")
        assert self._view is not None
        return self._view.numpy()

    def wait(self) -> None:
        """Block until `ready`: for flush and close only."""
        if self._tensor is not None:
            self._ring.hurry(self)
        if self._room is not None and self._room.mark is not None:
            self._room.mark.synchronize()

    def release(self) -> None:
        """Done with it; or no longer interested, which only the training thread may say before it is ready."""
        room, self._room, self._tensor, self._view = self._room, None, None, None
        if room is not None:
            self._ring.give_back(room)

    def __del__(self) -> None:
        # a step that was left by an exception: nobody will come for its numbers, and slots are few
        self.release()

    def _fill(self, room: _Room, transport: Transport) -> None:
        tensor = self._tensor
        assert tensor is not None
        self._view = room.host[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        room.mark = transport.copy(tensor, self._view, self._queue)
        # the memory is not given to work on another stream, and work on this one comes after the copy
        self._room, self._tensor = room, None


class Ring:
    """A number of slots, and what happens when all are taken.

    Args:
        slots: Copies that may be under way or unread at a time.
        waiting: Tensors that may stay on their device beyond that.
        transport: How they travel.
    """

    def __init__(self, slots: int = SLOTS, waiting: int = WAITING, transport: Transport | None = None) -> None:
        self.dropped = 0
        self._transport = Cuda() if transport is None else transport
        self._unmade = slots
        self._free: deque[_Room] = deque()
        self._waiting: deque[Slot] = deque()
        self._most = waiting
        # several Watches share a ring, and each has its own threads and lock
        self._lock = threading.RLock()

    def queue(self, tensor: Tensor) -> Any:
        """Where work on a tensor is queued at this moment."""
        return self._transport.queue(tensor)

    def send(self, tensors: Sequence[Tensor], queue: Any) -> Slot | None:
        """Start tensors on their way, as one vector of int64. None if they were dropped: too many are waiting already.

        Args:
            tensors: On one device, of 8 bytes an element, and not written to again: they may be copied only later.
            queue: Where they were made.
        """
        with self._lock:
            return self._send(self._transport.packed(tensors, queue), queue)

    def _send(self, tensor: Tensor, queue: Any) -> Slot | None:
        slot = Slot(self, tensor, queue)
        self._waiting.append(slot)
        self.advance()
        if len(self._waiting) > self._most:
            self._waiting.pop()
            self.dropped += 1
            if self.dropped == 1:
                said = "paramwatch: %s is so far behind that measurements there are dropped, and null in the records (%d copies wait)"
                logger.warning(said, tensor.device, len(self._waiting))
            return None
        return slot

    def advance(self) -> None:
        """Queue the copies of those that wait, in their order, as far as slots are free."""
        # what is queued during a capture would be done at each replay, and pinned memory cannot be had
        if capturing():
            return
        with self._lock:
            while self._waiting:
                tensor = self._waiting[0]._tensor
                if tensor is not None:
                    room = self._take(tensor.nbytes)
                    if room is None:
                        return
                    self._waiting[0]._fill(room, self._transport)
                self._waiting.popleft()

    def hurry(self, slot: Slot) -> None:
        """Queue the copy of a slot that waits, in memory of its own if need be."""
        with self._lock:
            self.advance()
            if slot._tensor is None:
                return
            self._waiting.remove(slot)
            slot._fill(_Room(self._transport.room(slot._tensor.nbytes), of_ring=False), self._transport)

    def give_back(self, room: _Room) -> None:
        """Make the memory of a slot free again."""
        if room.of_ring:
            self._free.append(room)

    def _take(self, size: int) -> _Room | None:
        """Free memory of at least some size that no copy is under way to; a slot grows once, to what is sent."""
        for _ in range(len(self._free)):
            room = self._free.popleft()
            if room.idle:
                if room.host.numel() < size:
                    room.host = self._transport.room(size)
                return room
            self._free.append(room)
        if self._unmade:
            self._unmade -= 1
            return _Room(self._transport.room(size))
        return None
