"""A round on its way to becoming a record: what was measured of it, and which number it has.

Between `recorder`, which fills it on the training thread, and `assemble`, which reads it on the background thread.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from paramwatch.inventory import LiveInventory
from paramwatch.measure import Kept, Reading
from paramwatch.optimizers import params_of
from paramwatch.plan import ENTERED, LEFT, MOVED, USED, Folded
from paramwatch.record import CameApart, Inventory, Lost
from paramwatch.uses.reading import SplitReading


@dataclass
class Measured:
    """One kind of some rows, on its way to the host."""

    kind: str
    names: list[str]
    reading: Reading
    histograms: Reading | None = None
    """Made at some steps only."""

    def only(self, names: Iterable[str]) -> Measured:
        """The same for these rows alone."""
        wanted = set(names)
        # no parameter has an empty name: what is called that is passed over
        return Measured(self.kind, [name if name in wanted else "" for name in self.names], self.reading, self.histograms)

    def readings(self) -> list[Reading]:
        """All that is on its way."""
        return [self.reading] if self.histograms is None else [self.reading, self.histograms]


class OptimizerStep:
    """One step of one optimizer, from entry to end."""

    __slots__ = (
        *("number", "wanted", "binned", "optimizers", "inventory", "names", "tensors", "folded", "before", "grads", "scale", "found_inf"),
        *("time", "evaluations", "entered", "used", "refined", "had_grad", "required_grad", "raw", "raw_is_used", "ended", "left"),
        *("unsure", "uses", "rates", "amp", "__weakref__"),
    )

    def __init__(self, number: int, wanted: bool, binned: bool, optimizers: list[Optimizer], inventory: Inventory) -> None:
        self.number, self.wanted, self.optimizers, self.inventory = number, wanted, optimizers, inventory
        self.binned = binned
        """Whether histograms are made of what is measured."""
        self.names: list[str] = []
        self.tensors: Sequence[Tensor] = ()
        self.folded: Folded | None = None
        """While it is there, the fields that are measured are empty but for `raw`."""
        self.before: list[Kept | list[Tensor]] = []
        """Copies, or samples, of `tensors`, piece by piece in their order."""
        self.grads: list[Tensor | None] | None = None
        self.scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.time = time.time()
        self.evaluations = 0
        self.entered: list[Measured] = []
        self.used: Measured | None = None
        self.refined: list[Measured] = []
        """Gradients of some rows as an inner optimizer used them: these count, not those in `used`."""
        self.had_grad: list[bool] = []
        self.required_grad: list[bool] = []
        self.raw: list[Measured] = []
        """Gradients as they were before they were clipped; each row is in one of these at most."""
        self.raw_is_used = False
        """Whether nothing was clipped, and that is recorded; told apart only while it is folded."""
        self.ended: list[Measured] = []
        self.left: list[Measured] = []
        """The parameters as they were at the end, in the order of `names`; empty where nobody will ask. Not a kind of the record."""
        self.unsure: set[str] = set()
        """Rows of which it is not known who else has changed them."""
        self.uses: SplitReading | None = None
        """Gradients by use, in a step that is split."""
        self.rates: Reading | None = None
        self.amp: Reading | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether they were measured."""
        return self.used is not None or (self.folded is not None and self.folded.grads is not None)

    def unfold(self) -> None:
        """Make of a step that went the quick way (`plan`), and may go on the general way, what that would have made of it."""
        folded, self.folded = self.folded, None
        if folded is None:
            return
        self.entered = [Measured("param", self.names, folded.reading(ENTERED))]
        if folded.grads is not None:
            self.used = Measured("grad", self.names, folded.reading(USED))
            self.had_grad, self.required_grad = list(folded.grads.had), list(folded.grads.required)
            if self.raw_is_used:
                self.entered.append(Measured("grad_raw", self.names, self.used.reading))
        if not folded.over:
            self.before = [folded.kept()] if folded.plan.exact else []
            return
        if folded.plan.exact:
            self.ended = [Measured("update", self.names, folded.reading(MOVED))]
        if folded.plan.leaves:
            self.left = [Measured("param", self.names, folded.reading(LEFT))]
        self.rates = Reading([(range(len(self.names)), folded.rates_of_rows())], (len(self.names),))

    def unfolded(self) -> OptimizerStep:
        """The same of a step that is over, which itself stays as it is."""
        if self.folded is None:
            return self
        other = copy(self)
        other.unfold()
        return other

    @property
    def measured(self) -> list[Measured]:
        """Everything measured, in the order in which one takes the place of another."""
        return [*self.entered, *([self.used] if self.used else []), *self.refined, *self.raw, *self.ended]

    def readings(self) -> list[Reading]:
        """What the record waits for."""
        readings = [reading for each in (*self.measured, *self.left) for reading in each.readings()]
        uses = None if self.uses is None else self.uses.reading
        return [*readings, *(reading for reading in (self.rates, self.amp, uses) if reading is not None)]


