"""Whether a model is still as it was read: asked at every step, and so of whole lists at once, which no loop of Python's goes through.

Beside `inventory`, which reads. Nothing here holds a parameter or refers to one weakly (a weak reference would break torch's swapping
conversions): a tensor is known by the module that holds it, its key there, and its identity.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, eq, methodcaller
from typing import Any

from torch import nn

from paramwatch.rows import is_lazy

# a scripted module has something less than a dictionary: it has methods alone
_keys, _values = methodcaller("keys"), methodcaller("values")
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
        self._holders = _Side([module for module in found if len(module._parameters)], _parameters)
        self._parents = _Side([module for module in found if len(module._modules)], _modules)
        at: dict[int, int] = {}
        for i, identity in enumerate(self._holders.identities):
            at.setdefault(identity, i)
        self._at = [at[id(tensor)] for tensor in wanted]
        self._lazy = [at[identity] for identity in lazy]
        # of a tensor of tensors there is no shape to be had
        self._shaped = None if not any(tensor.is_nested for tensor in wanted) else [not tensor.is_nested for tensor in wanted]
        self._shapes = [*map(_shape, self._with_shape(wanted))]
        self._dtypes, self._devices = [*map(_dtype, wanted)], [*map(_device, wanted)]

    def look(self) -> list[nn.Parameter] | None:
        """The parameters; None if anything is no longer as it was."""
        if self._parents.look() is None or (held := self._holders.look()) is None:
            return None
        if not all(is_lazy(held[i]) for i in self._lazy):
            return None
        wanted: list[nn.Parameter] = [held[i] for i in self._at]
        same = [*map(_dtype, wanted)] == self._dtypes and all(map(eq, map(_device, wanted), self._devices))
        return wanted if same and all(map(eq, map(_shape, self._with_shape(wanted)), self._shapes)) else None

    def is_there(self) -> bool:
        """Whether the modules hold what they held, whatever has become of its shape."""
        return self._parents.look() is not None and self._holders.look() is not None

    @property
    def waits(self) -> bool:
        """Whether there were parameters that had no shape yet."""
        return bool(self._lazy)

    def has_modules(self) -> bool:
        """Whether the modules are those that they were. Of tensors others may stand in for a while (shards, a functional call)."""
        return self._parents.look() is not None

    def has_shapes(self) -> bool:
        """Whether a parameter that was lazy is not so any more."""
        held = self._holders.look()
        return held is not None and not all(is_lazy(held[i]) for i in self._lazy)

    def _with_shape(self, tensors: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        return tensors if self._shaped is None else [tensor for tensor, has in zip(tensors, self._shaped, strict=True) if has]


class _Side:
    """What some modules hold of one kind: parameters, or modules."""

    def __init__(self, modules: Sequence[nn.Module], registry: attrgetter[Any]) -> None:
        self._registry = registry
        self._refs = [weakref.ref(module) for module in modules]
        self._modules = [*map(id, modules)]
        held = [*map(registry, modules)]
        self._counts = [*map(len, held)]
        self._keys = [*chain.from_iterable(map(_keys, held))]
        self.identities = [*map(id, chain.from_iterable(map(_values, held)))]

    def look(self) -> list[Any] | None:
        """All that they hold; None if it is not what it was."""
        modules: list[Any] = [ref() for ref in self._refs]
        if [*map(id, modules)] != self._modules:
            return None
        registries = [*map(self._registry, modules)]
        held = [*chain.from_iterable(map(_values, registries))]
        if [*map(id, held)] != self.identities or [*map(len, registries)] != self._counts:
            return None
        return held if [*chain.from_iterable(map(_keys, registries))] == self._keys else None


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
