"""The rows that are split, as they are when a step is armed: their tensors, who holds them, and what their uses contribute."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.parametrize import ParametrizationList

from paramwatch.globs import fitting
from paramwatch.guard import ParamWatchError
from paramwatch.inventory import LiveInventory
from paramwatch.measure.room import share_of_device
from paramwatch.record import Inventory, Row
from paramwatch.rows import held_under, places
from paramwatch.uses.arriving import Budget
from paramwatch.uses.contributions import Contributions

TIED = "tied"
"""Among patterns: the rows that have several names."""

LEAST_BUDGET = 256_000_000
"""Bytes that contributions may take, if 2 % of the device is not more."""


PATIENCE = 64
"""Steps of others after which the split step of a row is not waited for any more: its optimizer may be gone."""


@dataclass
class WatchedRow:
    """A row that is split."""

    name: str
    aliases: tuple[str, ...]
    tensor: Tensor
    found: Contributions
    holders: set[int] = field(default_factory=set)
    """Identities of the modules in which an operation on it needs no further name."""
    leaf: Any = None
    """The node of autograd that delivers its gradient, held from the first pass to the end of the step."""
    open: bool = True
    """Whether its next step is split."""
    stepped: bool = False
    """Whether it was, since this was armed: its next step is not waited for."""
    passes: int = 0
    """In how many backward passes of the step it is in anything was found."""

    def has_marked(self, leaf: Any, whose: int, serial: int) -> bool:
        """Whether this watch, arming this step, was here before; from now on it was."""
        # a node may outlive many steps, and another Watch may have marked it as well
        mine = f"paramwatch {whose}"
        known: bool = leaf.metadata.get(mine) == serial
        leaf.metadata[mine] = serial
        return known

    def hold_leaf(self) -> None:
        """Be told of a further pass of the step that does not lead through the model: else nobody holds what is to tell of it."""
        # not before there was one: while it is held a parameter cannot be swapped for another one without consequence
        if self.leaf is None and self.tensor.requires_grad:
            self.leaf = get_gradient_edge(self.tensor).node


class Watched:
    """The rows by name, and by every tensor that stands for one. While it is there their identities are their own.

    Args:
        live: The rows of the model.
        module: The model.
        uses_of: Which rows: glob patterns, and `TIED`.
        number: Of the step that is armed.
        names: The rows whose next step is split; None for all.
    """

    def __init__(
        self, live: LiveInventory, module: nn.Module, uses_of: Sequence[str], number: int, names: Collection[str] | None = None
    ) -> None:
        self.rows: dict[str, WatchedRow] = {}
        self.number = number
        self._live, self._uses_of, self._names = live, uses_of, names
        self._budgets: dict[torch.device, Budget] = {}
        self.read(module)

    def read(self, module: nn.Module) -> None:
        """Find the rows, as they are now; of those that are as they were what has come is kept."""
        before, self.rows = self.rows, {}
        self._of: dict[int, WatchedRow] = {}
        self._held_by: dict[int, list[tuple[str, WatchedRow]]] = {}
        self._stand_ins: list[tuple[WatchedRow, weakref.ref[nn.Module], str, Tensor]] = []
        self._frozen: list[Tensor] = []
        tensors = self._live.tensors(self.number)
        # a row that nobody owns yet may be another optimizer's, until there was a whole round
        later = self.number > 0 and any(row.owned for row in self._live.current.rows)
        # of a tie that has lost its first name the tensor goes on under another one
        of = {id(row.tensor): row for row in before.values()}
        for row, tensor in zip(self._live.current.rows, tensors, strict=False):
            called, old = (row.name, *row.aliases), before.get(row.name) or of.get(id(tensor))
            unowned = later and not row.owned and old is None
            # autograd has no edge to a sparse parameter
            if unowned or tensor.layout is not torch.strided or not is_wanted(called, self._uses_of):
                continue
            if not tensor.requires_grad:
                self._frozen += [tensor] * self._is_due(row.name)
                continue
            if old is None or old.tensor is not tensor or (old.name, old.aliases) != (row.name, row.aliases):
                old = self._row(row, tensor, old)
            self.rows[row.name] = self._of[id(tensor)] = old
        if self.rows:
            self._find_holders(module)

    def _row(self, row: Row, tensor: Tensor, old: WatchedRow | None) -> WatchedRow:
        device = tensor.device
        if device not in self._budgets:
            self._budgets[device] = Budget(max(LEAST_BUDGET, share_of_device(device)))
        found = Contributions(tensor, self._budgets[device], always=bool(row.aliases))
        made = WatchedRow(row.name, row.aliases, tensor, found)
        made.open = self._is_due(row.name) if old is None else old.open
        return made

    def _is_due(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _find_holders(self, module: nn.Module) -> None:
        for place in places(module):
            row = self._of.get(id(place.tensor))
            if row is not None:
                row.holders.add(id(place.holder))
                self._held_by.setdefault(id(place.holder), []).append((place.key, row))
        for parent in module.modules():
            # what a weight is computed from is held beside the layer that uses it
            for derived in (getattr(parent, "parametrizations", None) or nn.Module()).children():
                if isinstance(derived, ParametrizationList):
                    for _, row in self._held_by.get(id(derived), ()):
                        row.holders.add(id(parent))

    @property
    def any_open(self) -> bool:
        """Whether there is a row to wait for, or may be one: frozen ones may be trained, lazy ones get a shape."""
        return self._live.sight.waits or bool(self._frozen) or any(row.open for row in self.rows.values())

    def thawed(self) -> bool:
        """Whether a row is trained now that was frozen when the rows were found."""
        return any(tensor.requires_grad for tensor in self._frozen)

    def row_of(self, tensor: Tensor) -> WatchedRow | None:
        """The row of a tensor, if its next step is split."""
        row = self._of.get(id(tensor))
        return row if row is not None and row.open else None

    def adopt(self, module: nn.Module) -> None:
        """A sharded parameter (FSDP2) has a whole one in its place while its module runs: it stands for the same row, as a new one does."""
        for key, row in self._held_by.get(id(module), ()):
            here = held_under(module, key)
            # a plain tensor in its place (`functional_call`) is someone's own
            if isinstance(here, nn.Parameter) and id(here) not in self._of:
                self._of[id(here)] = row
                self._stand_ins.append((row, weakref.ref(module), key, here))

    def has_changed(self, module: nn.Module | None) -> bool:
        """Whether the model has other modules than when the rows were found, or a tie came apart; of other tensors it is not asked."""
        if module is None or not self._live.sight.has_modules():
            return True
        # where others stand in for a while (shards, a functional call) they do under all names of a tie
        return self._live.sight.look_at_lists() is None and self._came_apart(module)

    def _came_apart(self, module: nn.Module) -> bool:
        tied = [row for row in self.rows.values() if row.aliases and not hasattr(row.tensor, "to_local")]
        here = {place.name: place.tensor for place in places(module)} if tied else {}
        found = [[tensor is row.tensor for name in (row.name, *row.aliases) if (tensor := here.get(name)) is not None] for row in tied]
        return any(any(same) and not all(same) for same in found)

    def was_swapped(self, row: WatchedRow) -> bool:
        """Whether another parameter was in the place of a row for a while: then what has come of it was added to what is the row's own."""
        # one that is sharded comes back when its module has run
        if hasattr(row.tensor, "to_local"):
            return False
        mine = [(there(), key, here) for whose, there, key, here in self._stand_ins if whose is row]
        return any(module is None or held_under(module, key) is not here for module, key, here in mine)

    def stepped(self, names: Collection[str], again: bool) -> None:
        """These rows have stepped.

        Args:
            names: Of rows, which need not be among those here.
            again: Whether their next step is split.
        """
        for row in self.still_open(names):
            row.found.reset()
            row.leaf = None
            row.stepped, row.passes = True, 0
        for name in names:
            if (here := self.rows.get(name)) is not None:
                here.open = again

    def let_go(self) -> None:
        """Hold nothing of autograd any more."""
        for row in self.rows.values():
            row.leaf = None

    def waits(self, inventory: Inventory, steps: int) -> bool:
        """Whether the split step of some row is still to come; of rows that nobody steps it is not waited for.

        Args:
            inventory: As it is now.
            steps: How many have begun since there was something to wait for.
        """
        waiting = [row for row in self.rows.values() if row.open and not row.stepped]
        if waiting and steps > 0:
            owned = {row.name for row in inventory.rows if row.owned} if steps < PATIENCE else set()
            for row in waiting:
                row.open = row.name in owned
        return any(row.open for row in waiting)

    def still_open(self, names: Collection[str]) -> list[WatchedRow]:
        """Those of these rows whose next step is split."""
        return [row for name in names if (row := self.rows.get(name)) is not None and row.open]


def is_wanted(names: Sequence[str], uses_of: Sequence[str]) -> bool:
    """Whether a row of these names is to be split."""
    patterns = [pattern for pattern in uses_of if pattern != TIED]
    return (TIED in uses_of and len(names) > 1) or any(map(fitting(patterns), names))


def check_uses_of(inventory: Inventory, waits: bool, uses_of: Sequence[str]) -> str | None:
    """What to tell of a choice of rows that means none; None if there is nothing to tell, or there will be more rows.

    Raises:
        ParamWatchError: No row fits the patterns.
    """
    rows = inventory.rows
    if waits or any(is_wanted((row.name, *row.aliases), uses_of) for row in rows):
        return None
    if list(uses_of) == [TIED]:
        return (
            f"no two names of {inventory.model} lead to one parameter; uses_of='*' also splits the gradients of parameters that are used "
            "several times in one backward pass"
        )
    some = ", ".join(repr(row.name) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    raise ParamWatchError(f"no row fits uses_of={list(uses_of)!r}; the names are {some}, and 'tied' stands for those with several")
