"""Arms a step for splitting and takes its parts: when hooks are put where, what they gather, and that nothing of them stays.

From arming, which is when the step before has ended, until the rows in question have stepped there are two global module hooks, which
leave no trace on any module, and hooks on nodes of the autograd graph. Off these steps there is nothing at all.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from paramwatch.guard import Guard, logger
from paramwatch.inventory import LiveInventory
from paramwatch.ranks import is_one_of_several
from paramwatch.rows import module_names
from paramwatch.uses.calls import Call, Calls, Names, numbered
from paramwatch.uses.contributions import Site
from paramwatch.uses.graph import Node, Use, outputs_of, uses_below
from paramwatch.uses.obstacles import NOTHING_FOUND, SEVERAL_THREADS, merged, no_warning_of_hooks, obstacle_to_splitting
from paramwatch.uses.reading import SplitReading, Sums
from paramwatch.uses.watched import Watched, WatchedRow, check_uses_of

_serials = itertools.count()


class Splits:
    """Splits gradients by use.

    Args:
        live: The rows.
        module: Gives the model, None once it is gone.
        every: Steps are split whose number is a multiple of this.
        uses_of: Glob patterns over names of rows; `tied` stands for all that have several.

    Raises:
        ParamWatchError: No row fits them.
    """

    def __init__(self, live: LiveInventory, module: Callable[[], nn.Module | None], every: int, uses_of: Sequence[str]) -> None:
        self.guard = Guard("Gradients are not split by use any more; recording and training go on.", self._switch_off)
        self._live, self._module = live, module
        self._every, self._uses_of = every, uses_of
        self._said: set[str] = set()
        self._off = False
        # whether a step may have several backward passes: until a step has shown that it has one
        self._several = True
        self._number = -1
        self._handles: list[Any]
        self._on_nodes: list[Any]
        self._watched: Watched | None
        self._calls: dict[int, Calls]
        self._segments: Counter[int]
        self._clear()
        if hint := check_uses_of(live.current, uses_of):
            self._say(f"uses={every}, but {hint}")

    # ---- the step, as the recorder tells it ----------------------------------------------------

    def due(self, number: int) -> bool:
        """Whether the step of this number is split."""
        return number % self._every == 0

    def arm(self, number: int) -> None:
        """Gather from now on what uses contribute, for the step of this number."""
        with self.guard.contain("preparing to split gradients by use"):
            self.disarm()
            module = self._module()
            if module is None or self._off:
                return
            if obstacle := obstacle_to_splitting(module):
                self._say(obstacle)
                return
            watched = Watched(self._live, module, self._uses_of, number)
            if not watched.rows:
                return
            self._watched = watched
            self._names = Names(module_names(module))
            self._serial, self._number = next(_serials), number
            self._handles = [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
                no_warning_of_hooks(),
            ]

    def arm_if_due(self, number: int) -> None:
        """For the first step, before there was any."""
        if self.due(number):
            self.arm(number)

    def begin(self, number: int) -> None:
        """A step is entered."""
        if self._watched is not None and number > self._number and not self.due(number):
            self.disarm()

    def used(self, names: Collection[str], number: int, evaluation: bool) -> SplitReading | None:
        """The gradients of these rows are complete, as far as is known; the last call before the end of the step is right."""
        if self._watched is None or self._off or not self.due(number):
            return None
        found: list[tuple[str, Sums]] = []
        with self.guard.contain("multiplying the contributions of uses"), torch.no_grad():
            for row in self._watched.still_open(names):
                sums = row.found.sums()
                if sums is not None:
                    row.passes = row.found.backwards
                    if is_one_of_several():
                        sums.mode += " (this rank)"
                    found.append((row.name, sums))
                if evaluation:
                    # the next evaluation begins anew
                    row.found.forget()
        return SplitReading(found) if found else None

    def ended(self, names: Collection[str], number: int, complete: bool, measured_next: bool) -> None:
        """A step is over.

        Args:
            names: The rows that stepped.
            number: Of the step.
            complete: Whether no other row will step under this number.
            measured_next: Whether a step that comes next is measured.
        """
        later = measured_next and self.due(number + 1)
        if self._watched is not None:
            stepped = self._watched.still_open(names)
            self._tell_of_nothing(stepped)
            if passes := [row.passes for row in stepped if row.passes]:
                self._several = max(passes) > 1
            if not complete:
                for row in stepped:
                    row.found.reset()
                    row.open, row.passes = later, 0
                if not any(row.open for row in self._watched.rows.values()):
                    self.disarm()
                return
        if later:
            self.arm(number + 1)
        elif self._watched is not None:
            self.disarm()

    def disarm(self) -> None:
        """Take everything away."""
        rows = () if self._watched is None else self._watched.rows.values()
        gates = [gate for row in rows for gate in row.gates]
        handles = [*self._handles, *self._on_nodes, *gates]
        self._clear()
        for handle in handles:
            handle.remove()

    def root(self, loss: Tensor) -> None:
        """Look for uses between the outputs of the model and the loss as well."""
        if self._watched is not None and not self._off and loss.grad_fn is not None:
            with self.guard.contain("looking for the uses below a loss"):
                calls = self._calls.get(threading.get_ident()) or Calls(self._names)
                self._plan(calls, [loss.grad_fn], 0, lambda place, label: Site("loss", 0, "", place, label))

    # ---- arming --------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._handles = []
        self._on_nodes = []
        self._watched = None
        self._calls = {}
        self._turn = 0
        self._segments = Counter()
        self._serial = -1

    def _switch_off(self) -> None:
        """After a failure of ours, possibly inside a hook, where torch may be walking the hooks: they go at the next step."""
        self._off = True

    # ---- the forward pass ------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self._off or self._watched is None:
            return
        names = self._names.of(module)
        if names is not None:
            with self.guard.contain("noting a module call"):
                self._calls_here().enter(module, names)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._off or self._watched is None or self._names.of(module) is None:
            return
        with self.guard.contain("looking for uses in the autograd graph"):
            calls = self._calls_here()
            call = calls.leave(module)
            self._watched.adopt(module)
            if call is not None and output is not None and torch.is_grad_enabled():
                roots = [tensor.grad_fn for tensor in outputs_of(output) if tensor.grad_fn is not None]
                if roots:
                    self._plan(calls, roots, call.enter, self._site_in(call))

    def _calls_here(self) -> Calls:
        me = threading.get_ident()
        if me not in self._calls:
            self._calls[me] = Calls(self._names)
            if any(calls.inside for calls in self._calls.values()):
                self._say(SEVERAL_THREADS)
        return self._calls[me]

    def _site_in(self, call: Call) -> Callable[[int, str], Site]:
        task = torch._C._current_graph_task_id()
        if task != -1:
            segment = self._segments[task]
            self._segments[task] += 1
            return lambda place, label: Site("recompute", segment, call.path, place, label, task)
        turn = self._turn
        self._turn += 1
        return lambda place, label: Site("call", turn, call.path, place, label)

    def _plan(self, calls: Calls, roots: Iterable[Node], floor: int, site: Callable[[int, str], Site]) -> None:
        """Find the uses below, and hook what will compute their contributions."""
        assert self._watched is not None
        jobs: dict[Node, list[tuple[WatchedRow, Site, Use]]] = defaultdict(list)
        for leaf, uses in uses_below(roots, floor, calls.deriving()).items():
            row = self._watched.row_of(leaf.variable)
            if row is None:
                continue
            self._watch(row, leaf)
            for place, (use, label) in enumerate(zip(uses, self._labels(calls, uses, row), strict=True)):
                marks = use.node.metadata.setdefault("paramwatch", set())
                mark = (self._serial, row.name, use.slot, tuple((step.output, step.slot) for step in use.way))
                # a graph may be walked again, from a loss
                if mark not in marks:
                    marks.add(mark)
                    found = site(place, label)
                    jobs[use.node].append((row, found, use))
                    row.found.expected += found.kind != "recompute"
        for node, of_node in jobs.items():
            self._on_nodes.append(node.register_hook(self._taking([(row, found, use.slot, use.way) for row, found, use in of_node])))

    def _labels(self, calls: Calls, uses: Sequence[Use], row: WatchedRow) -> list[str]:
        labels = []
        for use in uses:
            label = calls.label(use.number, use.operation, row.holders)
            if use.merges:
                label += f" [merged in {use.operation}]"
                if row.tied or len(uses) > 1:
                    self._say(f"{row.names}: {merged(use.operation)}")
            labels.append(label)
        return numbered(labels)

    # ---- the backward pass -----------------------------------------------------------------------

    def _taking(self, jobs: Sequence[tuple[WatchedRow, Site, int, Any]]) -> Callable[[Any, Any], None]:
        serial = self._serial

        def take(grad_inputs: Sequence[Tensor | None], grad_outputs: Any) -> None:
            if serial != self._serial or self._off:
                return
            with self.guard.contain("taking what a use contributes"), torch.no_grad():
                task = torch._C._current_graph_task_id()
                for row, site, slot, way in jobs:
                    grad = grad_inputs[slot]
                    if grad is None or not row.open:
                        continue
                    eps = torch.finfo(grad.dtype).eps
                    grad = grad.detach()
                    for step in way:
                        grad = step(grad)
                    row.found.take(task, site, grad, eps)

        return take

    def _watch(self, row: WatchedRow, leaf: Node) -> None:
        """Be told of what is delivered to a parameter."""
        # not by the node itself: it holds the parameter, which would bar torch from swapping it
        if leaf.metadata.get("paramwatch") == self._serial:
            return
        leaf.metadata["paramwatch"] = self._serial
        serial, whole = self._serial, leaf.variable is row.tensor

        def deliver(grad_outputs: Sequence[Tensor | None]) -> None:
            total = grad_outputs[0]
            if serial != self._serial or self._off or total is None or not row.open:
                return
            with self.guard.contain("adding up what uses contribute"), torch.no_grad():
                task = torch._C._current_graph_task_id()
                row.found.deliver(task, total.detach(), whole and row.tensor.grad is None, self._several)

        row.gates.append(leaf.register_prehook(deliver))

    # ---- pieces ------------------------------------------------------------------------------------

    def _tell_of_nothing(self, rows: Sequence[WatchedRow]) -> None:
        for row in rows:
            if row.tied and not row.passes and row.tensor.grad is not None:
                self._say(f"{row.names}: {NOTHING_FOUND}")

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("paramwatch: %s", what)
