"""`attach`, and the `Watch` it returns: wires the pipe from a model to its records and owns its lifetime.

Model -> rows (`inventory`) -> step boundary (`steps`) -> measure (`recorder`, `measure`) -> record (`assemble`, on the thread of `worker`)
-> sinks (`store`, `tensorboard.events`) and `rules` -> views (`run`, `frames`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from paramwatch import attached, clipping, steps
from paramwatch.absence import Absence
from paramwatch.arguments import Options, check_folder, check_options, not_a_loss, without_groups
from paramwatch.columns import LAYOUTS, Detail
from paramwatch.folder import DiskFolder, MemoryFolder, Until, WithSpare
from paramwatch.guard import Guard, ParamWatchError
from paramwatch.handover import Handover
from paramwatch.inventory import LiveInventory
from paramwatch.numbering import AllRows
from paramwatch.ranks import rank
from paramwatch.record import Inventory, Record, Sink
from paramwatch.recorder import Recorder
from paramwatch.rules import RULES
from paramwatch.run import Run
from paramwatch.store import MEMORY_BYTES, Contents, Store
from paramwatch.tensorboard.events import EventFile
from paramwatch.updates import UpdateMode
from paramwatch.uses.splits import Splits
from paramwatch.worker import Worker


def attach(
    module: nn.Module,
    log_dir: str | os.PathLike[str] | None = None,
    *,
    name: str = "",
    every: int = 1,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    detail: Detail = "default",
    update: UpdateMode = "auto",
    histograms: int = 0,
    uses: int = 0,
    uses_of: str | Sequence[str] = "tied",
    raw_gradients: bool = False,
    max_bytes: int = 1_000_000_000,
    first_step: int = 0,
    sinks: Sequence[Sink] = (),
) -> Watch:
    """Record every optimizer step of a model from now on. Nothing is put on the model, and there is nothing else to call.

    The Watch need not be kept. It lives until `close`, until the model is collected, or until the interpreter exits.

    Args:
        module: The model. Attaching it again closes its earlier Watch.
        log_dir: Write under `<log_dir>/paramwatch/`, for `load` and TensorBoard; without it the records stay in memory.
        name: Write under `<log_dir>/paramwatch/<name>/`, for a second model in the same folder.
        every: Measure each N-th step of each optimizer.
        include: Glob patterns over row names and aliases.
        exclude: Glob patterns over row names and aliases.
        detail: `cheap` (norms, extremes, non-finite counts), `default`, or `full` (adds `update_cos` and the optimizer's state).
        update: `exact` keeps a copy of the parameters during each step, `sampled` looks at 4096 elements a row at most, `off` does
            neither; `auto` is exact while the copy takes under 2 % of the device's memory and under half of what is free.
        histograms: Histograms of parameters, gradients and exact updates at each N-th measured step, for `histograms()`; 0 for never.
        uses: Split gradients by use at each N-th measured step, as `histograms` (0: never): `Watch.uses` and `Watch.agreement`.
        uses_of: Which rows to split: `tied` for those with several names, and glob patterns over names and aliases; `*` also finds what
            is not tied but used several times in one backward pass (a cell over time, a network called twice).
        raw_gradients: Also measure gradients before torch's clip functions change them.
        max_bytes: What one session may write to the store; long runs are thinned to fit.
        first_step: Number of the first step; a resumed loop passes where it goes on.
        sinks: More places to send records to.

    Raises:
        ParamWatchError: An argument makes no sense, or `log_dir` cannot be written; the message says what to do.
    """
    if not isinstance(module, nn.Module):
        raise ParamWatchError(f"attach takes an nn.Module, not {type(module).__name__}")
    options = check_options(
        name=name,
        every=every,
        include=include,
        exclude=exclude,
        detail=detail,
        update=update,
        histograms=histograms,
        uses=uses,
        uses_of=uses_of,
        raw_gradients=raw_gradients,
        max_bytes=max_bytes,
        first_step=first_step,
        sinks=sinks,
    )
    live = LiveInventory(module, options.include, options.exclude, LAYOUTS[options.detail])
    folder = None if log_dir is None else check_folder(log_dir, options.name)
    attached.close_earlier(module, folder)
    return Watch(module, live, folder, options)


class Watch(Run):
    """What `attach` returns: reads like a `Run`, while the run is going on and after it.

    A module may hold its Watch. In a copy or a pickle of that module the Watch has become a `Run` on the same folder; where there was no
    folder, a `Run` that holds nothing, since the records stay in the memory of the Watch itself.
    """

    recorder: Recorder
    """For the Lightning callback, which tells it what only Lightning knows."""

    def __init__(self, module: nn.Module, live: LiveInventory, folder: Path | None, options: Options) -> None:
        """Use `attach`."""
        super().__init__(folder)
        self._closed, self._gave_way = True, False  # until all of it is there
        self.watched = weakref.ref(module, self._module_is_gone)
        self._live = live
        self._guard = Guard("This Watch has stopped; training goes on.", self._let_go)
        holder = MemoryFolder() if folder is None else WithSpare(DiskFolder(folder, rank()))
        self._store = Store(holder, max_bytes=MEMORY_BYTES if folder is None else options.max_bytes, long=options.long)
        self._folder = Until(holder, self._store.session)  # a later session in the same folder may be another model's
        # in a distributed run the first rank's curves stand for all
        self._events = EventFile(folder) if folder is not None and rank() == 0 else None
        own: list[Sink] = [self._store, *([self._events] if self._events else [])]
        self._handover, self._closing = Handover(), threading.RLock()
        self._at_end: Inventory | None = None
        self._all_rows = AllRows(live)
        splits = Splits(live, self.watched, options.uses, options.every, options.uses_of) if options.uses else None
        self.recorder = Recorder(live, self._guard, self._handover.take, splits=splits, **options.recording)
        self._worker = Worker([*own, *options.sinks], [rule() for rule in RULES], self._store.find, self._guard)
        self._listens = options.raw_gradients
        try:
            self._handover.connect(self.recorder, self._worker)
            if self._listens:
                clipping.listen(self.recorder)
            steps.register(self.recorder)
            if splits is not None:
                splits.arm(options.first_step)
        except BaseException:
            self._let_go()
            self._worker.stop(wait=True)
            raise
        self._closed = False
        attached.opened.append(self)

    # ---- what users call ---------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until everything measured so far can be read, here and from other processes."""
        if self._closed:
            self._worker.stop(wait=True)  # after its model was collected, the thread may still be writing
        else:
            self.recorder.close_round()
            self._handover.give(wait=True)
            self._worker.flush()

    def close(self) -> None:
        """Stop recording, write what is left, and give back torch's hooks. May be called again, and from anywhere."""
        with self._closing:
            if self._closed:
                # once more, in case it failed the first time, or its model was collected: then nobody has waited for the thread
                with self._guard.contain("closing"):
                    attached.leave(self)
                    self._worker.stop(wait=True)
                return
            with self._guard.contain("closing"):
                self._finish("closing")
            with self._guard.contain("closing"):
                self._worker.stop(wait=True)
        with self._guard.contain("closing"):
            self._say_goodbye()

    def step(self, optimizer: Optimizer | None = None) -> contextlib.AbstractContextManager[None]:
        """`with watch.step(optimizer): optimizer.step()`, for optimizers that torch's hooks cannot see.

        Gradients and parameters are measured on entry, the update on exit; nothing is recorded when the block raises. Inside a step that
        the hooks see it changes nothing.

        Args:
            optimizer: Anything with torch's `param_groups`; without it all trainable rows step.

        Raises:
            ParamWatchError: It has none.
        """
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise without_groups(optimizer)
        if self._closed or self._guard.failed:
            return contextlib.nullcontext()
        return steps.explicit(self.recorder, self._all_rows if optimizer is None else optimizer)  # type: ignore[arg-type]  # stands for one

    def root(self, loss: Tensor) -> None:
        """Before `backward`, name the uses between the outputs of the model and the loss as well: a penalty on a weight, a head outside.

        Args:
            loss: What `backward` will be called on. Off a split step nothing is done; in Lightning the callback does it.

        Raises:
            ParamWatchError: It is no tensor.
        """
        if not isinstance(loss, Tensor):
            raise not_a_loss(loss)
        if self.recorder.splits is not None and not self._closed and not self._guard.failed:
            with self.recorder.splits.guard.contain("looking for the uses below a loss"):
                self.recorder.splits.root(loss)

    def __enter__(self) -> Watch:
        return self

    def __repr__(self) -> str:
        """As that of a `Run`, of the steps measured so far; without reading, and with no long wait for a background thread that is busy."""
        if not self._closed:
            self.recorder.close_round()
        return self._described(self._absence(), *self._handover.counts, "measured", self._guard.failed)

    def __reduce__(self) -> tuple[type[Run], tuple[Path | None]]:
        return Run, (self.path,)

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the reading half ----------------------------------------------------------------------

    def _read(self) -> Contents:
        self.flush()
        return super()._read()

    def _inventory(self) -> Inventory:
        # another thread may be reading the model anew
        with self.recorder.lock:
            return self._live.now()

    def _absence(self) -> Absence:
        return self._worker.counted().absence(self._at_end or self._inventory())

    def latest(self) -> Record | None:
        """For the callback: the newest record whose readings have arrived; waits for the background thread, never for a device."""
        self.recorder.close_round()
        self._handover.give(wait=False)
        self._worker.call()
        return self._worker.last

    # ---- lifetime --------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """No more calls from torch: at the end, or after a failure of ours. What was recorded can still be read."""
        steps.unregister(self.recorder)
        if self.recorder.splits is not None:
            self.recorder.splits.disarm()
        if self._listens:
            clipping.unlisten(self.recorder)

    def give_way(self) -> None:
        """Close, since the module is attached again."""
        self._gave_way = True
        self.close()

    def abandon(self) -> None:
        """In a forked child, which has not the thread that would write, nor one that may have held the lock."""
        self._closed, self.recorder.lock = True, threading.RLock()
        self._let_go()

    def _finish(self, doing: str) -> None:
        """Hand the last rounds to the thread, for which nobody waits here."""
        with self._guard.contain(doing):
            self._let_go()
        with self._guard.contain(doing):
            self.recorder.finish()
            self._handover.give(wait=True)
            self._at_end = self._inventory()
        self._closed = True
        attached.leave(self)

    def _module_is_gone(self, _: object) -> None:
        """Called by the collector, in any thread and at any time: must not wait for the thread."""
        if not self._closed:
            doing = "closing after the model is gone"
            with self._guard.contain(doing):
                self._finish(doing)
            with self._guard.contain(doing):
                self._worker.later(self._say_goodbye)
            with self._guard.contain(doing):
                self._worker.stop(wait=False)

    def _say_goodbye(self) -> None:
        with self._guard.contain("saying what was seen"):
            attached.say_goodbye(self.recorder, self._absence(), self._worker.cost.share, self.path, self._gave_way)
