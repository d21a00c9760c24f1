"""Which module call made which operation: module hooks only note autograd's sequence number when a call is entered and when it is left.

An operation whose number lies between the two was made in that call. Two whole numbers a call are all that the forward pass costs. The
numbers are of one thread, and so is a `Calls`.
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from paramwatch.uses.graph import Use
from paramwatch.uses.sites import Site
from paramwatch.uses.ways import Node, marks_of

_OPEN = 2**64
"""Stands for the number at which a call will be left."""

_RECALLED = 16
"""Outermost calls that are known also where the graph of what they returned is gone."""


class Names:
    """What the modules of a model are called: every name of each, without those of wrappers."""

    def __init__(self, found: Sequence[tuple[str, nn.Module]]) -> None:
        self.read(found)

    def read(self, found: Sequence[tuple[str, nn.Module]]) -> None:
        """The model has changed."""
        self._known: dict[int, tuple[weakref.ref[nn.Module], list[str]]] = {}
        for name, module in found:
            self._known.setdefault(id(module), (weakref.ref(module), []))[1].append(name)

    def of(self, module: nn.Module) -> list[str] | None:
        """The names of a module in the order of the model; None if it is not of the model."""
        known = self._known.get(id(module))
        return known[1] if known is not None and known[0]() is module else None


@dataclass(slots=True)
class Call:
    """One call of a module."""

    path: str
    """The dotted name under which it was called, "" for the model itself."""
    identity: int
    """Of the module, which is not held: a model that is let go of must not live on here."""
    enter: int
    exit: int
    parent: int
    """Position of the call around it, -1 for an outermost one."""
    k: int
    """How many calls of this path there were before in the outermost call."""
    derives: bool
    """Whether it computes a parameter from others (weight norm), which is not a use of them."""
    turn: int | None = None
    """Of an outermost call: which one it is, of all threads."""


class _Tree:
    """An outermost call and all calls inside it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.enters: list[int] = []
        self.counts = Counter[str]()
        """Calls by path."""
        self.turns = Counter[tuple[int, int]]()
        """Calls by who has called, and whom."""
        self.roots: list[weakref.ref[set[Any]]] = []
        """Gone with the graph of what was returned."""

    def where(self, number: int) -> Call | None:
        """The innermost call in which the operation of this number was made."""
        at = bisect_right(self.enters, number) - 1
        while at >= 0:
            call = self.calls[at]
            if call.enter <= number < call.exit:
                return call
            at = call.parent
        return None


