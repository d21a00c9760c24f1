"""The quick way through a step: what the steps of one optimizer have in common, prepared once.

For a small model a step costs what Python does, not what is measured. So long as an optimizer holds the same tensors, in the same form,
and the model holds them under the same names, all that is new in a step are addresses and numbers: a `Plan` gathers the former, calls the
kernel, and has the latter written where the background thread will look for them. Whatever is otherwise goes the general way of
`recorder`, which is also the specification: a step that has begun here can be unfolded into what that way would have made of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import TypeAlias

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from paramwatch.columns import PARTS, Array
from paramwatch.inventory import LiveInventory
from paramwatch.measure import Kept, Reading, native
from paramwatch.measure.forms import Forms
from paramwatch.optimizers import groups_of, params_of
from paramwatch.rooms import Grads, Room
from paramwatch.storage import Addresses
from paramwatch.strangers import Strangers

ENTERED, USED, MOVED, LEFT, KINDS = range(5)
"""Where the readings of a step are: parameters as entered, gradients, updates, parameters as left."""

_STEPS, _STEPS_BYTES = 64, 1 << 20
"""Steps whose readings lie in one block, and bytes of a block that holds more than one."""

Slot: TypeAlias = tuple[Array, int, int]
"""For the readings of a step: a block [steps, kinds, rows, parts], which step this is there, and the address of its readings."""

address_of, grad_of = Tensor.data_ptr, attrgetter("grad")

_NO_RATE, _NUMBERS = float("nan"), (float, int)


def rates_of(optimizer: Optimizer) -> list[float] | None:
    """The learning rate of each group, NaN where it has none; None if one is no number."""
    rates = []
    for group in optimizer.param_groups:
        rate = group.get("lr", _NO_RATE)
        if not isinstance(rate, _NUMBERS):
            return None
        rates.append(rate)
    return rates


class Plan:
    """How the steps of one optimizer are measured.

    Args:
        optimizer: Held weakly.
        rows: The rows that it steps, by name.
        live: Says whether the model is still the same.
        exact: Whether updates are measured, against a copy.
        tells: Whether what a step leaves tells if the rows were changed before the next one.
    """

    def __init__(self, optimizer: Optimizer, rows: Mapping[str, Tensor], live: LiveInventory, exact: bool, tells: bool) -> None:
        params, tensors = params_of(optimizer), list(rows.values())
        self.optimizer = weakref.ref(optimizer)
        self.inventory = live.current
        self.names = list(rows)
        self.is_there = live.sight.is_there
        """Whether the model holds what it held, under the same names."""
        self.stepped = frozenset(rows)
        self.completes = self.stepped >= self.inventory.awaited
        """Whether a step of it is a whole round."""
        self.held = frozenset(key for key in map(id, params) if live.holds(key))
        self.ids = tuple(map(id, params))
        self.forms = Forms(tensors)
        self.group_of = np.array(groups_of(optimizer, tensors), dtype=np.intp)
        self.leaves = tells
        self.exact = exact
        self.sizes = [tensor.numel() for tensor in tensors]
        self.types = [native.TYPES[tensor.dtype] for tensor in tensors]
        self._live, self._readings = live, live.readings
        self.found = Addresses()
        """Where the rows lie, asked anew where that is new."""
        self._grads: Grads | None = None
        self.rooms: list[Room] = []
        """Of steps that are over."""
        self.slots: list[Slot] = []
        """For the next steps, the next one last."""
        self._shape = KINDS, len(tensors), len(PARTS)
        self.kind = 8 * len(tensors) * len(PARTS)
        """Bytes from one kind of a step to the next."""
        at = {key: i for i, key in enumerate(self.ids)}
        positions = [at[id(tensor)] for tensor in tensors]
        self._all = positions == list(range(len(params)))
        # of a single position it would give the tensor itself
        self._choose = itemgetter(*positions, positions[0])

    @classmethod
    def takes(cls, tensors: Sequence[Tensor]) -> bool:
        """Whether there can be a plan for these."""
        return bool(tensors) and native.available() and all(map(native.takes, tensors))

    @property
    def is_of_now(self) -> bool:
        """Whether the model was not read again since it was made."""
        return self._live.readings == self._readings and self._live.current is self.inventory

    def tensors_of(self, params: Sequence[Tensor], ids: tuple[int, ...], step: int) -> Sequence[Tensor] | None:
        """The tensors of its rows; None if anything is not as it was planned.

        Args:
            params: What the optimizer holds.
            ids: The identities of these.
            step: Which step it is about to make.
        """
        if not self.is_of_now or ids != self.ids:
            return None
        tensors = self.chosen(params)
        if not self._live.holds_the_same(ids, step):
            return None
        return tensors if self.forms.at_a_glance(*tensors) or self.forms.hold(tensors) else None

    def chosen(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """The rows among what the optimizer holds."""
        return params if self._all else self._choose(params)[:-1]

    def enter(self, tensors: Sequence[Tensor], with_grads: bool = False) -> Folded | None:
        """Measure parameters as a step finds them, and copy them; None if that cannot be done here.

        Args:
            tensors: The parameters.
            with_grads: Measure their gradients as well; if these cannot be here, only the parameters are.
        """
        addresses = self.found.of(tensors)
        if addresses is None:
            return None
        try:
            room = self.rooms.pop() if self.rooms else Room(self.sizes, self.types, self.forms.each, self.exact)
        except MemoryError:
            return None
        folded = Folded(self, self.slot(), room)
        room.addresses = addresses
        if with_grads:
            grads: list[Tensor | None] = list(map(grad_of, tensors))
            known = self._grads
            if known is None or not known.all or not known.at_a_glance(*grads):
                known = self.grads_of(grads)
            used = None if known is None else known.addresses(grads)
            if known is not None and used is not None:
                folded.grads = known
                room.both(known).read([*addresses, *used], folded.at)
                return folded
        room.before.read(addresses, folded.at)
        return folded

    def grads_of(self, grads: Sequence[Tensor | None]) -> Grads | None:
        """What is known of gradients like these; None if they cannot be measured here."""
        known = self._grads
        if known is not None and known.all and known.at_a_glance(*grads):
            return known
        if known is None or not known.fit(grads):
            found = [grad for grad in grads if grad is not None]
            self._grads = Grads(self.forms.each, grads) if all(map(self.reads, found)) else None
        return self._grads

    @staticmethod
    def reads(tensor: Tensor) -> bool:
        """Whether a gradient can be measured here."""
        return native.takes(tensor)

    def slot(self) -> Slot:
        """The next one."""
        if not self.slots:
            steps = max(1, min(_STEPS, _STEPS_BYTES // (KINDS * self.kind)))
            block = np.full((steps, *self._shape), np.nan)
            first = block.__array_interface__["data"][0]
            self.slots = [(block, i, first + i * KINDS * self.kind) for i in reversed(range(steps))]
        return self.slots.pop()


class Folded:
    """A step that goes the quick way: where its readings are."""

    __slots__ = ("_room", "at", "block", "grads", "plan", "position", "rates")

    on_way: Reading | None = None
    """What the block waits for, where the numbers were not written into it at once."""
    scales = False
    """Whether gradients that carry a scale can be measured here."""
    on_device = False
    """Whether measuring queues work."""

    def __init__(self, plan: Plan, slot: Slot, room: Room | None, grads: Grads | None = None, rates: Sequence[float] = ()) -> None:
        self.plan, self.grads = plan, grads
        self.block, self.position, self.at = slot
        self.rates = rates
        """For each group of the optimizer, NaN where it has none."""
        self._room = room

    def see(self, grads: Sequence[Tensor | None], scale: Tensor | None = None) -> bool:
        """Measure gradients, the last time wins; False if that cannot be done here.

        Args:
            grads: Of the rows.
            scale: A factor that they carry, where that can be taken out (`scales`).
        """
        known, room = self.plan.grads_of(grads), self._room
        used = None if known is None else known.addresses(grads)
        if known is None or used is None or room is None:
            return False
        self.grads = known
        room.used(known).read(used, self.at + USED * self.plan.kind)
        return True

    def end(self, optimizer: Optimizer, tensors: Sequence[Tensor]) -> bool:
        """Measure the update; False if that cannot be done here."""
        plan, room, rates = self.plan, self._room, rates_of(optimizer)
        if room is None or self.grads is None or rates is None:
            return False
        if plan.exact:
            forms = plan.forms
            if list(map(address_of, tensors)) != room.addresses or not (forms.at_a_glance(*tensors) or forms.hold(tensors)):
                return False
            room.after.read(room.addresses, self.at + MOVED * plan.kind, self.at + LEFT * plan.kind)
        self.rates, self._room = rates, None
        plan.rooms.append(room)
        return True

    @property
    def over(self) -> bool:
        """Whether the step has ended this way."""
        return self._room is None

    def reading(self, kind: int) -> Reading:
        """What was measured of a kind, and will not be changed any more."""
        array = self.block[self.position, kind]
        return Reading([(range(len(array)), array)], array.shape)

    def rates_of_rows(self) -> Array:
        """The learning rate of each row."""
        return np.array(self.rates, dtype=np.float64)[self.plan.group_of]

    def kept(self) -> Kept:
        """The copies of the parameters, for the general way to go on with; they are not used here again."""
        assert self._room is not None
        return self._room.kept()


class Plans:
    """The plan of each optimizer that has one.

    Args:
        live: The rows.
        sorts: Of plans: one of the first that takes an optimizer's tensors is made.
    """

    def __init__(self, live: LiveInventory, sorts: Sequence[type[Plan]] = (Plan,)) -> None:
        self.strangers = Strangers(live)
        """The optimizers that need none."""
        self._live, self._sorts = live, sorts
        self._plans: dict[int, Plan] = {}
        self._refused: dict[int, int] = {}

    def of(self, optimizer: Optimizer) -> Plan | None:
        """That of this optimizer, whether or not it still holds."""
        plan = self._plans.get(id(optimizer))
        return plan if plan is not None and plan.optimizer() is optimizer else None

    def make(self, optimizer: Optimizer, rows: Mapping[str, Tensor], exact: bool, tells: bool) -> None:
        """Plan the next steps, if they can be; those of optimizers that are gone are forgotten."""
        key, readings = id(optimizer), self._live.readings
        if self._refused.get(key) == readings:
            return
        self._plans = {other: plan for other, plan in self._plans.items() if other != key and plan.optimizer() is not None}
        sort = next((sort for sort in self._sorts if sort.takes(list(rows.values()))), None)
        if sort is not None:
            self._plans[key] = sort(optimizer, rows, self._live, exact, tells)
        else:
            self._refused[key] = readings

    def forget(self) -> None:
        """All of them, and their memory."""
        self._plans = {}
