"""Whether modules hold what they held, asked of all in one call of the compiled library: the fast form of what `sight` asks of lists.

The library walks the dictionaries of the modules themselves and compares identities. It is for CPython, whose objects lie where their `id`
says, and whose one lock keeps others from the dictionaries meanwhile.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Sequence
from functools import cache
from operator import call
from typing import Any

import numpy as np
from torch import nn

from paramwatch.measure.compiler import library

_API = ("PyObject_GenericGetAttr", "PyDict_Size", "PyDict_Next", "Py_DecRef", "PyErr_Clear")
"""What the library calls of Python, as structure.cc has it."""

_REGISTRIES = ("_modules", "_parameters")


class Structure:
    """What some modules hold now: modules and parameters, of which none is held here.

    Args:
        order: The modules, each after one that holds it, but for some at the beginning that are in no other.
        roots: How many those are.
    """

    def __init__(self, order: Sequence[nn.Module], roots: int) -> None:
        self._roots = [weakref.ref(module) for module in order[:roots]]
        held = [(module, name, getattr(module, name)) for name in _REGISTRIES for module in order]
        # the names are kept: another text could come to lie where one of them was
        self._names = [key for _, _, registry in held for key in registry]
        values = [id(value) for _, _, registry in held for value in registry.values()]
        self._held = np.array([(id(module), id(name), len(registry)) for module, name, registry in held], dtype=np.int64).reshape(-1, 3)
        self._pairs = np.array([*zip(map(id, self._names), values, strict=True)], dtype=np.int64).reshape(-1, 2)
        self._call = _function(), _python().ctypes.data, self._held.ctypes.data, len(held), self._pairs.ctypes.data

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Structure | None:
        """That of these modules; None where the library cannot look at them."""
        if library() is None or _python() is None or not all(map(_is_plain, modules)):
            return None
        known = {id(module): module for module in modules}
        inside = {id(child) for module in modules for child in module._modules.values()}
        order = {key: module for key, module in known.items() if key not in inside}
        roots = len(order)
        waiting = [*order.values()]
        while waiting:
            below = [known[id(child)] for child in waiting.pop()._modules.values() if id(child) in known and id(child) not in order]
            order.update((id(child), child) for child in below)
            waiting += below
        # in a circle each module is in another
        return cls([*order.values()], roots) if len(order) == len(known) else None

    def is_there(self) -> bool:
        """Whether all of it is there, and nothing else, under the same names."""
        # held until the call is over: all others are held by these
        roots = [*map(call, self._roots)]
        function, python, held, count, pairs = self._call
        return None not in roots and function(python, held, count, pairs) == 1


def _is_plain(module: nn.Module) -> bool:
    """Whether what it holds is in dictionaries of its own."""
    own = getattr(module, "__dict__", {})
    return all(type(own.get(name)) is dict and getattr(module, name) is own[name] for name in _REGISTRIES)


@cache
def _python() -> Any:
    """Where what the library calls of Python is; None where it cannot be called."""
    if sys.implementation.name != "cpython" or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    return np.array([ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _API], dtype=np.int64)


@cache
def _function() -> Any:
    kernel = library()
    assert kernel is not None
    function = ctypes.PyDLL(kernel._name).paramwatch_is_there
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    function.restype = ctypes.c_int64
    return function
