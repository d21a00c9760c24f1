"""Which number a step has: the steps of several optimizers as rounds.

Between `recorder`, which asks at every step, and `rounds`, which hold what was measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from paramwatch.inventory import LiveInventory
from paramwatch.optimizers import params_of


@dataclass
class Known:
    """An optimizer that has stepped."""

    optimizer: weakref.ref[Optimizer]
    place: int
    steps: int = 0
    latest: int | None = None
    """The number of its latest step."""


class Rounds:
    """Numbers steps as rounds of several optimizers: ordered by first appearance, a round ends when one steps that is not after the last.

    No optimizer steps twice in a round, and no tensor: a round also ends when one steps that holds a tensor of any that stepped in it.
    An optimizer that holds a tensor of an earlier one (it was made anew, or they take turns) has the earlier one's place, of several the
    first; those that share a place, but no tensor (one was replaced by two), step in one round. So has one that holds what came into the
    place of such a tensor, under its name. One that holds what came into the model after the last step begins with a new round.

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
        self._known: dict[int, Known] = {}
        self._place_of: dict[int, int] = {}
        self._stepped: dict[str, tuple[int, int]] = {}
        self._there: Mapping[int, str] = {}
        self._places = 0
        self._last = -1
        # of the round: what the latest optimizer holds, as it was given, and what all before it hold
        self._latest: AbstractSet[int] = frozenset()
        self._before: set[int] = set()

    def due(self, optimizer: Optimizer, ids: Collection[int]) -> tuple[int, int]:
        """The step that this optimizer's next step belongs to, and how many of its steps were counted.

        Args:
            optimizer: About to step.
            ids: The identities of what it holds.
        """
        known = self._known.get(id(optimizer))
        if known is None or known.optimizer() is not optimizer:
            return self._next(optimizer, ids)[1], 0
        return self.step + (known.latest == self.step or self._ends(known.place, ids)), known.steps

    def steps_of(self, optimizer: Optimizer) -> int:
        """How many steps of this optimizer were counted."""
        known = self._known.get(id(optimizer))
        return known.steps if known is not None and known.optimizer() is optimizer else 0

    def known(self, optimizer: Optimizer) -> Known:
        """What is known of an optimizer that has stepped."""
        return self._known[id(optimizer)]

    def again(self, known: Known) -> None:
        """Count a further step of the optimizer that made the last one, and no other in that round: it begins the next one."""
        self.step += 1
        known.steps += 1
        known.latest = self.step
        self._before.clear()

    def take(self, optimizer: Optimizer, held: AbstractSet[int] | None = None, inside: Iterable[Optimizer] = ()) -> int:
        """Count a step of this optimizer, and give its number.

        Args:
            optimizer: Steps.
            held: The identities of what is stepped of the model, where they are known.
            inside: Optimizers that stepped inside it.
        """
        ids = [id(param) for each in (optimizer, *inside) for param in params_of(each)] if held is None else held
        known = self._known.get(id(optimizer))
        if known is not None and known.optimizer() is optimizer:
            place = known.place
            number = self.step + (known.latest == self.step or self._ends(place, ids))
        else:
            place, number = self._next(optimizer, ids)
            known = Known(weakref.ref(optimizer), place)
            self._forget_what_is_gone()
            self._known[id(optimizer)] = known
            self._places = max(self._places, place + 1)
            named = self._named(True)
            for key in map(id, params_of(optimizer)):
                self._place_of.setdefault(key, place)
                if key in named:
                    self._stepped[named[key]] = place, key
        known.steps += 1
        known.latest = number
        if number == self.step:
            self._before |= self._latest
        else:
            self._before.clear()
        # what has left the model is not stepped: whoever holds what took its place may step in the same round
        self._latest = {*filter(self._holds, ids)} if held is None else held
        self.step, self._last, self._there = number, place, self._named(False)
        return number

    def _forget_what_is_gone(self) -> None:
        self._known = {key: known for key, known in self._known.items() if known.optimizer() is not None}
        living = (known.optimizer() for known in self._known.values())
        held = {id(param) for optimizer in living if optimizer is not None for param in params_of(optimizer)}
        self._place_of = {key: place for key, place in self._place_of.items() if key in held or self._holds(key)}

    def _next(self, optimizer: Optimizer, stepped: Collection[int]) -> tuple[int, int]:
        """The place of an optimizer that is not known, and the number of its next step, which steps these."""
        held = [id(param) for param in params_of(optimizer)]
        places = [self._place_of[key] for key in held if key in self._place_of]
        if places:
            return min(places), self.step + self._ends(min(places), stepped)
        named = self._named(True)
        rows = {key: named[key] for key in held if key in named}
        # while the tensor that had a name is in the model, under another one, what has the name now is not in its place
        before = [self._stepped[name] for name in rows.values() if name in self._stepped and self._stepped[name][1] not in named]
        if before:
            place = min(place for place, _ in before)
            return place, self.step + self._ends(place, {*stepped, *(key for _, key in before)})
        # who holds nothing of the model takes no place, and is followed by the next round once all places have stepped
        came = self._last >= 0 and any(self._there.get(key) != name for key, name in rows.items())
        begins = came if rows else 0 <= self._last == self._places - 1
        return self._places, self.step + (begins or self._ends(self._places, stepped))

    def _ends(self, place: int, held: Collection[int]) -> bool:
        """Whether the round is over: the order begins anew, or a tensor of these identities would step twice."""
        return place < self._last or not (self._latest.isdisjoint(held) and self._before.isdisjoint(held))


class AllRows:
    """Stands for an optimizer of all trainable rows."""

    def __init__(self, live: LiveInventory) -> None:
        self._live = live

    @property
    def param_groups(self) -> list[dict[Literal["params"], list[Tensor]]]:
        return [{"params": [tensor for tensor in self._live.glance() if tensor.requires_grad]}]
