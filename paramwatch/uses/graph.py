"""Which operations of an autograd graph use a parameter: the graph is walked from the outputs of a call down to the parameters.

What feeds `AccumulateGrad` is the use, unless it is a mere change of form of the whole parameter (a cast, a transpose), or the computation
of a weight from parameters (weight norm, `F.normalize(w)`): then the uses are what feeds that. autocast casts a weight once for several
uses, so their gradients are added in low precision before they reach the parameter; behind the cast they are still apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from paramwatch.uses.made import Readers, computed_once, operation_of
from paramwatch.uses.obstacles import COMPUTED, PRODUCT, WAYS
from paramwatch.uses.ways import Derivation, Form, Node, Pieces, Way, may_be_called

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


class Use(NamedTuple):
    """An operation that uses a parameter, possibly by way of others."""

    number: int
    """Of the operation, in the order of the forward pass."""
    operation: str
    """What it is called: `mm`, `embedding`."""
    merges: bool
    """Whether it may hold several uses that nothing can tell apart."""
    ends: tuple[tuple[Node, int], ...]
    """Where its gradient is taken: nodes, and which of the gradients that each computes. That is the operation itself where it can be: what
    comes after it on the way to the parameter may be shared, by other uses, or later by a penalty on gradients."""
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
    above: Readers = defaultdict(list)
    derived: set[Node] = set()
    recomputes = False
    starts = [start for start, _ in deriving]

    def leads(node: Node, number: int) -> bool:
        """Whether it only makes of a parameter what others use."""
        at = bisect_right(starts, number) - 1 if starts else -1
        if _kind(node.name()) == "form":
            return True
        if at >= 0 and number < deriving[at][1]:
            derived.add(node)
            return True
        return False

    todo = list(roots)
    seen = set(todo)
    for node in todo:
        # what a call has made of a parameter is used by whoever has called
        if leads(node, node._sequence_nr()):
            readers[node] = []
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
            above[child].append((node, slot, output))
            number = child._sequence_nr()
            if leads(child, number):
                readers[child].append((node, slot, output))
            # a cast of an earlier call may be used again in this one
            elif early or number < floor:
                continue
            if child not in seen:
                seen.add(child)
                todo.append(child)
    apart, together = computed_once(leaves.values(), above)
    for node in apart:
        if node not in readers:
            derived.add(node)
            readers[node] = above[node]
    found = {leaf: _uses(leaf, feeding, readers, derived) for leaf, feeding in leaves.items()}
    for uses in found.values():
        uses[:] = [use._replace(operation=PRODUCT, merges=True) if use.ends[0][0] in together else use for use in uses]
    return found, recomputes


def _uses(leaf: Node, feeding: Sequence[tuple[Node, int]], readers: Readers, derived: Set[Node]) -> list[Use]:
    inner, todo = set[Node](), [node for node, _ in feeding]
    while todo:
        node = todo.pop()
        if node in readers and node not in inner:
            inner.add(node)
            todo += [reader for reader, _, _ in readers[node]]
    found = [_use(node, slot, ()) for node, slot in feeding if node not in inner]
    for part in _parts(inner, readers):
        out = [(reader, slot, node, output) for node in part for reader, slot, output in readers[node] if reader not in part]
        computed = not part.isdisjoint(derived)
        if computed and not all(map(may_be_called, part)):
            found += _use_at_its_end(out, [(node, slot) for node, slot in feeding if node in part])
            continue
        for reader, slot, node, output in out:
            found.append(_use(reader, slot, (Derivation(node, output, leaf, part),) if computed else _forms(node, leaf)))
    return sorted(found, key=lambda use: (use.number, use.ends[0][1]))


def _parts(inner: Set[Node], readers: Readers) -> Iterator[set[Node]]:
    """What lies between a parameter and its uses, in parts that have nothing to do with each other."""
    beside: dict[Node, list[Node]] = {node: [] for node in inner}
    for node in inner:
        for reader, _, _ in readers[node]:
            if reader in inner:
                beside[node].append(reader)
                beside[reader].append(node)
    left = set(inner)
    while left:
        part, todo = set[Node](), [left.pop()]
        while todo:
            node = todo.pop()
            part.add(node)
            todo += [other for other in beside[node] if other in left]
            left.difference_update(beside[node])
        yield part


def _use_at_its_end(out: Sequence[tuple[Node, int, Node, int]], ends: Sequence[tuple[Node, int]]) -> list[Use]:
    """The use of what was computed from a parameter, taken where it arrives there: several are one."""
    first = min((_use(reader, slot, ()) for reader, slot, _, _ in out), key=lambda use: use.number, default=None)
    if first is None:
        return []
    if len(out) > 1:
        first = first._replace(operation=COMPUTED, merges=True)
    return [first._replace(ends=tuple(ends), way=(Pieces(len(ends)),) if len(ends) > 1 else ())]


def waist_of(uses: Sequence[Use]) -> Node | None:
    """The cast by way of which all of these uses reach their parameter, if there is one: their sum goes through it."""
    lasts = [use.way[-1] if use.way else None for use in uses]
    ends = {last.node if isinstance(last, Form) and last.casts else None for last in lasts}
    return ends.pop() if len(ends) == 1 else None


def _forms(node: Node, leaf: Node) -> Way:
    way: tuple[Form, ...] = ()
    while node is not leaf:
        way = (*way, Form(node))
        ((node, _),) = node.next_functions
    return way


def _use(node: Node, slot: int, way: Way) -> Use:
    operation = operation_of(node)
    return Use(node._sequence_nr(), operation, operation in WAYS, ((node, slot),), way)


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
