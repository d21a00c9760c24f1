"""Which operations of an autograd graph use a parameter: the graph is walked from the outputs of a call down to the parameters.

What feeds `AccumulateGrad` is the use, unless it is a mere change of form of the whole parameter (a cast, a transpose), or the computation
of one parameter from another (weight norm): then the uses are what feeds that. autocast casts a weight once for several uses, so their
gradients are added in low precision before they reach the parameter; behind the cast they are still apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from paramwatch.uses.obstacles import WAYS

Node: TypeAlias = Any
"""A node of the graph, `torch.autograd.graph.Node` with the sequence number that is not in its interface."""
Readers: TypeAlias = dict[Node, list[tuple[Node, int, int]]]
"""Of a node: who uses what it made, as which of its inputs, and which of its outputs that is."""

_LEAF = "torch::autograd::AccumulateGrad"
_CHECKPOINT = "CheckpointFunctionBackward"

_DEEPEST = 6
"""How far outputs are looked for in what a module returned."""

_NOTHING_INSIDE = (str, bytes, int, float, complex, type, FunctionType, ModuleType, nn.Module)

_FORM = frozenset(
    f"{name}Backward{i}"
    for i in (0, 1)
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias", "ToCopy", "Clone", "Squeeze", "Unsqueeze"),
        *("NumpyT", "MatrixH", "Mt"),
    )
)
"""Changes of form: one input, one output, nothing saved, so that a node can be called with each gradient on its own."""


class Form(NamedTuple):
    """A change of form between a use and its parameter, which maps a gradient of what it made to one of what it was made from."""

    node: Node

    @property
    def casts(self) -> bool:
        """Whether it may change the type."""
        found: bool = self.node.name() == "ToCopyBackward0"
        return found

    @property
    def copies(self) -> bool:
        """Whether a gradient on its way takes memory there that autograd would not take for it."""
        return self.casts

    def __call__(self, grad: Tensor) -> Tensor | None:
        found: Tensor | None = self.node(grad)
        return found


@dataclass(frozen=True, slots=True)
class Derivation:
    """All that is between a use and a parameter from which what is used was computed, which may enter there in several places."""

    node: Node
    """Made what is used."""
    output: int
    """Which of its outputs that is."""
    leaf: Node
    inner: Set[Node]
    """What lies between."""
    casts: ClassVar[bool] = False
    copies: ClassVar[bool] = True

    def __call__(self, grad: Tensor) -> Tensor | None:
        total: Tensor | None = None
        pending: dict[Node, dict[int, Tensor]] = {self.node: {self.output: grad}}
        while pending:
            # what was made later comes first, as in the engine
            node = max(pending, key=lambda node: node._sequence_nr())
            given = pending.pop(node)
            made: Any = node(*(given.get(i) for i in range(len(node._input_metadata))))
            for (below, output), mine in zip(node.next_functions, made if isinstance(made, tuple) else (made,), strict=True):
                if mine is None or (below is not self.leaf and below not in self.inner):
                    continue
                # between two nodes the engine sums over what was broadcast
                mine = mine.sum_to_size(below._input_metadata[output].shape)
                if below is self.leaf:
                    total = mine if total is None else total + mine
                else:
                    so_far = pending.setdefault(below, {})
                    so_far[output] = so_far[output] + mine if output in so_far else mine
        return total


Way: TypeAlias = tuple[Form, ...] | tuple[Derivation]
"""From an operation to a parameter that it uses."""


def arrived(grad: Tensor, way: Way, at: Tensor) -> Tensor | None:
    """What a gradient of an operation is as one of its parameter.

    Where that only widens the type (autocast) it stays in its own: the values are the same, and take half of the memory.
    """
    widens = grad.dtype != at.dtype and grad.device == at.device and torch.promote_types(grad.dtype, at.dtype) == at.dtype
    widens = widens and sum(step.casts for step in way) == 1
    found: Tensor | None = grad
    for step in way:
        if found is not None and not (widens and step.casts):
            found = step(found)
    return found


class Use(NamedTuple):
    """An operation that uses a parameter, possibly by way of others."""

    number: int
    """Of the operation, in the order of the forward pass."""
    operation: str
    """What it is called: `mm`, `embedding`."""
    merges: bool
    """Whether it may hold several uses that nothing can tell apart."""
    node: Node
    """The operation. What comes after it on the way to the parameter may be shared: by other uses, or later by a penalty on gradients."""
    slot: int
    """Which of the gradients that the node computes is the one."""
    way: Way
    """From there to the parameter."""


def uses_below(roots: Iterable[Node], floor: int, deriving: Sequence[tuple[int, int]]) -> tuple[dict[Node, list[Use]], bool]:
    """The uses of each parameter in the graph below some nodes, in the order of the forward pass, by `AccumulateGrad` node.

    And whether parts of the forward pass will be recomputed, each in a run of the engine of its own, in which there may be more.

    Args:
        roots: Where to begin.
        floor: Operations with a smaller number belong to an earlier call, and are not looked behind.
        deriving: Intervals of operations that compute parameters from others, in order.
    """
    leaves: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
    readers: Readers = defaultdict(list)
    derived: set[Node] = set()
    recomputes = False
    todo = list(roots)
    seen = set(todo)
    starts = [start for start, _ in deriving]
    while todo:
        node = todo.pop()
        early = node._sequence_nr() < floor
        for slot, (child, output) in enumerate(node.next_functions):
            if child is None:
                continue
            kind = _kind(child.name())
            recomputes |= kind == "recompute"
            if kind == "leaf":
                leaves[child].append((node, slot))
                continue
            number = child._sequence_nr()
            at = bisect_right(starts, number) - 1 if starts else -1
            derives = at >= 0 and number < deriving[at][1]
            if kind == "form" or derives:
                readers[child].append((node, slot, output))
                if kind != "form":
                    derived.add(child)
            # a cast of an earlier call may be used again in this one
            elif early or number < floor:
                continue
            if child not in seen:
                seen.add(child)
                todo.append(child)
    return {leaf: _uses(leaf, feeding, readers, derived) for leaf, feeding in leaves.items()}, recomputes


def _uses(leaf: Node, feeding: Sequence[tuple[Node, int]], readers: Readers, derived: Set[Node]) -> list[Use]:
    inner, todo = set[Node](), [node for node, _ in feeding]
    while todo:
        node = todo.pop()
        if node in readers and node not in inner:
            inner.add(node)
            todo += [reader for reader, _, _ in readers[node]]
    found = [_use(node, slot, ()) for node, slot in feeding if node not in inner]
    computed = not inner.isdisjoint(derived)
    for node in inner:
        for reader, slot, output in readers[node]:
            if reader not in inner:
                found.append(_use(reader, slot, (Derivation(node, output, leaf, inner),) if computed else _forms(node, leaf)))
    return sorted(found, key=lambda use: (use.number, use.slot))


def waist_of(uses: Sequence[Use]) -> Node | None:
    """The cast by way of which all of these uses reach their parameter, if there is one: their sum goes through it."""
    ends = {use.way[-1].node if use.way and use.way[-1].casts else None for use in uses}
    return ends.pop() if len(ends) == 1 else None


def _forms(node: Node, leaf: Node) -> Way:
    way: tuple[Form, ...] = ()
    while node is not leaf:
        way = (*way, Form(node))
        ((node, _),) = node.next_functions
    return way


def _use(node: Node, slot: int, way: Way) -> Use:
    name: str = node.name()
    operation = name.rpartition("::")[2].partition("Backward")[0].lower()
    return Use(node._sequence_nr(), operation, operation in WAYS, node, slot, way)


@lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    return "leaf" if name == _LEAF else "form" if name in _FORM else "recompute" if name == _CHECKPOINT else ""


def outputs_of(found: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned: alone, or in containers, dataclasses and plain objects."""
    todo, seen = deque([(found, _DEEPEST)]), set[int]()
    while todo:
        each, depth = todo.popleft()
        if isinstance(each, Tensor):
            yield each
        elif depth and not isinstance(each, _NOTHING_INSIDE) and id(each) not in seen:
            # objects lead to others, and in circles
            seen.add(id(each))
            todo.extend((inner, depth - 1) for inner in _inside(each))


def _inside(found: Any) -> Iterable[Any]:
    if isinstance(found, list | tuple | set | frozenset):
        return tuple(found)
    if isinstance(found, dict):
        return tuple(found.values())
    slots = [name for cls in type(found).__mro__ for name in _names_in(vars(cls).get("__slots__", ()))]
    return (*getattr(found, "__dict__", {}).values(), *(getattr(found, name) for name in slots if hasattr(found, name)))


def _names_in(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots
