"""Whether a model is still as it was read: asked at every step, and so of whole lists at once, which no loop of Python's goes through.

Beside `inventory`, which reads. Nothing here holds a parameter or refers to one weakly (a weak reference would break torch's swapping
conversions): a tensor is known by the module that holds it, its key there, and its identity.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, call, eq, itemgetter, methodcaller
from typing import Any

from torch import nn

from paramwatch.measure.structure import Structure
from paramwatch.rows import is_lazy

_parameters, _modules = attrgetter("_parameters"), attrgetter("_modules")
_shape, _dtype, _device = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")


class Sight:
    """Some modules of a model as they are now, with some of the parameters that they hold.

    Args:
        modules: Those that are looked at: what they hold themselves, and which modules are below them.
        wanted: Parameters that they hold.
        lazy: Identities of parameters that they hold, and that have no shape yet.
    """

    def __init__(self, modules: Iterable[nn.Module], wanted: Sequence[nn.Parameter], lazy: Collection[int] = ()) -> None:
        found = list(modules)
        # a scripted module has something less than dictionaries: methods alone, which takes several times longer
        plain = all(isinstance(registry, dict) for module in found for registry in (module._parameters, module._modules))
        self._keys_of: Callable[[Any], Iterable[str]] = iter if plain else methodcaller("keys")
        self._values_of: Callable[[Any], Iterable[Any]] = dict.values if plain else methodcaller("values")
        parents = [module for module in found if len(module._modules)]
        children = self._held(map(_modules, parents))
        reached = {*map(id, parents), *map(id, children)}
        asked = [*parents, *(module for module in found if id(module) not in reached)]
        self._refs, self._asked = [weakref.ref(module) for module in asked], [*map(id, asked)]
        self._parents = len(parents)
        self._children = [*map(id, children)]
        place = {identity: i for i, identity in reversed(list(enumerate((*self._asked, *self._children))))}
        holders = [module for module in found if len(module._parameters)]
        self._holders = _picked([place[id(module)] for module in holders])
        registries = [*map(_modules, parents)]
        self._module_counts, self._module_keys = [*map(len, registries)], [*chain.from_iterable(map(self._keys_of, registries))]
        registries = [*map(_parameters, holders)]
        self._counts, self._keys = [*map(len, registries)], [*chain.from_iterable(map(self._keys_of, registries))]
        self._identities = [*map(id, self._held(registries))]
        at: dict[int, int] = {}
        for i, identity in enumerate(self._identities):
            at.setdefault(identity, i)
        self._at = [at[id(tensor)] for tensor in wanted]
        self._lazy = [at[identity] for identity in lazy]
        self.waits = bool(self._lazy)
        """Whether there were parameters that had no shape yet."""
        self._childless = [weakref.ref(module) for module in found if not len(module._modules)]
        self._bare = [weakref.ref(module) for module in found if not len(module._parameters)]
        # of a tensor of tensors there is no shape to be had
        self._shaped = None if not any(tensor.is_nested for tensor in wanted) else [not tensor.is_nested for tensor in wanted]
        self._shapes = [*map(_shape, self._with_shape(wanted))]
        self._dtypes, self._devices = [*map(_dtype, wanted)], [*map(_device, wanted)]
        # for a model on a GPU the library need not be there
        structure = Structure.of(found) if any(tensor.is_cpu for tensor in wanted) else None
        self.is_there: Callable[[], bool] = self._is_there if structure is None else structure.is_there
        """Whether the modules hold what they held, and no more, whatever has become of its shape."""

    def look(self) -> list[nn.Parameter] | None:
        """The parameters; None if anything is no longer as it was."""
        held = self.look_at_lists()
        if held is None:
            return None
        if not all(is_lazy(held[i]) for i in self._lazy):
            return None
        wanted: list[nn.Parameter] = [held[i] for i in self._at]
        same = [*map(_dtype, wanted)] == self._dtypes and all(map(eq, map(_device, wanted), self._devices))
        return wanted if same and all(map(eq, map(_shape, self._with_shape(wanted)), self._shapes)) else None

    def _is_there(self) -> bool:
        return self.look_at_lists() is not None and not self.has_grown()

    def has_grown(self) -> bool:
        """Whether modules that held none have come to hold modules or parameters, where all that was read is as it was."""
        childless, bare = map(call, self._childless), map(call, self._bare)
        return any(map(len, map(_modules, childless))) or any(map(len, map(_parameters, bare)))

    def look_at_lists(self) -> list[Any] | None:
        """All parameters that the modules hold; None if anything holds something else, or under another name."""
        there = self._look_for_modules()
        if there is None:
            return None
        registries = [*map(_parameters, self._holders(there))]
        held = [*chain.from_iterable(map(self._values_of, registries))]
        if [*map(id, held)] != self._identities or [*map(len, registries)] != self._counts:
            return None
        return held if [*chain.from_iterable(map(self._keys_of, registries))] == self._keys else None

    def _look_for_modules(self) -> list[Any] | None:
        """The modules; None if they are others, in other places or under other names."""
        asked: list[Any] = [*map(call, self._refs)]
        if [*map(id, asked)] != self._asked:
            return None
        registries = [*map(_modules, asked[: self._parents])]
        children = [*chain.from_iterable(map(self._values_of, registries))]
        if [*map(id, children)] != self._children or [*map(len, registries)] != self._module_counts:
            return None
        return asked + children if [*chain.from_iterable(map(self._keys_of, registries))] == self._module_keys else None

    def _held(self, registries: Iterable[Any]) -> list[Any]:
        return [*chain.from_iterable(map(self._values_of, registries))]

    def has_modules(self) -> bool:
        """Whether the modules are those that they were. Of tensors others may stand in for a while (shards, a functional call)."""
        return self._look_for_modules() is not None

    def has_shapes(self) -> bool:
        """Whether a parameter that was lazy is not so any more."""
        held = self.look_at_lists()
        return held is not None and not all(is_lazy(held[i]) for i in self._lazy)

    def _with_shape(self, tensors: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        return tensors if self._shaped is None else [tensor for tensor, has in zip(tensors, self._shaped, strict=True) if has]


def _picked(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Takes what is at these places."""
    # of a single place it would take the thing itself
    return itemgetter(*places) if len(places) > 1 else lambda things: [things[place] for place in places]


def above(modules: Iterable[nn.Module], parents: Mapping[int, Sequence[weakref.ref[nn.Module]]]) -> list[nn.Module] | None:
    """These modules and all that they are in; None if one of those is gone.

    Args:
        modules: Some of a model.
        parents: Of each module, by its identity, the modules that hold it.
    """
    found = {id(module): module for module in modules}
    waiting = list(found.values())
    while waiting:
        for ref in parents.get(id(waiting.pop()), ()):
            parent = ref()
            if parent is None:
                return None
            if id(parent) not in found:
                found[id(parent)] = parent
                waiting.append(parent)
    return list(found.values())
