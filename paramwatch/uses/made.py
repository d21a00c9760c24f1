"""What an autograd graph computes from parameters alone, once for several uses: a weight (`F.normalize(w)`, `w + b @ a`), `log_std.exp()`.

Beside `graph`, which walks it. No module says so, and the graph does not tell data that need no gradient from constants. So an operation is
taken for one on parameters alone where what it makes is taken as a weight, and else where no such tensor gives it another shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from paramwatch.uses.ways import Node

Readers: TypeAlias = dict[Node, list[tuple[Node, int, int]]]
"""Of a node: who uses what it made, as which of its inputs, and which of its outputs that is."""

_PRODUCTS = {"mm": 1, "addmm": 2, "bmm": None, "baddbmm": None}
_WEIGHT = {"linear": 1, "convolution": 1, "embedding": 0, "embeddingbag": 0, **_PRODUCTS}
"""Operations that use a weight, and which of their inputs that is: if it is a certain one."""

_PICKS = frozenset({"index", "indexselect", "gather", "take", "maskedselect"})
"""Operations on a parameter and on data that the graph does not show."""

_MOST = 64
"""Parameters of which a tensor is computed: what is computed from more is no weight, but a sum over a model."""


class Computed(NamedTuple):
    """What computes something from parameters alone."""

    apart: set[Node]
    """A weight, or anything that is used several times: each use of it is one of the parameters."""
    together: set[Node]
    """Something that is used several times with a product of parameters in it, which may be a layer on a learned input: that is one use."""


class _Made(NamedTuple):
    """What a node makes of parameters alone."""

    leaves: frozenset[Node]
    kept: bool
    """No other tensor has given it another shape, as data would."""
    product: bool
    """There is a product of parameters in it."""
    twice: bool
    """It multiplies a parameter with itself: where what it makes is used once, these are two uses of the parameter."""


def computed_once(leaves: Iterable[Sequence[tuple[Node, int]]], above: Readers) -> Computed:
    """The nodes that compute what is used as it comes from parameters.

    Args:
        leaves: What uses each parameter, and as which of its inputs.
        above: Who uses what each other node made.
    """
    made = _made_of_parameters([node for feeding in leaves for node, _ in feeding], above)
    several = _used_several_times(made, above)
    found = set[Node]()
    todo = [
        node
        for node, what in made.items()
        if (node in several and what.kept and not what.product)
        or any(_WEIGHT.get(operation_of(reader)) == slot for reader, slot, _ in above[node])
    ]
    while todo:
        node = todo.pop()
        found.add(node)
        todo += [child for child, _ in node.next_functions if child in made and child not in found]
    return Computed(found, {node for node in several - found if made[node].product and made[node].kept})


def _made_of_parameters(todo: list[Node], above: Readers) -> dict[Node, _Made]:
    """Whatever is, each after what it is made from."""
    made: dict[Node, _Made] = {}
    while todo:
        node = todo.pop()
        below = [child for child, _ in node.next_functions if child is not None]
        if node in made or not all(child in made or is_leaf(child) for child in below):
            continue
        if (what := _what(node, [made.get(child) or _Made(frozenset({child}), True, False, False) for child in below])) is not None:
            made[node] = what
            todo += [reader for reader, _, _ in above[node]]
    return made


def _used_several_times(made: dict[Node, _Made], above: Readers) -> set[Node]:
    """Those that several operations on anything else use in the end; what multiplies a parameter with itself for one use is taken out."""
    ends: dict[Node, set[tuple[Node, int]]] = {}
    for node, what in reversed(list(made.items())):
        mine = set[tuple[Node, int]]()
        for reader, slot, _ in above[node]:
            goes_on = reader in made and (made[reader].kept or not what.kept)
            mine |= ends[reader] if goes_on else {(reader, slot)}
        # two are as good as all of them
        ends[node] = set(list(mine)[:2])
        if what.twice and len(mine) < 2:
            del made[node]
    return {node for node in made if len(ends[node]) > 1}


def _what(node: Node, inputs: Sequence[_Made]) -> _Made | None:
    """What an operation makes of these; None where it is a use of them."""
    operation, alone = operation_of(node), len(inputs) == len(node.next_functions)
    leaves = frozenset[Node]().union(*(one.leaves for one in inputs))
    kept = all(one.kept for one in inputs) and (alone or _keeps_shape(node))
    if len(leaves) > _MOST or operation in _PICKS:
        return None
    if operation not in _WEIGHT:
        below = [child for child, _ in node.next_functions if child is not None]
        return _Made(leaves, kept, any(one.product for one in inputs), twice=len(set(below)) < len(below))
    if operation not in _PRODUCTS or not alone or not kept or _is_layer(node, operation):
        return None
    return _Made(leaves, kept, True, twice=sum(len(one.leaves) for one in inputs) > len(leaves))


def _is_layer(node: Node, operation: str) -> bool:
    """Whether it is `F.linear`, which transposes its weight."""
    weight = _WEIGHT[operation]
    return weight is not None and node.next_functions[weight][0].name() == "TBackward0"


def _keeps_shape(node: Node) -> bool:
    """Whether what it makes has the shape of what it is made from."""
    # not that of the parameter itself, which a trace would note
    shapes = [list(child._input_metadata[output].shape) for child, output in node.next_functions if child is not None]
    return all(list(made.shape) in shapes for made in node._input_metadata)


def is_leaf(node: Node) -> bool:
    """Whether it delivers the gradient of a parameter."""
    found: bool = node.name() == "torch::autograd::AccumulateGrad"
    return found


def operation_of(node: Node) -> str:
    """What an operation is called: `mm`, `embedding`."""
    return _operation(node.name())


@lru_cache(maxsize=4096)
def _operation(name: str) -> str:
    return name.rpartition("::")[2].partition("Backward")[0].lower()
