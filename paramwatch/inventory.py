"""The inventory of a living model: rows and ties as they are now, read again when the model has changed.

That a parameter is frozen or freed is no such change: some loops do it at every step (one network of two trains at a time), and each
inventory is files of its own.

Whether it has changed is asked of a `Sight`. Between steps nothing here holds a parameter or refers to one weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_not

import torch
from torch import nn

from paramwatch.changes import Changed, came_apart
from paramwatch.columns import Pair
from paramwatch.globs import fitting
from paramwatch.guard import ParamWatchError
from paramwatch.measure import is_supported
from paramwatch.memory import bytes_of
from paramwatch.record import Inventory, Row
from paramwatch.rows import Place, chosen, is_lazy, model_name, places, shape_of
from paramwatch.sight import Sight, above
from paramwatch.ties import find_ties


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
    sight: Sight
    """Tells whether it is still as it was read."""
    readings: int
    """How often the model was read."""

    def __init__(self, module: nn.Module, include: Sequence[str], exclude: Sequence[str], layout: Sequence[Pair]) -> None:
        self._module = weakref.ref(module)
        self._model = model_name(module)
        self._include, self._exclude = include, exclude
        self._layout = tuple(layout)
        self.changed = Changed()
        self.readings = 0
        self._owned: set[str] = set()
        self._position: dict[int, int] = {}
        self._named: dict[int, str] = {}
        self._foreign: set[int] = set()
        self._holdings: dict[tuple[int, ...], _Holding] = {}
        self._seen_at: int | None = None
        self._read(0)
        if not self.current.rows and not self.sight.waits:
            raise ParamWatchError(self._nothing_chosen(module))

    def now(self) -> Inventory:
        """The inventory with `trainable` as it is right now; in `current` it is as when the model was last read, or the row owned."""
        return self._as_they_are(self._look() or (), lambda row: True)

    def tensors(self, step: int) -> list[nn.Parameter]:
        """The parameter tensor of each row, after reading the model again if it has changed; empty once the module is gone."""
        held = self._look()
        if (held is None or self.sight.has_grown()) and self._module() is not None:
            # a tensor that is gone may have left its identity to one of ours
            self._foreign = set()
            self._read(step)
            held = self._look()
        self._seen_at = step
        return held or []

    def held_by(self, params: Sequence[torch.Tensor], step: int) -> dict[str, nn.Parameter]:
        """The rows that an optimizer of these tensors steps, by name, in the order of the model; they are owned from now on.

        The model is read again if it has changed, and if one of the tensors was never seen before. The whole of it is looked at once in
        a step: where each layer has an optimizer of its own, each looks at what it holds.
        """
        identities = tuple(map(id, params))
        known = self._holdings.get(identities)
        # of no rows there is nothing to look at, and a number that only others' steps come to stands still
        if known is not None and known.rows and step == self._seen_at:
            mine = known.look()
            if mine is not None:
                return dict(zip(known.names, mine, strict=True))
        tensors = self.tensors(step)
        known = self._holdings.get(identities)
        if known is None:
            if any(key not in self._position and key not in self._foreign for key in identities):
                self._read(step)
                self._foreign.update(key for key in identities if key not in self._position)
                tensors = self._look() or []
            if not tensors:
                return {}
            found = sorted({row for key in identities if (row := self._position.get(key, -1)) >= 0})
            if any(not self.current.rows[row].owned for row in found):
                self._own(found, tensors)
            if len(self._holdings) > len(tensors):  # of optimizers that were made anew again and again
                self._holdings = {}
            known = self._holdings[identities] = _Holding(found, [self.current.rows[row].name for row in found], self._partial)
        mine = tensors if len(known.rows) == len(tensors) else [tensors[row] for row in known.rows]
        return dict(zip(known.names, mine, strict=True))

    def holds_the_same(self, identities: tuple[int, ...], step: int) -> bool:
        """Whether the model still holds the same tensors under the same names; of the tensors themselves nothing is asked.

        Args:
            identities: Of what an optimizer holds; later in a step than the first one, only what leads to these is looked at.
            step: The number of the step.
        """
        if step == self._seen_at and (known := self._holdings.get(identities)) is not None:
            return known.is_there()
        if self.sight.waits or not self.sight.is_there():
            return False
        self._seen_at = step
        return True

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
        return self.sight.look()

    def _partial(self, rows: Sequence[int]) -> Sight | None:
        """Of the tensors of these rows, and of what leads to them."""
        tensors = self._look()
        holders = [module for row in rows for ref in self._holders[row] if (module := ref()) is not None]
        modules = None if tensors is None else above(holders, self._parents)
        return None if tensors is None or modules is None else Sight(modules, [tensors[row] for row in rows])

    def _own(self, found: Sequence[int], tensors: Sequence[nn.Parameter]) -> None:
        """These rows are owned; the others that are not may have been frozen since the model was read."""
        current = self._as_they_are(tensors, lambda row: not row.owned)
        rows = list(current.rows)
        self._owned |= {rows[row].name for row in found}
        for row in found:
            rows[row] = replace(rows[row], owned=True)
        self.current = replace(current, rows=tuple(rows))

    def _as_they_are(self, tensors: Sequence[nn.Parameter], asked: Callable[[Row], bool]) -> Inventory:
        """The inventory with `trainable` as it is now, of the rows that are asked."""
        rows = self.current.rows
        now = [tensor.requires_grad for tensor in tensors]
        made = [replace(row, trainable=new) if row.trainable != new and asked(row) else row for row, new in zip(rows, now, strict=False)]
        return replace(self.current, rows=tuple(made)) if len(made) == len(rows) and any(map(is_not, made, rows)) else self.current

    def _read(self, step: int) -> None:
        module = self._module()
        if module is None:
            return
        self.readings += 1
        found = places(module)
        held = [place.tensor for place in found]
        grouped: dict[int, list[Place]] = {}
        for place, tensor in zip(found, held, strict=True):
            grouped.setdefault(id(tensor), []).append(place)
        tensors: dict[int, nn.Parameter] = {id(tensor): tensor for tensor in held if tensor is not None}
        include, exclude = fitting(self._include), fitting(self._exclude)
        watched = {key for key, group in grouped.items() if chosen([place.name for place in group], include, exclude)}
        lazy = {key for key in watched if is_lazy(tensors[key])}
        shown = [(place, id(tensor)) for place, tensor in zip(found, held, strict=True) if id(tensor) in watched and id(tensor) not in lazy]
        before = {row.name: row for row in self.current.rows} if hasattr(self, "current") else {}
        self.changed.apart += came_apart(before.values(), {place.name: id(tensor) for place, tensor in zip(found, held, strict=True)}, step)
        known = {name: key for key, name in self._named.items()}
        # whoever holds what had a name need not hold what has it now
        self._owned -= {group[0].name for key, group in grouped.items() if known.get(group[0].name, key) != key}
        ties = find_ties([place for place, _ in shown])
        group_of = {name: i for i, tie in reversed(list(enumerate(ties))) for name in tie.names}
        keys = list(dict.fromkeys(key for _, key in shown))
        rows = tuple(self._row(grouped[key], tensors[key], group_of.get(grouped[key][0].name), before, step) for key in keys)
        self._position = dict.fromkeys(grouped.keys() - watched, -1) | {key: i for i, key in enumerate(keys)}
        self._foreign -= self._position.keys()
        self._named = {key: group[0].name for key, group in grouped.items()}
        chosen_ones = [tensors[key] for key in keys]
        self.changed.read(zip(rows, chosen_ones, strict=True), grouped.keys())
        self._see(module, chosen_ones, [grouped[key] for key in keys], lazy)
        names = tuple((place.name, self._position[key]) for place, key in shown)
        read = Inventory(rows, names, ties, self._layout, self._model)
        if not before or read != self.current:
            self.current = read
            self.current = self._as_they_are(chosen_ones, lambda row: True)

    def _see(self, module: nn.Module, tensors: Sequence[nn.Parameter], groups: Sequence[Sequence[Place]], lazy: Collection[int]) -> None:
        """From now on the model is compared with what it is now."""
        modules = list(module.modules())
        refs = {id(each): weakref.ref(each) for each in modules}
        self._parents: dict[int, list[weakref.ref[nn.Module]]] = {}
        for each in modules:
            for child in each._modules.values():
                self._parents.setdefault(id(child), []).append(refs[id(each)])
        self._holders = [[refs[id(place.holder)] for place in group] for group in groups]
        self.sight, self._holdings = Sight(modules, tensors, lazy), {}

    def _row(self, group: Sequence[Place], tensor: nn.Parameter, tie_group: int | None, before: Mapping[str, Row], step: int) -> Row:
        """The row of a tensor; the one that there was, if nothing but whether it is trainable is another."""
        first, *others = group
        name, shape, dtype, device = first.name, shape_of(tensor), _dtype(tensor), str(tensor.device)
        aliases, module_type = tuple(place.name for place in others), type(first.holder).__name__
        owned, numel = name in self._owned, tensor.numel()
        described = (aliases, first.real_name, module_type, shape, dtype, device, owned, tie_group)
        old = before.get(name)
        if old is not None and described == _described(old):
            return old
        same = old is not None and old.shape == shape and old.dtype == dtype
        return Row(
            name=name,
            aliases=aliases,
            real_name=first.real_name,
            module=name.rpartition(".")[0],
            module_type=module_type,
            shape=shape,
            dtype=dtype,
            device=device,
            numel=numel,
            bytes=bytes_of(tensor),
            trainable=tensor.requires_grad,
            owned=owned,
            tie_group=tie_group,
            from_step=old.from_step if same and old is not None else step,
        )

    def _nothing_chosen(self, module: nn.Module) -> str:
        names = [place.name for place in places(module)]
        if not names:
            return f"{self._model} has no parameters, so there is nothing to watch"
        some = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
        return f"no row matches include={list(self._include)!r} with exclude={list(self._exclude)!r}; the names are {some}"


@dataclass
class _Holding:
    """What an optimizer of some tensors holds."""

    rows: Sequence[int]
    names: Sequence[str]
    see: Callable[[Sequence[int]], Sight | None]
    sight: Sight | None = None

    def look(self) -> list[nn.Parameter] | None:
        """Its tensors; None if they, or what leads to them, are no longer as they were read."""
        self.sight = self.sight or self.see(self.rows)
        return None if self.sight is None else self.sight.look()

    def is_there(self) -> bool:
        """Whether what leads to its tensors is as it was read."""
        self.sight = self.sight or self.see(self.rows)
        return self.sight is not None and self.sight.is_there()


def _described(row: Row) -> tuple[object, ...]:
    return row.aliases, row.real_name, row.module_type, row.shape, row.dtype, row.device, row.owned, row.tie_group


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return name if is_supported(tensor) else f"{name} (unsupported)"
