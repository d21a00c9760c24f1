"""What changed from one reading of a model to the next that training may not survive: ties that came apart, rows that optimizers lost.

A tensor is known by its identity, as in `inventory`, and identities are used again once a tensor is gone. That a tensor is the row it seems
to have been is certain of one that an optimizer has held since it was a row, and of one that lies in the same memory: of that a weak
reference is kept, which keeps neither tensor nor memory alive, and lets nothing else have the same name.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

from paramwatch.record import CameApart, Inventory, Lost, Row


def came_apart(rows: Iterable[Row], holds: Mapping[str, int], step: int) -> list[CameApart]:
    """Which of these rows have become several tensors.

    Args:
        rows: As they were.
        holds: The identity of the tensor that is now under each name; a name that is gone came apart from nothing.
        step: The first step that finds them so.
    """
    found = []
    for row in rows:
        if row.aliases:
            pieces: dict[int, str] = {}
            for name in (row.name, *row.aliases):
                if name in holds:
                    pieces.setdefault(holds[name], name)
            if len(pieces) > 1:
                found.append(CameApart(tuple(pieces.values()), step))
    return found


class Changed:
    """What was noticed: ties that came apart, and tensors that left the model while an optimizer goes on stepping them."""

    def __init__(self) -> None:
        self.apart: list[CameApart] = []
        self.lost: list[Lost] = []
        self._readings = 0
        self._here: dict[int, _Known] = {}
        self._gone: dict[int, _Known] = {}
        self._holders: dict[int, _Holder] = {}

    def read(self, rows: Iterable[tuple[Row, Tensor]], there: Collection[int]) -> None:
        """The model was read.

        Args:
            rows: What is watched.
            there: The identities of all tensors in the model.
        """
        self._readings += 1
        held = {key for holder in self._holders.values() if holder.optimizer() is not None for key in holder.rows}
        gone = self._gone | self._here
        self._gone = {key: known for key, known in gone.items() if key not in there and (key in held or known.lives)}
        self._here = {id(tensor): _Known((row.name, *row.aliases), _memory(tensor)) for row, tensor in rows}

    def look(self, optimizer: Optimizer, params: Sequence[Tensor], rows: Collection[str], inventory: Inventory, step: int) -> None:
        """Notice what is gone and held by an optimizer that is about to step, each tensor once.

        A tensor whose names have all passed to rows of the same optimizer is no loss: a tie that was made anew, a layer that was replaced
        and added.

        Args:
            optimizer: Held weakly.
            params: All its tensors.
            rows: Those of them that are rows, by name.
            inventory: The rows of now.
            step: Which step it is.
        """
        holder = self._holder(optimizer)
        if holder.seen == (self._readings, len(params)):
            return
        holder.seen = self._readings, len(params)
        gone = [(param, self._gone[id(param)]) for param in params if id(param) in self._gone]
        lost = [known for param, known in gone if not known.said and (id(param) in holder.rows or known.was(param))]
        holder.rows = {id(param) for param in params if id(param) in self._here or id(param) in holder.rows}
        if lost:
            now = {name: inventory.rows[row].name for name, row in inventory.names}
            lost = [known for known in lost if not known.passed_to(rows, now)]
        for known in lost:
            known.said = True
        if lost:
            self.lost.append(Lost(type(optimizer).__name__, tuple(known.names[0] for known in lost), step))

    def take(self) -> tuple[list[CameApart], list[Lost]]:
        """What was noticed since this was last asked."""
        found = self.apart, self.lost
        self.apart, self.lost = [], []
        return found

    def _holder(self, optimizer: Optimizer) -> _Holder:
        holder = self._holders.get(id(optimizer))
        if holder is None or holder.optimizer() is not optimizer:
            self._holders = {key: other for key, other in self._holders.items() if other.optimizer() is not None}
            holder = self._holders[id(optimizer)] = _Holder(weakref.ref(optimizer))
        return holder


@dataclass
class _Holder:
    optimizer: weakref.ref[Optimizer]
    seen: tuple[int, int] = (0, 0)
    """The reading, and the number of tensors, that it was last looked at with."""
    rows: set[int] = field(default_factory=set)
    """Those of its tensors that are rows, or were when it held them already: while it does, their identities are nobody else's."""


@dataclass
class _Known:
    """A tensor that is a row, or was."""

    names: tuple[str, ...]
    memory: StorageWeakRef | None
    said: bool = False

    @property
    def lives(self) -> bool:
        """Whether it may still be found by its memory."""
        return self.memory is not None and not self.memory.expired()

    def was(self, tensor: Tensor) -> bool:
        """Whether this is it, of a tensor with its identity."""
        return self.memory is not None and (memory := _memory(tensor)) is not None and memory.cdata == self.memory.cdata

    def passed_to(self, rows: Collection[str], now: Mapping[str, str]) -> bool:
        """Whether its names lead to these rows, by what they lead to now."""
        leads = [now[name] for name in self.names if name in now]
        return bool(leads) and all(row in rows for row in leads)


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    """Of tensors that have memory of their own; a subclass may hold others, a sparse one holds two."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return StorageWeakRef(tensor.untyped_storage()) if plain and tensor.device.type in ("cpu", "cuda", "meta") else None
