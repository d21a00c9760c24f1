"""Which operations of an autograd graph use a parameter: the graph is walked from the outputs of a call down to the parameters.

What feeds `AccumulateGrad` is the use, unless it is a mere change of form of the whole parameter (a cast, a transpose), or the computation
of one parameter from another (weight norm): then the uses are what feeds that. autocast casts a weight once for several uses, so their
gradients are added in low precision before they reach the parameter; behind the cast they are still apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from paramwatch.uses.obstacles import WAYS

Node: TypeAlias = Any
"""A node of the graph, `torch.autograd.graph.Node` with the sequence number that is not in its interface."""

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


@dataclass(frozen=True, slots=True)
class Step:
    """One node between a use and its parameter, which maps a gradient of what it made to one of what it was made from."""

    node: Node
    output: int
    """Which of its outputs the use took."""
    slot: int | None
    """Which of its gradients is the parameter's; None where there is one."""

    @property
    def casts(self) -> bool:
        """Whether it may change the type."""
        return self.slot is None and self.node.name() == "ToCopyBackward0"

    @property
    def copies(self) -> bool:
        """Whether a gradient on its way takes memory there that autograd would not take for it."""
        return self.slot is not None or self.casts

    def __call__(self, grad: Tensor) -> Tensor | None:
        if self.slot is None:
            found: Tensor | None = self.node(grad)
            return found
        given: list[Tensor | None] = [None] * len(self.node._input_metadata)
        given[self.output] = grad
        made: Any = self.node(*given)
        mine: Tensor | None = made[self.slot] if isinstance(made, tuple) else made
        return mine


Way: TypeAlias = tuple[Step, ...]
"""From an operation to a parameter that it uses."""


def arrived(grad: Tensor, ways: Sequence[Way], at: Tensor) -> Tensor | None:
    """What a gradient of an operation is as one of its parameter, by all ways together.

    Where that only widens the type (autocast) it stays in its own: the values are the same, and take half of the memory.
    """
    found = [mine for way in ways if (mine := _along(grad, way, at)) is not None]
    return None if not found else found[0] if len(found) == 1 else torch.stack(found).sum(0)


def _along(grad: Tensor, way: Way, at: Tensor) -> Tensor | None:
    widens = grad.dtype != at.dtype and grad.device == at.device and torch.promote_types(grad.dtype, at.dtype) == at.dtype
    widens = widens and sum(step.casts for step in way) == 1 and all(step.slot is None for step in way)
    found: Tensor | None = grad
    for i, step in enumerate(way):
        if found is not None and not (widens and step.casts):
            found = step(found)
            if found is not None and step.slot is not None:
                # between two nodes the engine sums over what was broadcast
                last = i + 1 == len(way)
                found = found.sum_to_size(at.shape if last else way[i + 1].node._input_metadata[way[i + 1].output].shape)
    return found


@dataclass(frozen=True, slots=True)
class Use:
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
    ways: tuple[Way, ...]
    """From there to the parameter: several where that from which the weight is computed enters twice (spectral norm)."""


def uses_below(roots: Iterable[Node], floor: int, deriving: Sequence[tuple[int, int]]) -> tuple[dict[Node, list[Use]], bool]:
    """The uses of each parameter in the graph below some nodes, in the order of the forward pass, by `AccumulateGrad` node.

    And whether parts of the forward pass will be recomputed, each in a run of the engine of its own, in which there may be more.

    Args:
        roots: Where to begin.
        floor: Operations with a smaller number belong to an earlier call, and are not looked behind.
        deriving: Intervals of operations that compute parameters from others, in order.
    """
    leaves: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
    readers: dict[Node, list[tuple[Node, int, int]]] = defaultdict(list)
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
    return {leaf: _uses(feeding, readers, derived) for leaf, feeding in leaves.items()}, recomputes


def _uses(feeding: Sequence[tuple[Node, int]], readers: dict[Node, list[tuple[Node, int, int]]], derived: set[Node]) -> list[Use]:
    found: dict[tuple[Node, int], list[Way]] = defaultdict(list)
    todo: list[tuple[Node, int, Way]] = [(node, slot, ()) for node, slot in feeding]
    while todo:
        node, slot, way = todo.pop()
        behind = readers.get(node, ())
        for reader, its_slot, output in behind:
            todo.append((reader, its_slot, (Step(node, output, slot if node in derived else None), *way)))
        if not behind:
            found[node, slot].append(way)
    return sorted((_use(*at, tuple(ways)) for at, ways in found.items()), key=lambda use: (use.number, use.slot))


def _use(node: Node, slot: int, ways: tuple[Way, ...]) -> Use:
    name: str = node.name()
    operation = name.rpartition("::")[2].partition("Backward")[0].lower()
    return Use(node._sequence_nr(), operation, operation in WAYS, node, slot, ways)


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
