"""A round on its way to becoming a record: what was measured of it.

Between `recorder`, which fills it on the training thread, and `assemble`, which reads it on the background thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from paramwatch.clock import Spent
from paramwatch.columns import Array
from paramwatch.measure import Kept, Reading, send, times
from paramwatch.plan import ENTERED, LEFT, MOVED, USED, Folded, Plan
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
    factors: Reading | None = None
    """By all of which what was read is to be multiplied."""

    def only(self, names: Iterable[str]) -> Measured:
        """The same for these rows alone."""
        wanted = set(names)
        # no parameter has an empty name: what is called that is passed over
        return Measured(self.kind, [name if name in wanted else "" for name in self.names], self.reading, self.histograms, self.factors)

    def readings(self) -> list[Reading]:
        """All that is on its way."""
        return [reading for reading in (self.reading, self.histograms, self.factors) if reading is not None]

    def numpy(self) -> Array:
        """float64 [n, parts], as `Reading.numpy`."""
        found = self.reading.numpy()
        return found if self.factors is None else times(found, self.factors.numpy().prod())


class OptimizerStep:
    """One step of one optimizer, from entry to end."""

    # what nothing is known of yet is not set for each step, of which most go the quick way
    names: list[str]
    tensors: Sequence[Tensor] = ()
    folded: Folded | None = None
    """While it is there, the fields that are measured are empty but for `raw`."""
    before: Sequence[Kept | list[Tensor]] = ()
    """Copies, or samples, of `tensors`, piece by piece in their order."""
    grads: list[Tensor | None] | None = None
    carried: Tensor | None = None
    """A scale that the gradients of a step which was not made still carry."""
    scale: Tensor | None = None
    found_inf: Tensor | None = None
    evaluations = 0
    entered: Sequence[Measured] = ()
    used: Measured | None = None
    refined: Sequence[Measured] = ()
    """Gradients of some rows, as those used them who speak for them: these count, not those in `used`."""
    settled: frozenset[str] = frozenset()
    """Rows for which an optimizer inside has spoken."""
    had_grad: Sequence[bool] = ()
    required_grad: Sequence[bool] = ()
    raw: Sequence[Measured] = ()
    """Gradients as they were before they were clipped; each row is in one of these at most."""
    raw_is_used = False
    """Whether nothing was clipped, and that is recorded; told apart only while it is folded."""
    ended: Sequence[Measured] = ()
    left: Sequence[Measured] = ()
    """The parameters as they were at the end, in the order of `names`; empty where nobody will ask. Not a kind of the record."""
    unsure: Collection[str] = frozenset()
    """Rows of which it is not known who else has changed them."""
    uses: Sequence[SplitReading] = ()
    """Gradients by use, in a step that is split; a later one takes the place of an earlier one."""
    rates: Reading | None = None
    amp: Reading | None = None

    def __init__(self, number: int, wanted: bool, binned: bool, optimizers: list[Optimizer], inventory: Inventory) -> None:
        self.number, self.wanted, self.optimizers, self.inventory = number, wanted, optimizers, inventory
        self.binned = binned
        """Whether histograms are made of what is measured."""
        self.time = time.time()
        self.names = []

    @property
    def has_gradients(self) -> bool:
        """Whether they were measured."""
        folded = self.folded
        return self.used is not None if folded is None else folded.grads is not None

    def split(self, names: Sequence[str], uses: SplitReading | None) -> None:
        """Take the gradients of these rows by use."""
        if uses is not None:
            self.uses = [uses] if len(names) == len(self.names) else [*self.uses, uses]

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
                self.entered = [*self.entered, Measured("grad_raw", self.names, self.used.reading)]
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
        folded = None if self.folded is None else self.folded.on_way
        readings += [uses.reading for uses in self.uses]
        return [*readings, *(reading for reading in (folded, self.rates, self.amp) if reading is not None)]


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
    spent: Spent = field(default_factory=Spent)
    # what nothing is known of yet is not set for each round
    others: Sequence[Measured] = field(default=(), init=False)
    stepped: frozenset[str] = field(default=frozenset(), init=False)
    """Names of the rows that an optimizer stepped."""
    waits: bool = field(default=False, init=False)
    """Whether there may be a reading that it waits for."""
    skipped: bool = field(default=False, init=False)
    apart: Sequence[CameApart] = field(default=(), init=False)
    lost: Sequence[Lost] = field(default=(), init=False)

    def add(self, step: OptimizerStep, skipped: bool, backwards: int) -> bool:
        """Take a step that is over; whether the round is complete, and on its way to the host.

        Args:
            step: As it was measured.
            skipped: Whether it was not made.
            backwards: How many backward passes were counted since the last one.
        """
        self.optimizer_steps.append(step)
        folded = step.folded
        if folded is None or folded.on_way is not None:
            self.waits = True
        self.skipped |= skipped
        if backwards:
            self.steps["backwards"] = self.steps.get("backwards", 0) + backwards
        plan = None if folded is None else folded.plan
        if plan is None or not plan.completes or plan.inventory is not self.inventory:
            self.stepped = self.stepped.union(step.names if plan is None else plan.stepped)
            if not self.stepped >= self.inventory.awaited:
                return False
        if self.waits:
            self.send()
        return True

    @property
    def arriving(self) -> bool:
        """Whether there may be something on its way."""
        return self.waits or bool(self.spent.spans)

    @property
    def evaluations(self) -> int:
        """How often closures were called."""
        return sum([step.evaluations for step in self.optimizer_steps])

    @property
    def host_us(self) -> float:
        """As in `Spent`."""
        return self.spent.host_us

    @property
    def device_us(self) -> float | None:
        """As in `Spent`."""
        return self.spent.device_us

    def take(self, others: Sequence[Measured]) -> None:
        """Rows that no optimizer steps."""
        self.others = [*self.others, *others]
        self.waits = True

    @property
    def ready(self) -> bool:
        """Whether every reading has arrived, and is known what they took."""
        return (not self.waits or all(reading.ready for reading in self.readings())) and (not self.spent.spans or self.spent.ready)

    def wait(self) -> None:
        """Block until it is ready: for flush and close only."""
        for reading in self.readings():
            reading.wait()
        self.spent.wait()

    def send(self) -> None:
        """Nothing more is measured of it: what is on a device travels from now on, all of it together."""
        send(self.readings())

    def readings(self) -> list[Reading]:
        """Every reading of the round."""
        found = [reading for measured in self.others for reading in measured.readings()]
        for step in self.optimizer_steps:
            found += step.readings()
        return found


class Common(NamedTuple):
    """What the rounds of one `streak` have in common."""

    plan: Plan
    raw_is_used: bool
    changed: Callable[[OptimizerStep, int], Mapping[str, int]]


class PlainRound(Round):
    """A round of a streak: one step that went the quick way, and nothing else.

    Nearly all rounds are such. What `Round` says of one is made of what is kept when somebody asks, which hardly anybody does.
    """

    arriving, evaluations, device_us = False, 0, None
    host_us = 0.0

    def __init__(self, common: Common, step: int, time: float, folded: Folded, host_us: float) -> None:
        self.common, self.step, self.time, self.folded, self.host_us = common, step, time, folded, host_us
        self.inventory, self.steps, self.changed = common.plan.inventory, {}, common.changed

    @cached_property
    def optimizer_steps(self) -> list[OptimizerStep]:  # type: ignore[override]  # it can be set as well
        step = OptimizerStep(self.step, True, False, [], self.inventory)
        step.names, step.folded, step.time, step.raw_is_used = self.common.plan.names, self.folded, self.time, self.common.raw_is_used
        return [step]

    @cached_property
    def spent(self) -> Spent:  # type: ignore[override]  # it can be set as well
        spent = Spent()
        spent.host_us = self.host_us
        return spent