@dataclass
class Round:
    """What was measured of one step number since the last time it was read."""

    step: int
    time: float
    inventory: Inventory
    steps: dict[str, Any]
    changed: Callable[[OptimizerStep, int], Mapping[str, int]]
    """Asked on the background thread, in step order: which rows a step found changed since their last one (`outside`)."""
    optimizer_steps: list[OptimizerStep] = field(default_factory=list)
    others: list[Measured] = field(default_factory=list)
    stepped: set[str] = field(default_factory=set)
    """Names of the rows that an optimizer stepped."""
    skipped: bool = False
    overhead_ns: int = 0
    apart: list[CameApart] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether every reading has arrived."""
        if not self.others and all(step.folded is not None for step in self.optimizer_steps):
            return True
        return all(reading.ready for reading in self.readings())

    def readings(self) -> list[Reading]:
        """Every reading of the round."""
        found = [reading for measured in self.others for reading in measured.readings()]
        for step in self.optimizer_steps:
            found += step.readings()
        return found


@dataclass
class _Known:
    optimizer: weakref.ref[Optimizer]
    place: int
    steps: int = 0


class Rounds:
    """Numbers steps as rounds of several optimizers: ordered by first appearance, a round ends when one steps that is not after the last.

    An optimizer that holds a tensor of an earlier one (it was made anew, or they take turns) has the earlier one's place, so that no
    tensor steps twice in a round; several that share a place, but no tensor (one was replaced by two), step in one round. So has one that
    holds what came into the place of such a tensor, under its name. One that holds what came into the model after the last step begins
    with a new round.

    Args:
        first_step: Number of the first step.
        holds: Whether the model has a tensor of this identity. Of others what is known is forgotten with the optimizers that held them.
        named: Gives the name of each tensor, by identity: of those the model has now or, cheaper, had when it was last read.
    """

    def __init__(
        self,
        first_step: int,
        holds: Callable[[int], bool] = lambda identity: False,
        named: Callable[[bool], Mapping[int, str]] = lambda now: {},
    ) -> None:
        self.step = first_step
        self._holds = holds
        self._named = named
        self._known: dict[int, _Known] = {}
        self._place_of: dict[int, int] = {}
        self._stepped: dict[str, tuple[int, int]] = {}
        self._there: Mapping[int, str] = {}
        self._places = 0
        self._last = -1
        self._in_round: set[int] = set()

    def number(self, optimizer: Optimizer, ids: Iterable[int] | None = None) -> int:
        """The step that this optimizer's next step belongs to.

        Args:
            optimizer: About to step.
            ids: The identities of what it holds, where they are known.
        """
        return self._next(optimizer, ids)[1]

    def steps_of(self, optimizer: Optimizer) -> int:
        """How many steps of this optimizer were counted."""
        known = self._find(optimizer)
        return 0 if known is None else known.steps

    def take(self, optimizer: Optimizer, held: Collection[int] | None = None) -> int:
        """Count a step of this optimizer, and give its number.

        Args:
            optimizer: Steps.
            held: The identities of what it holds of the model, where they are known.
        """
        known, (place, number) = self._find(optimizer), self._next(optimizer, held)
        if known is None:
            known = _Known(weakref.ref(optimizer), place)
            self._forget_what_is_gone()
            self._known[id(optimizer)] = known
            self._places = max(self._places, place + 1)
            named = self._named(True)
            for key in map(id, params_of(optimizer)):
                self._place_of.setdefault(key, place)
                if key in named:
                    self._stepped[named[key]] = place, key
        known.steps += 1
        if number != self.step:
            self._in_round = set()
        # what has left the model is not stepped: whoever holds what took its place may step in the same round
        self._in_round.update(filter(self._holds, map(id, params_of(optimizer))) if held is None else held)
        self.step, self._last, self._there = number, place, self._named(False)
        return number

    def _forget_what_is_gone(self) -> None:
        self._known = {key: known for key, known in self._known.items() if known.optimizer() is not None}
        living = (known.optimizer() for known in self._known.values())
        held = {id(param) for optimizer in living if optimizer is not None for param in params_of(optimizer)}
        self._place_of = {key: place for key, place in self._place_of.items() if key in held or self._holds(key)}

    def _find(self, optimizer: Optimizer) -> _Known | None:
        known = self._known.get(id(optimizer))
        return known if known is not None and known.optimizer() is optimizer else None

    def _next(self, optimizer: Optimizer, ids: Iterable[int] | None) -> tuple[int, int]:
        """The place of an optimizer, and the number of its next step."""
        known = self._find(optimizer)
        if known is not None:
            return known.place, self.step + self._ends(known.place, map(id, params_of(optimizer)) if ids is None else ids)
        held = [id(param) for param in params_of(optimizer)]
        places = [self._place_of[key] for key in held if key in self._place_of]
        if places:
            return min(places), self.step + self._ends(min(places), held)
        named = self._named(True)
        rows = {key: named[key] for key in held if key in named}
        # while the tensor that had a name is in the model, under another one, what has the name now is not in its place
        before = [self._stepped[name] for name in rows.values() if name in self._stepped and self._stepped[name][1] not in named]
        if before:
            place = min(place for place, _ in before)
            return place, self.step + self._ends(place, [key for _, key in before])
        # who holds nothing of the model takes no place, and is followed by the next round once all places have stepped
        came = self._last >= 0 and any(self._there.get(key) != name for key, name in rows.items())
        return self._places, self.step + (came if rows else 0 <= self._last == self._places - 1)

    def _ends(self, place: int, held: Iterable[int]) -> bool:
        """Whether the round is over: the order begins anew, or a tensor of these identities would step twice."""
        return place < self._last or (place == self._last and not self._in_round.isdisjoint(held))


class AllRows:
    """Stands for an optimizer of all trainable rows."""

    def __init__(self, live: LiveInventory) -> None:
        self._live = live

    @property
    def param_groups(self) -> list[dict[Literal["params"], list[Tensor]]]:
        return [{"params": [tensor for tensor in self._live.glance() if tensor.requires_grad]}]
