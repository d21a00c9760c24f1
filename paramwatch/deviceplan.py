"""The quick way through a step of a model on a GPU: `plan`, for tensors that the Triton kernels read.

What a step queues does not depend on the number of rows: memory for the copies, the launches, and one buffer for all that was measured,
which travels to the host by one copy and is put there where the readings of a step on the CPU are written. Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from paramwatch.columns import PARTS
from paramwatch.inventory import LiveInventory
from paramwatch.measure import Kept, Reading, gpu, trusted
from paramwatch.measure.scaled import sent, stream_of
from paramwatch.measure.streams import follow, stream_now
from paramwatch.measure.tables import Layout, types_of
from paramwatch.plan import ENTERED, KINDS, MOVED, USED, Folded, Plan, rates_of
from paramwatch.rooms import Grads
from paramwatch.storage import Addresses

_ALIGNED = 64


class Located:
    """Where some tensors are. Their forms stay the same; a table is made anew only when an address is new.

    Args:
        tensors: On one device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.addresses: list[int] = []
        self._found = Addresses()
        self._device, self._types = tensors[0].device, types_of(tensors)
        self._numel = np.array([tensor.numel() for tensor in tensors], dtype=np.int64)
        sizes = self._numel * np.array([tensor.element_size() for tensor in tensors])
        ends = np.cumsum(-(-sizes // _ALIGNED) * _ALIGNED)
        self.bytes = int(ends[-1])
        """Of a copy of all."""
        self.starts = np.concatenate(([0], ends[:-1]))
        """Where each begins in such a copy."""
        self._known: dict[int | None, Layout] = {}

    def find(self, tensors: Sequence[Tensor]) -> bool:
        """Look where they are now; False if the memory of one is not there."""
        addresses = self._found.of(tensors)
        if addresses is None:
            return False
        if addresses != self.addresses:
            self.addresses, self._known = addresses, {}
        return True

    def layout(self, copy: Tensor | None = None) -> Layout:
        """For the kernels, with the memory of a copy if there is one."""
        at = None if copy is None else copy.data_ptr()
        layout = self._known.get(at)
        if layout is None:
            here = np.array(self.addresses, dtype=np.int64)
            layout = Layout(self._device, self._numel, self._types, [here] if at is None else [here, at + self.starts])
            # the allocator mostly gives the same memory, or takes turns between two
            self._known = {at: layout} if len(self._known) > 3 else {**self._known, at: layout}
        return layout


class DevicePlan(Plan):
    """How the steps of one optimizer are measured, all of whose rows are on one GPU."""

    def __init__(self, optimizer: Optimizer, rows: Mapping[str, Tensor], live: LiveInventory, exact: bool, tells: bool) -> None:
        super().__init__(optimizer, rows, live, exact, tells)
        self.rows = Located(list(rows.values()))
        self.device = next(iter(rows.values())).device
        self.broken = False
        """Whether a kernel could not be launched, or memory was short: then there is no quick way any more."""
        self._here: Grads | None = None
        self._pulls: tuple[Grads, int, Located, Tensor | None] | None = None

    @classmethod
    def takes(cls, tensors: Sequence[Tensor]) -> bool:
        """Whether there can be a plan for these."""
        return bool(tensors) and all(tensor.device == tensors[0].device for tensor in tensors) and all(map(cls.reads, tensors))

    @staticmethod
    def reads(tensor: Tensor) -> bool:
        """Whether a tensor can be measured here."""
        return trusted.takes(tensor)

    def tensors_of(self, params: Sequence[Tensor], ids: tuple[int, ...], step: int) -> Sequence[Tensor] | None:
        """As for any plan; None as well if the memory of a row is not there."""
        tensors = None if self.broken else super().tensors_of(params, ids, step)
        return tensors if tensors is not None and self.rows.find(tensors) else None

    def enter(self, tensors: Sequence[Tensor], with_grads: bool = False) -> Folded | None:
        """Measure parameters as a step finds them, and copy them; then gradients, if these can be."""
        try:
            numbers = torch.full((KINDS, len(tensors), len(PARTS)), np.nan, dtype=torch.float64, device=self.device)
            copies = self.room() if self.exact else None
        except torch.OutOfMemoryError:
            self.broken = True
            return None
        folded = FoldedOnDevice(self, numbers, copies)
        if not self.done(partial(gpu.read, self.rows.layout(copies), numbers[ENTERED:USED])):
            return None
        if with_grads:
            folded.see([tensor.grad for tensor in tensors])
        return folded

    def room(self) -> Tensor:
        """Memory for a copy of all rows, for one step: between the steps it is the model's."""
        return torch.empty(self.rows.bytes, dtype=torch.uint8, device=self.device)

    def done(self, launch: Callable[[], None]) -> bool:
        """Launch kernels; False if they cannot be."""

        def launched() -> bool:
            launch()
            return True

        self.broken = self.broken or trusted.attempt(self.device, launched) is None
        return not self.broken

    def grads_of(self, grads: Sequence[Tensor | None]) -> Grads | None:
        """As for any plan; None as well if one is on another device."""
        known = super().grads_of(grads)
        if known is not None and known is not self._here and all(grad.device == self.device for grad in known.found(grads)):
            self._here = known
        return known if known is self._here else None

    def located(self, grads: Grads, found: Sequence[Tensor]) -> tuple[Located, Tensor | None]:
        """What is known of where gradients like these are, and which rows they are of; None for all rows."""
        stream = stream_of(self.device)
        if self._pulls is None or self._pulls[0] is not grads or self._pulls[1] != stream:
            rows = torch.from_numpy(np.flatnonzero(grads.had))
            self._pulls = grads, stream, Located(found), None if len(rows) == len(grads.had) else sent(rows, self.device)
        return self._pulls[2:]


class FoldedOnDevice(Folded):
    """A step that goes the quick way: what was measured is in one buffer until it travels.

    Args:
        plan: The plan.
        numbers: float64 [kinds, rows, parts], NaN where nothing is measured.
        copies: Memory for a copy of all rows.
    """

    __slots__ = ("_copies", "_found", "_numbers", "_stream", "on_way")

    plan: DevicePlan
    scales = on_device = True

    def __init__(self, plan: DevicePlan, numbers: Tensor, copies: Tensor | None) -> None:
        super().__init__(plan, plan.slot(), None)
        self._numbers, self._copies = numbers, copies
        self._found, self._stream = plan.rows.addresses, stream_now(plan.device)
        self.on_way: Reading | None = None

    def see(self, grads: Sequence[Tensor | None], scale: Tensor | None = None) -> bool:
        """Measure gradients, the last time wins; False if that cannot be done here."""
        plan, known = self.plan, self.plan.grads_of(grads)
        if known is None:
            return False
        self._follow()
        found, into = known.found(grads), self._numbers[USED:MOVED]
        if found:
            located, rows = plan.located(known, found)
            some = into if rows is None else torch.empty((1, len(found), len(PARTS)), dtype=torch.float64, device=plan.device)
            if not located.find(found) or not plan.done(partial(gpu.read, located.layout(), some, scale)):
                return False
        if len(found) < len(grads):
            into.fill_(np.nan)
            if found and rows is not None:
                into.index_copy_(1, rows, some)
        self.grads = known
        return True

    def end(self, optimizer: Optimizer, tensors: Sequence[Tensor]) -> bool:
        """Measure the update, and let all numbers go; False if that cannot be done here."""
        plan, rates = self.plan, rates_of(optimizer)
        if self.grads is None or rates is None:
            return False
        self._follow()
        if self._copies is not None:
            if not plan.rows.find(tensors) or plan.rows.addresses != self._found or not plan.forms.hold(tensors):
                return False
            layout = plan.rows.layout(self._copies)
            if not plan.done(partial(gpu.read_update, layout, self._numbers[MOVED:KINDS])):
                return False
        self.rates = rates
        array = self.block[self.position]
        self.on_way = Reading([(range(KINDS), self._numbers)], array.shape, into=array)
        self._copies = None
        return True

    def _follow(self) -> None:
        """Where the step goes on in another stream than before, that one waits for what was queued here; nobody else does."""
        stream = stream_now(self.plan.device)
        if stream != self._stream:
            follow(stream, self._stream, [x for x in (self._numbers, self._copies) if x is not None])
            self._stream = stream

    @property
    def over(self) -> bool:
        """Whether the step has ended this way."""
        return self.on_way is not None

    def reading(self, kind: int) -> Reading:
        """What was measured of a kind, and will not be changed any more."""
        if self.over:
            return super().reading(kind)
        self._follow()
        numbers = self._numbers[kind]
        return Reading([(range(len(numbers)), numbers)], tuple(numbers.shape))

    def kept(self) -> Kept:
        """The copies of the parameters, for the general way to go on with."""
        assert self._copies is not None
        self._follow()
        copies = []
        for start, size, form in zip(self.plan.rows.starts.tolist(), self.plan.sizes, self.plan.forms.each, strict=True):
            flat = self._copies[start : start + size * form[1].itemsize].view(form[1])
            copies.append(flat.as_strided(form[4], form[5]))
        return Kept.of(copies)