class Calls:
    """The module calls of one thread since a split step was armed, and the name of the place in which an operation was made."""

    def __init__(self, names: Names, turns: Iterator[int]) -> None:
        self._names, self._next = names, turns
        self._trees: list[_Tree] = []
        self._stack: list[tuple[int, nn.Module]] = []

    def __len__(self) -> int:
        """How many are known."""
        return sum(len(tree.calls) for tree in self._trees)

    @property
    def inside(self) -> bool:
        """Whether a call is going on."""
        return bool(self._stack)

    def enter(self, module: nn.Module, names: list[str]) -> None:
        """A module is called."""
        if any(entered is module for _, entered in self._stack):
            self._forget_left(module)
        if not self._stack:
            self._forget_gone()
            self._trees.append(_Tree())
        tree, path = self._trees[-1], self._path(module, names)
        k = tree.counts[path]
        tree.counts[path] += 1
        parent = self._stack[-1][0] if self._stack else -1
        self._stack.append((len(tree.calls), module))
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # private, looked for before arming
        tree.enters.append(number)
        tree.calls.append(Call(path, id(module), number, _OPEN, parent, k, isinstance(module, ParametrizationList)))

    def leave(self, module: nn.Module) -> Call | None:
        """A module has returned, or raised; gives the call if it was an outermost one."""
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # private, looked for before arming
        # calls inside that were left by a KeyboardInterrupt have not said so
        while self._stack and self._stack[-1][1] is not module:
            self._left(number)
        if not self._stack:
            return None
        call = self._left(number)
        return None if self._stack else call

    def returned(self, roots: Iterable[Node]) -> None:
        """The outermost call that was left last has made these."""
        self._trees[-1].roots = [weakref.ref(marks_of(root)) for root in roots]

    def forget_outermost(self) -> None:
        """The outermost call that was left last made nothing that has a gradient."""
        del self._trees[-1]

    def _left(self, number: int) -> Call:
        call = self._trees[-1].calls[self._stack.pop()[0]]
        call.exit = number
        return call

    def _forget_gone(self) -> None:
        """Nobody comes to calls any more whose graph is gone, as of an evaluation; something else of the latest may still be held."""
        old, latest = self._trees[:-_RECALLED], self._trees[-_RECALLED:]
        self._trees = [tree for tree in old if any(root() is not None for root in tree.roots)] + latest

    def _forget_left(self, module: nn.Module) -> None:
        """Calls that a KeyboardInterrupt has left have not said so; of those that go on each has a frame, and one is about to begin."""
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # private, looked for before arming
        frame: FrameType | None = sys._getframe()
        going_on = -1
        while frame is not None:
            going_on += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
            frame = frame.f_back
        while sum(entered is module for _, entered in self._stack) > max(going_on, 0):
            self._left(number)

    def outermost(self, number: int) -> Call | None:
        """The outermost call in which the operation of this number was made."""
        tree = self._around(number)
        return None if tree is None or tree.where(number) is None else tree.calls[0]

    def turn_of(self, outermost: Call) -> int:
        """Which of the outermost calls of all threads that is."""
        if outermost.turn is None:
            outermost.turn = next(self._next)
        return outermost.turn

    def site(self, number: int, label: str) -> Site:
        """Where the operation of this number was made: in a call, or outside of all."""
        call = self.outermost(number)
        return Site("loss", 0, "", number, label) if call is None else Site("call", self.turn_of(call), call.path, number, label)

    def deriving(self) -> list[tuple[int, int]]:
        """The intervals of the calls that compute parameters from others, in order."""
        return [(call.enter, call.exit) for tree in self._trees for call in tree.calls if call.derives and call.exit != _OPEN]

    def labels(self, uses: Sequence[Use], holders: Collection[int]) -> list[str]:
        """The places of the uses of a parameter, in words.

        Args:
            uses: In the order of the forward pass.
            holders: Identities of the modules that hold the parameter: elsewhere the operation is named as well.
        """
        merged = [f" [merged in {use.operation}]" if use.merges else "" for use in uses]
        labels = [self._label(use.number, use.operation, holders) + more for use, more in zip(uses, merged, strict=True)]
        return numbered(labels, [self.outermost(use.number) for use in uses])

    def _label(self, number: int, operation: str, holders: Collection[int]) -> str:
        tree = self._around(number)
        call = None if tree is None else tree.where(number)
        if tree is None or call is None:
            return "(outside)"
        label = call.path or "(root)"
        if call.identity not in holders:
            label += f":{operation}"
        return f"{label}@{call.k}" if tree.counts[call.path] > 1 else label

    def _around(self, number: int) -> _Tree | None:
        """That of the last outermost call that was entered before."""
        at = bisect_right(self._trees, number, key=lambda tree: tree.enters[0])
        return self._trees[at - 1] if at else None

    def _path(self, module: nn.Module, names: list[str]) -> str:
        """The name by which a module is called. Of several it is told where the caller runs its children one after the other."""
        if len(names) == 1 or not self._stack:
            return names[0]
        tree, (at, parent) = self._trees[-1], self._stack[-1]
        mine = [name for name, child in parent._modules.items() if child is module]
        if not mine:
            return names[0]
        base = f"{path}." if (path := tree.calls[at].path) else ""
        turn = tree.turns[at, id(module)]
        tree.turns[at, id(module)] += 1
        # anyone else's forward may call them in any order: the second call need not be the second name
        return base + mine[turn % len(mine) if _calls_in_turn(parent) else 0]


def _calls_in_turn(module: nn.Module) -> bool:
    """Whether its forward is that of `nn.Sequential`, perhaps behind Lightning's, which only passes it on."""
    for cls in () if "forward" in vars(module) else type(module).__mro__:
        lightning = cls.__name__ == "LightningModule" and cls.__module__.startswith(("pytorch_lightning.", "lightning."))
        if "forward" in vars(cls) and not lightning:
            return vars(cls)["forward"] is nn.Sequential.forward
    return False


def numbered(labels: Sequence[str], within: Sequence[Call | None]) -> list[str]:
    """The same, those that occur several times in one outermost call with a number."""
    # not by what a call is, which may be entered twice at one number
    keys = [(label, id(call)) for label, call in zip(labels, within, strict=True)]
    count, seen, found = Counter(keys), Counter[tuple[str, int]](), []
    for label, key in zip(labels, keys, strict=True):
        found.append(f"{label}#{seen[key]}" if count[key] > 1 else label)
        seen[key] += 1
    return found
