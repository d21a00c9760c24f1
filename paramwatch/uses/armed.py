"""One step that is armed for splitting: the hooks that find the uses in the graph of each forward pass, and gather what they contribute.

Made when the step before has ended, and taken away when this one has.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from paramwatch.guard import Guard
from paramwatch.inventory import LiveInventory
from paramwatch.measure import capture
from paramwatch.rows import module_names
from paramwatch.uses.calls import Call, Calls, Names
from paramwatch.uses.graph import outputs_of, uses_below, waist_of
from paramwatch.uses.obstacles import SEVERAL_THREADS, compiles_backward, in_words, is_compiled, merged, no_warning_of_hooks, runs_compiled
from paramwatch.uses.runs import Runs
from paramwatch.uses.sites import Site
from paramwatch.uses.watched import Watched, WatchedRow
from paramwatch.uses.ways import Node, Way, arrived, has_marked, is_lent

_serials = itertools.count()


class Armed:
    """Gathers what the uses of some rows contribute, from `install` to `remove`.

    Args:
        model: Gives the model, None once it is gone.
        live: Its rows,
        watched: and those that are split.
        several: Whether the step has several backward passes, None where nobody knows.
        blind: Whether something stands in the way: nothing is gathered.
        guard: For what goes wrong in a hook.
        say: Takes what cannot be told apart, in words.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module | None],
        live: LiveInventory,
        watched: Watched,
        several: bool | None,
        blind: bool,
        guard: Guard,
        say: Callable[[str], None],
    ) -> None:
        self.watched, self.several, self.blind = watched, several, blind
        self.over = blind
        """Nothing is gathered any more."""
        self._model, self._live, self._guard, self._say = model, live, guard, say
        found = model()
        self._names = Names([] if found is None else module_names(found))
        self._looked = False  # once more at the model, before its first call
        # marks what it has put on nodes: a graph may outlive it
        self._serial = next(_serials)
        self._on_nodes, self._handles = list[Any](), list[Any]()
        self._calls, self._turns = dict[int, Calls](), itertools.count()
        self._runs = Runs()

    def install(self) -> None:
        """Begin; what fails half-way can still be removed."""
        if not self.blind:
            self._handles.append(no_warning_of_hooks())
            self._handles.append(register_module_forward_pre_hook(self._enter))
            self._handles.append(register_module_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take everything away."""
        self.over = True
        for handle in (*self._handles, *self._on_nodes):
            handle.remove()
        self.watched.let_go()

    def root(self, loss: Tensor) -> None:
        """Look for uses between the outputs of the model and the loss as well."""
        if self.over or capture.capturing():
            return
        calls = self._calls.get(threading.get_ident()) or Calls(self._names, self._turns)
        self._plan(calls, [loss.grad_fn], 0, calls.site)

    # ---- the forward pass ------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self.over:
            return
        with self._guard.contain("noting a module call"):
            # what is queued while a CUDA graph is captured would be done at each replay
            if capture.capturing():
                return
            if runs_compiled(module):
                self._step_aside(module)
                return
            if not self._looked:
                self._looked = True
                if self.watched.has_changed(self._model()):
                    self._look_again()
            names = self._names.of(module)
            if names is not None:
                task = torch._C._current_graph_task_id()
                if task == -1:
                    self._runs.none_goes_on()
                else:
                    self._run(task)
                calls = self._calls_here()
                if (
                    not calls.inside
                    and self.watched.thawed()
                    and torch._C._get_tracing_state() is None
                    and self._live.sight.look() is not None
                ):
                    self._look_again()
                calls.enter(module, names)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self.over:
            return
        with self._guard.contain("looking for uses in the autograd graph"):
            if capture.capturing() or self._names.of(module) is None:
                return
            calls = self._calls_here()
            call = calls.leave(module)
            self.watched.adopt(module)
            if call is not None and self._live.sight.has_shapes():
                self._look_again()
            if call is not None and not torch.is_grad_enabled():
                # as in validation, which may be long
                calls.forget_outermost()
            elif call is not None and output is not None:
                roots = [tensor.grad_fn for tensor in outputs_of(output) if tensor.grad_fn is not None]
                calls.returned(roots)
                if roots:
                    self._plan(calls, roots, call.enter, self._site_in(calls, call))

    def _step_aside(self, compiled: nn.Module) -> None:
        """Compiled code is about to run: hooks would become a part of it. Where it is of the model its uses cannot be told apart."""
        for handle in self._handles:
            handle.remove()
        names = [names[0] for part in compiled.modules() if (names := self._names.of(part)) is not None]
        if names and torch.is_grad_enabled():
            self._say(is_compiled(in_words(names[0])))
            self.blind = self.over = True
            for row in self.watched.rows.values():
                row.found.reset()
        else:
            self._handles = [compiled.register_forward_hook(self._go_on, always_call=True)]

    def _go_on(self, module: nn.Module, args: Any, output: Any) -> None:
        with self._guard.contain("looking at module calls again"):
            (handle,) = self._handles
            handle.remove()
            self._handles = []
            if not self.over:
                self.install()

    def _look_again(self) -> None:
        """Find the modules and the rows as they are now."""
        module = self._model()
        if module is not None:
            self._names.read(module_names(module))
            self.watched.read(module)

    def _calls_here(self) -> Calls:
        me = threading.get_ident()
        if me not in self._calls:
            self._calls[me] = Calls(self._names, self._turns)
            if any(calls.inside for calls in self._calls.values()):
                self._say(SEVERAL_THREADS)
        return self._calls[me]

    def _site_in(self, calls: Calls, call: Call) -> Callable[[int, str], Site]:
        turn = calls.turn_of(call)
        task = torch._C._current_graph_task_id()
        if task != -1:
            root, segment = self._runs.segment(task)
            return lambda number, label: Site("recompute", segment, call.path, number, label, root, turn)
        return lambda number, label: Site("call", turn, call.path, number, label)

    def _plan(self, calls: Calls, roots: Iterable[Node], floor: int, site: Callable[[int, str], Site]) -> None:
        """Find the uses below, and hook what will compute their contributions."""
        # of graphs that are gone there is nothing to take away
        self._on_nodes = [handle for handle in self._on_nodes if handle.hooks_dict_ref() is not None]
        jobs: dict[Node, list[tuple[WatchedRow, Site, int, Way]]] = defaultdict(list)
        merging: dict[str, list[str]] = {}
        found, recomputes = uses_below(roots, floor, calls.deriving())
        for leaf, uses in found.items():
            row = self.watched.row_of(leaf.variable)
            if row is None:
                continue
            self._watch(row, leaf)
            row.found.recomputed |= recomputes
            for operation in dict.fromkeys(use.operation for use in uses if use.merges):
                merging.setdefault(operation, []).append(row.name)
                row.found.always = True
            for use, label in zip(uses, calls.labels(uses, row.holders), strict=True):
                # a graph may be walked again, from a loss
                if any(has_marked(node, (self._serial, row.name, slot)) for node, slot in use.ends):
                    continue
                here = site(use.number, label)
                for node, slot in use.ends:
                    jobs[node].append((row, here, slot, use.way))
                row.found.expected += here.kind != "recompute"
                row.found.copied += any(step.copies for step in use.way)
            if (waist := waist_of(uses)) is not None:
                self._narrow(row, waist, len(uses), leaf.variable is row.tensor)
        for operation, rows in merging.items():
            self._say(merged(operation, [name for name in self.watched.rows if name in rows]))
        for node, of_node in jobs.items():
            self._on_nodes.append(node.register_hook(self._taking(of_node)))

    # ---- the backward pass -----------------------------------------------------------------------

    def _taking(self, jobs: Sequence[tuple[WatchedRow, Site, int, Way]]) -> Callable[[Any, Any], None]:
        def take(grad_inputs: Sequence[Tensor | None], grad_outputs: Any) -> None:
            if torch.compiler.is_compiling() or self.over:
                return
            # most passes make no graph, and entering this takes longer than all of the rest
            with self._guard.contain("taking what a use contributes"), torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                if capture.capturing() or compiles_backward():
                    return
                task = torch._C._current_graph_task_id()
                self._run(task)
                for row, site, slot, way in jobs:
                    grad = grad_inputs[slot]
                    if grad is None or not row.open:
                        continue
                    mine, eps = arrived(grad.detach(), way, row.tensor)
                    if mine is not None:
                        row.found.take(task, site, mine, eps, is_lent(mine, slot, way, grad_inputs, grad_outputs))
                    if site.kind == "recompute":
                        self._runs.came(site.origin, site.turn)

        return take

    def _narrow(self, row: WatchedRow, waist: Node, n: int, whole: bool) -> None:
        """Be told of the sum of all uses before it is cast."""
        row.found.narrows = n

        def summed(grad_outputs: Sequence[Tensor | None]) -> None:
            if torch.compiler.is_compiling() or self.over or grad_outputs[0] is None or not row.open:
                return
            with self._guard.contain("multiplying what uses contribute before it is cast"), torch.no_grad():
                task = torch._C._current_graph_task_id()
                if not capture.capturing():
                    row.found.narrow(task, grad_outputs[0].detach(), row.tensor.grad if whole else None, self.several)

        self._on_nodes.append(waist.register_prehook(summed))

    def _run(self, task: int) -> None:
        """Something happens in this run of the engine: what is not delivered in it is let go when it is over."""
        if not self._runs.begin(task):
            return

        def over() -> None:
            with self._guard.contain("ending a backward pass"):
                none_goes_on = self._runs.end(task)
                for row in self.watched.rows.values():
                    row.found.left(task)
                    if none_goes_on:
                        row.found.settled(row.tensor.grad)

        queue: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
        # after what others have queued meanwhile: it averages what ranks have
        queue(lambda: queue(over))

    def _watch(self, row: WatchedRow, leaf: Node) -> None:
        """Be told of what is delivered to a parameter."""
        if row.has_marked(leaf, id(self._guard), self._serial):
            return
        # not the node, which holds what it calls
        variable = leaf.variable
        whole = variable is row.tensor

        def deliver(grad_outputs: Sequence[Tensor | None]) -> None:
            if torch.compiler.is_compiling():
                return
            total = grad_outputs[0]
            if self.over or total is None or not row.open:
                return
            makes_graph = torch.is_grad_enabled()
            with self._guard.contain("adding up what uses contribute"), torch.no_grad():
                if capture.capturing() or compiles_backward():
                    return
                task = torch._C._current_graph_task_id()
                # it becomes the gradient itself only where no graph of it is made, and where it lies as the parameter does
                apart = makes_graph or (total.layout is torch.strided and total.stride() != variable.stride())
                row.found.deliver(task, total.detach(), row.tensor.grad, whole, self.several, apart)
                if whole:
                    row.hold_leaf()

        self._on_nodes.append(leaf.register_prehook(deliver))
