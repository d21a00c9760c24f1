"""The ways from an operation to a parameter that it uses, on which its gradient becomes one of the parameter.

A way calls nodes of the graph with the gradient of one use alone, beside the engine, which goes through them later with the sum of all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

Node: TypeAlias = Any
"""A node of the graph, `torch.autograd.graph.Node` with the sequence number that is not in its interface."""


def marks_of(node: Node) -> set[Any]:
    """What watches have put on a node; there as long as that is."""
    found: set[Any] = node.metadata.setdefault("paramwatch", set())
    return found


def has_marked(node: Node, mark: Hashable) -> bool:
    """Whether this mark was put on it before; from now on it was."""
    marks = marks_of(node)
    known = mark in marks
    marks.add(mark)
    return known


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

    @property
    def rounds(self) -> int:
        """How often it rounds."""
        return 1

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

    @property
    def rounds(self) -> int:
        """How often it rounds."""
        return len(self.inner)

    def __call__(self, grad: Tensor) -> Tensor | None:
        total: Tensor | None = None
        pending = {self.node: {self.output: self._as_made(grad, self.node, self.output)}}
        while pending:
            # what was made later comes first, as in the engine
            node = max(pending, key=lambda node: node._sequence_nr())
            given = pending.pop(node)
            made: Any = node(*(given.get(i) for i in range(len(node._input_metadata))))
            for (below, output), mine in zip(node.next_functions, made if isinstance(made, tuple) else (made,), strict=True):
                if mine is None or (below is not self.leaf and below not in self.inner):
                    continue
                mine = self._as_made(mine, below, output)
                if below is self.leaf:
                    total = mine if total is None else total + mine
                else:
                    so_far = pending.setdefault(below, {})
                    so_far[output] = so_far[output] + mine if output in so_far else mine
        return total

    @staticmethod
    def _as_made(grad: Tensor, node: Node, output: int) -> Tensor:
        """Between two nodes the engine sums over what was broadcast, and casts as autocast has."""
        made = node._input_metadata[output]
        return grad.sum_to_size(made.shape).to(made.dtype)


@dataclass(slots=True)
class Pieces:
    """What comes of one use to a parameter in several places: their sum, once all of it has come."""

    places: int
    task: int = -1
    """The run of the engine in which they come."""
    come: list[Tensor] = field(default_factory=list)
    casts: ClassVar[bool] = False
    copies: ClassVar[bool] = True
    rounds: ClassVar[int] = 1

    def __call__(self, grad: Tensor) -> Tensor | None:
        task = torch._C._current_graph_task_id()
        if task != self.task:
            # of a run that did not come to all places nothing is left over
            self.task, self.come = task, []
        self.come.append(grad)
        if len(self.come) < self.places:
            return None
        total, self.come = sum(self.come[1:], self.come[0]), []
        return total


Way: TypeAlias = tuple[Form, ...] | tuple[Derivation] | tuple[Pieces]
"""From an operation to a parameter that it uses."""


def arrived(grad: Tensor, way: Way, at: Tensor) -> tuple[Tensor | None, float]:
    """What a gradient of an operation is as one of its parameter, and the largest epsilon of the types that it has on its way there.

    Where that only widens the type (autocast) it stays in its own: the values are the same, and take half of the memory.
    """
    widens = grad.dtype != at.dtype and grad.device == at.device and torch.promote_types(grad.dtype, at.dtype) == at.dtype
    widens = widens and sum(step.casts for step in way) == 1
    found: Tensor | None = grad
    eps = torch.finfo(grad.dtype).eps
    for step in way:
        if found is not None and not (widens and step.casts):
            found = step(found)
            eps = max(eps, torch.finfo(grad.dtype if found is None else found.dtype).eps * step.rounds)
    return found, eps


def is_lent(mine: Tensor, slot: int, way: Way, grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> bool:
    """Whether others have the memory of a contribution as well, as what an addition hands on: it may become the `grad` of another tensor.

    Args:
        mine: The contribution,
        slot: which of the gradients it was,
        way: and on which way it has come.
        grad_inputs: All that its operation has computed,
        grad_outputs: and from what.
    """
    # a computation may hand on to several parameters what it is given
    given = grad_inputs if any(isinstance(step, Derivation) for step in way) else (*grad_inputs[:slot], *grad_inputs[slot + 1 :])
    memory = memory_of(mine)
    return memory is not None and any(memory == memory_of(other) for other in (*given, *grad_outputs) if other is not None)


def memory_of(tensor: Tensor) -> int | None:
    """Where it is; None where there is no one place."""
    return tensor.untyped_storage().data_ptr() if type(tensor) is Tensor and tensor.layout is torch.strided else None


def may_be_called(node: Node) -> bool:
    """Whether a node can be called beside the engine, and nobody notices.

    One that is written in Python or in an extension may do anything; what is saved through hooks (a checkpoint) may be taken but once.
    """
    if not callable(node) or "CppNode" in node.name():
        return False
    try:
        saved = [getattr(node, name) for name in _saved_by(node.__class__)]
    except RuntimeError:
        # it was let go of
        return False
    each = (one for some in saved for one in (some if isinstance(some, tuple | list) else (some,)))
    return all(one is None or getattr(one, "unpack_hook", one) is None for one in each)


@lru_cache(maxsize=1024)
def _saved_by(kind: Hashable) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
