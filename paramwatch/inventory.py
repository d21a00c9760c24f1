"""The inventory of a living model: rows and ties as they are now, read again when the model has changed.

Between steps nothing here holds a parameter or refers to one weakly (a weak reference would break torch's swapping conversions); the
modules that hold them are referred to weakly, and a tensor is known by where it is held and by its identity.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

from paramwatch.columns import Pair
from paramwatch.guard import ParamWatchError
from paramwatch.measure import is_supported
from paramwatch.record import Inventory, Row
from paramwatch.rows import Place, chosen, held_under, is_lazy, places
from paramwatch.ties import find_ties

_Form: TypeAlias = tuple[torch.Size, torch.dtype, torch.device, bool]
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

    def __init__(self, module: nn.Module, include: Sequence[str], exclude: Sequence[str], layout: Sequence[Pair]) -> None:
        self._module = weakref.ref(module)
        self._model = type(module).__name__
        self._include, self._exclude = include, exclude
        self._layout = tuple(layout)
        self._owned: set[str] = set()
        self._seen: list[tuple[weakref.ref[nn.Module], str, int, _Form | None]] = []
        self._tree: list[tuple[weakref.ref[nn.Module], tuple[int, ...]]] = []
        self._lazy: list[tuple[weakref.ref[nn.Module], str]] = []
        self._first: list[int] = []
        self._position: dict[int, int] = {}
        self._foreign: set[int] = set()
        self._read(0)
        if not self.current.rows and not self._lazy:
            raise ParamWatchError(self._nothing_chosen(module))

    def tensors(self, step: int) -> list[nn.Parameter]:
        """The parameter tensor of each row, after reading the model again if it has changed; empty once the module is gone."""
        if self._changed():
            self._read_anew(step)
        held = [tensor for index in self._first if (tensor := self._held(index)) is not None]
        return held if len(held) == len(self._first) else []

    def held_by(self, params: Sequence[torch.Tensor], step: int) -> dict[str, nn.Parameter]:
        """The rows that an optimizer of these tensors steps, by name, in the order of the model; they are owned from now on.

        The model is read again if it has changed, and if one of the tensors was never seen before.
        """
        if self._changed():
            self._read_anew(step)
        if any(id(param) not in self._position and id(param) not in self._foreign for param in params):
            self._read(step)
            self._foreign.update(id(param) for param in params if id(param) not in self._position)
        news = {self.current.rows[row].name for row in self._rows_of(params)} - self._owned
        if news:
            self._owned |= news
            self._read(step)
        found = {self.current.rows[row].name: self._held(self._first[row]) for row in sorted(set(self._rows_of(params)))}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def refresh(self, step: int) -> None:
        """Read the model again, for what no cheap check can see (a frozen parameter added to a layer, memory that came to be shared)."""
        self._read(step)

    def _changed(self) -> bool:
        for parent_ref, children in self._tree:
            parent = parent_ref()
            if parent is None or _children(parent) != children:
                return self._module() is not None
        for ref, key, identity, form in self._seen:
            holder = ref()
            tensor = None if holder is None else held_under(holder, key)
            if tensor is None or id(tensor) != identity or (form is not None and _form(tensor) != form):
                return self._module() is not None
        for ref, key in self._lazy:
            holder = ref()
            tensor = None if holder is None else held_under(holder, key)
            if tensor is None or not is_lazy(tensor):
                return self._module() is not None
        return False

    def _held(self, index: int) -> nn.Parameter | None:
        ref, key, _, _ = self._seen[index]
        holder = ref()
        return None if holder is None else held_under(holder, key)

    def _rows_of(self, params: Sequence[torch.Tensor]) -> list[int]:
        return [row for param in params if (row := self._position.get(id(param), -1)) >= 0]

    def _read_anew(self, step: int) -> None:
        # a tensor that is gone may have left its identity to one of ours
        self._foreign = set()
        self._read(step)

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
        ties = find_ties(shown)
        group_of = {name: i for i, tie in reversed(list(enumerate(ties))) for name in tie.names}
        self._position = dict.fromkeys(grouped.keys() - watched, -1)
        self._seen, self._first = [], []
        rows: list[Row] = []
        for place in shown:
            key, first = id(place.tensor), id(place.tensor) not in self._position
            if first:
                self._position[key] = len(rows)
                self._first.append(len(self._seen))
                rows.append(self._row(grouped[key], group_of.get(place.name), before, step))
            self._seen.append((weakref.ref(place.holder), place.key, key, _form(place.tensor) if first else None))  # type: ignore[arg-type]
        self._lazy = [(weakref.ref(p.holder), p.key) for p in found if id(p.tensor) in lazy]
        # without this a layer that was replaced, and lives on elsewhere (at the other place of a tie), would not be missed
        self._tree = [(weakref.ref(parent), _children(parent)) for parent in module.modules() if parent._modules]
        self._foreign -= self._position.keys()
        names = tuple((place.name, self._position[id(place.tensor)]) for place in shown)
        read = Inventory(tuple(rows), names, ties, self._layout, self._model)
        if not before or read != self.current:
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


def _children(parent: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, parent._modules.values()))


def _form(tensor: torch.Tensor) -> _Form:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return name if is_supported(tensor) else f"{name} (unsupported)"
