"""The inventory of a living model: rows and ties as they are now, read again when the model has changed.

That a parameter is frozen or freed is no such change: some loops do it at every step (one network of two trains at a time), and each
inventory is files of its own.

Between steps nothing here holds a parameter or refers to one weakly (a weak reference would break torch's swapping conversions); the
modules that hold them are referred to weakly, and a tensor is known by where it is held and by its identity.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn

from paramwatch.changes import Changed, came_apart
from paramwatch.columns import Pair
from paramwatch.guard import ParamWatchError
from paramwatch.measure import is_supported
from paramwatch.record import Inventory, Row
from paramwatch.rows import Place, chosen, held_under, is_lazy, places
from paramwatch.ties import find_ties

_Form: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
"""What may change of a tensor that stays the same object."""


class LiveInventory:
    """Keeps `current`, the inventory of a module, true while the module changes.

    Args:
        module: Held weakly.
        include: Glob patterns; a row is watched if one of its names fits one of them.
        exclude: Glob patterns; a row is not watched if one of its names fits one of them.
        layout: The (kind, part) pairs that are recorded.

    Raises:
        ParamWatchError: The module has no parameters, or no row is chosen.
    """

    current: Inventory
    changed: Changed
    """What training may not survive."""

    def __init__(self, module: nn.Module, include: Sequence[str], exclude: Sequence[str], layout: Sequence[Pair]) -> None:
        self._module = weakref.ref(module)
        self._model = type(module).__name__
        self._include, self._exclude = include, exclude
        self._layout = tuple(layout)
        self.changed = Changed()
        self._owned: set[str] = set()
        self._seen: list[tuple[weakref.ref[nn.Module], str, int, _Form | None]] = []
        self._tree: list[tuple[weakref.ref[nn.Module], tuple[int, ...]]] = []
        self._lazy: list[tuple[weakref.ref[nn.Module], str]] = []
        self._position: dict[int, int] = {}
        self._named: dict[int, str] = {}
        self._foreign: set[int] = set()
        self._read(0)
        if not self.current.rows and not self._lazy:
            raise ParamWatchError(self._nothing_chosen(module))

    def now(self) -> Inventory:
        """The inventory with `trainable` as it is right now; in `current` it is as when the model was last read, or the row owned."""
        tensors = self._look()
        if not tensors:
            return self.current
        rows = zip(self.current.rows, tensors, strict=True)
        return replace(self.current, rows=tuple(replace(row, trainable=tensor.requires_grad) for row, tensor in rows))

    def tensors(self, step: int) -> list[nn.Parameter]:
        """The parameter tensor of each row, after reading the model again if it has changed; empty once the module is gone."""
        held = self._look()
        if held is None and self._module() is not None:
            # a tensor that is gone may have left its identity to one of ours
            self._foreign = set()
            self._read(step)
            held = self._look()
        return held or []

    def held_by(self, params: Sequence[torch.Tensor], step: int) -> dict[str, nn.Parameter]:
        """The rows that an optimizer of these tensors steps, by name, in the order of the model; they are owned from now on.

        The model is read again if it has changed, and if one of the tensors was never seen before.
        """
        tensors = self.tensors(step)
        if any(id(param) not in self._position and id(param) not in self._foreign for param in params):
            self._read(step)
            self._foreign.update(id(param) for param in params if id(param) not in self._position)
            tensors = self._look() or []
        if not tensors:
            return {}
        found = sorted({row for param in params if (row := self._position.get(id(param), -1)) >= 0})
        rows = self.current.rows
        if any(not rows[row].owned for row in found):
            self._own(found, tensors)
        return {rows[row].name: tensors[row] for row in found}

    def refresh(self, step: int) -> None:
        """Read the model again, for what no cheap check can see (a frozen parameter added to a layer, memory that came to be shared)."""
        self._read(step)

    def holds(self, identity: int) -> bool:
        """Whether a tensor of this identity was in the model when it was last read."""
        return identity in self._position

    def glance(self) -> list[nn.Parameter]:
        """The parameter tensors that the model has now, for which it is not read; those of no row may be among them."""
        module, held = self._module(), self._look()
        return held if held is not None else [] if module is None else list(module.parameters())

    def named(self, now: bool) -> Mapping[int, str]:
        """The name of each tensor, watched or not, by identity: as the model is now, for which it is not read, or as it was last read."""
        module = self._module()
        if not now or module is None or self._look() is not None:
            return self._named
        named: dict[int, str] = {}
        for place in places(module):
            named.setdefault(id(place.tensor), place.name)
        return named

    def _look(self) -> list[nn.Parameter] | None:
        """The tensor of each row; None if the model is no longer as it was read."""
        for parent_ref, children in self._tree:
            parent = parent_ref()
            if parent is None or _children(parent) != children:
                return None
        held = []
        for ref, key, identity, form in self._seen:
            holder = ref()
            tensor = None if holder is None else held_under(holder, key)
            if tensor is None or id(tensor) != identity:
                return None
            if form is not None:
                if _form(tensor) != form:
                    return None
                held.append(tensor)
        for ref, key in self._lazy:
            holder = ref()
            tensor = None if holder is None else held_under(holder, key)
            if tensor is None or not is_lazy(tensor):
                return None
        return held

    def _own(self, found: Sequence[int], tensors: Sequence[nn.Parameter]) -> None:
        """These rows are owned; the others that are not may have been frozen since the model was read."""
        rows = self.current.rows
        self._owned |= {rows[row].name for row in found}
        known = ((row, row.trainable if row.owned else tensor.requires_grad) for row, tensor in zip(rows, tensors, strict=True))
        made = tuple(replace(row, owned=row.name in self._owned, trainable=trainable) for row, trainable in known)
        self.current = replace(self.current, rows=made)

    def _read(self, step: int) -> None:
        module = self._module()
        if module is None:
            return
        grouped: dict[int, list[Place]] = {}
        found = places(module)
        for place in found:
            grouped.setdefault(id(place.tensor), []).append(place)
        watched = {key for key, group in grouped.items() if chosen((p.name for p in group), self._include, self._exclude)}
        lazy = {key for key in watched if is_lazy(grouped[key][0].tensor)}  # type: ignore[arg-type]
        shown = [place for place in found if id(place.tensor) in watched - lazy]
        before = {row.name: row for row in self.current.rows} if hasattr(self, "current") else {}
        self.changed.apart += came_apart(before.values(), {place.name: id(place.tensor) for place in found}, step)
        known = {name: key for key, name in self._named.items()}
        # whoever holds what had a name need not hold what has it now
        self._owned -= {group[0].name for key, group in grouped.items() if known.get(group[0].name, key) != key}
        ties = find_ties(shown)
        group_of = {name: i for i, tie in reversed(list(enumerate(ties))) for name in tie.names}
        self._position = dict.fromkeys(grouped.keys() - watched, -1)
        self._seen = []
        rows: list[Row] = []
        for place in shown:
            key, first = id(place.tensor), id(place.tensor) not in self._position
            if first:
                self._position[key] = len(rows)
                rows.append(self._row(grouped[key], group_of.get(place.name), before, step))
            self._seen.append((weakref.ref(place.holder), place.key, key, _form(place.tensor) if first else None))  # type: ignore[arg-type]
        self._lazy = [(weakref.ref(p.holder), p.key) for p in found if id(p.tensor) in lazy]
        # without this a layer that was replaced, and lives on elsewhere (at the other place of a tie), would not be missed
        self._tree = [(weakref.ref(parent), _children(parent)) for parent in module.modules() if parent._modules]
        self._foreign -= self._position.keys()
        self._named = {key: group[0].name for key, group in grouped.items()}
        here = [(rows[at], grouped[key][0].tensor) for key, at in self._position.items() if at >= 0]
        self.changed.read(here, grouped.keys())  # type: ignore[arg-type]
        names = tuple((place.name, self._position[id(place.tensor)]) for place in shown)
        read = Inventory(tuple(rows), names, ties, self._layout, self._model)
        if not before or not _alike(read, self.current):
            self.current = read

    def _row(self, group: Sequence[Place], tie_group: int | None, before: dict[str, Row], step: int) -> Row:
        first, tensor = group[0], group[0].tensor
        assert tensor is not None
        old = before.get(first.name)
        shape, dtype = tuple(tensor.shape), _dtype(tensor)
        same = old is not None and old.shape == shape and old.dtype == dtype
        return Row(
            name=first.name,
            aliases=tuple(place.name for place in group[1:]),
            real_name=first.real_name,
            module=first.name.rpartition(".")[0],
            module_type=type(first.holder).__name__,
            shape=shape,
            dtype=dtype,
            device=str(tensor.device),
            numel=tensor.numel(),
            bytes=tensor.numel() * tensor.element_size(),
            trainable=tensor.requires_grad,
            owned=first.name in self._owned,
            tie_group=tie_group,
            from_step=old.from_step if same and old is not None else step,
        )

    def _nothing_chosen(self, module: nn.Module) -> str:
        names = [place.name for place in places(module)]
        if not names:
            return f"{self._model} has no parameters, so there is nothing to watch"
        some = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
        return f"no row matches include={list(self._include)!r} with exclude={list(self._exclude)!r}; the names are {some}"


def _alike(read: Inventory, known: Inventory) -> bool:
    """Whether two inventories differ in nothing but which rows are trainable."""
    if len(read.rows) != len(known.rows):
        return False
    rows = tuple(replace(row, trainable=old.trainable) for row, old in zip(read.rows, known.rows, strict=True))
    return replace(read, rows=rows) == known


def _children(parent: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, parent._modules.values()))


def _form(tensor: torch.Tensor) -> _Form:
    return tensor.shape, tensor.dtype, tensor.device


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return name if is_supported(tensor) else f"{name} (unsupported)"
