"""The Lightning callback: `attach` for the length of a fit, told what only Lightning knows (raw gradients, epoch, skipped steps).

It works in a `Trainer` from `lightning.pytorch` and from `pytorch_lightning`, and inherits the `Callback` of each that is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from paramwatch.arguments import check_options, check_path
from paramwatch.attached import beside
from paramwatch.columns import Detail
from paramwatch.gradients import is_unscaled
from paramwatch.guard import Guard, ParamWatchError, logger
from paramwatch.loggers import Outlets, folder_of, local
from paramwatch.optimizers import params_of
from paramwatch.record import Sink
from paramwatch.totals import totals
from paramwatch.updates import UpdateMode
from paramwatch.watch import Watch, attach

_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def _callback_bases() -> tuple[type, ...]:
    imported = [getattr(sys.modules.get(name), "Callback", None) for name in _NAMESPACES]
    found = tuple(base for base in imported if base is not None)
    if found:
        return found
    for name in _NAMESPACES:
        try:
            return (importlib.import_module(name).Callback,)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError("paramwatch.lightning needs Lightning: pip install 'paramwatch[lightning]'")


# of either namespace: neither is the type of the other
Trainer: TypeAlias = Any
LightningModule: TypeAlias = Any

if TYPE_CHECKING:
    Callback = object
else:
    Callback = type("Callback", _callback_bases(), {})


class ParamWatch(Callback):
    """Records every optimizer step of a fit; the arguments are those of `paramwatch.attach`.

    Gradients before clipping are always recorded. The totals go to every logger of the trainer, each `log_every_n_steps`, as
    `paramwatch/grad_norm` and so on. The step counter is saved with the checkpoint, and a resumed fit goes on at the next number.

    Args:
        log_dir: Write under `<log_dir>/paramwatch/`. By default that is the folder of the trainer's first logger; without a logger,
            or where that folder is remote, nothing is written and the records stay in memory.
        name: See `paramwatch.attach`, as for all that follow.
        every: Measure each N-th step of each optimizer.
        include: Glob patterns over row names and aliases.
        exclude: Glob patterns over row names and aliases.
        detail: `cheap`, `default` or `full`.
        update: `auto`, `exact`, `sampled` or `off`.
        histograms: Histograms of parameters, gradients and exact updates at each N-th measured step, for `histograms()`; 0 for never.
        uses: Split gradients by use at each N-th measured step; 0 for never.
        uses_of: Which rows `uses` is about.
        raw_gradients: Changes nothing here, where gradients before clipping are always recorded.
        max_bytes: What one session may write to the store.
        first_step: Number of the first step of a fit that is not resumed, or is resumed from a checkpoint that has no step counter of
            this `name`; where it is not given, such a fit goes on at the trainer's own count.
        sinks: More places to send records to.
    """

    watch: Watch | None
    """The Watch of the latest fit, also after it; None before the first."""

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        self.watch = None
        self._log_dir = None if log_dir is None else check_path(log_dir)
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
        self._options: dict[str, Any] = dict(vars(options))
        self._resume: int | None = None
        self._trainer: weakref.ref[Trainer] | None = None
        self._asked: tuple[weakref.ref[Optimizer], int, Tensor | None] | None = None
        self._logged = -1
        self._outlets = Outlets()

    @property
    def state_key(self) -> str:
        """Under which the step counter is saved: one for each `name`."""
        return f"ParamWatch{{'name': {self._options['name']!r}}}"

    # not state_dict and load_state_dict: these lack the trainer, and end in Lightning's own words where two callbacks have one name

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the number the next step has."""
        number = self._next_step()
        if number is not None:
            checkpoint.setdefault("callbacks", {})[self.state_key] = {"next_step": number}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on at the number that was saved, or, where none was, at the trainer's own count."""
        # a checkpoint that is only tested does not move the fit
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if saved is not None:
            self._resume = saved["next_step"]
        elif not self._options["first_step"]:
            self._resume = _steps_made(checkpoint)
            logger.info(
                "paramwatch: the checkpoint has no step counter of %s, so steps are numbered from %d on, which is what the trainer "
                "has counted; pass first_step= for another number",
                self.state_key,
                self._resume,
            )
        if trainer.strategy.restore_checkpoint_after_setup:
            # sharded models are restored when the Watch has already begun
            self.on_fit_start(trainer, pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Spawned workers get the arguments, not a running Watch."""
        # Lightning puts methods of the module it fits on each callback: they would bring the module along
        kept = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}
        return {**kept, "watch": None, "_trainer": None, "_asked": None, "_outlets": Outlets()}

    # ---- hooks, in the order in which Lightning calls them -----------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: parameters, optimizers and wrappers are all there now."""
        beside_us = [other for other in trainer.callbacks if isinstance(other, ParamWatch) and other is not self]
        if any(other.state_key == self.state_key for other in beside_us):
            raise ParamWatchError(f"two ParamWatch callbacks of one trainer have the name {self._options['name']!r}; pass name= to one")
        # resolved on every rank, since a logger's version may be known on the first one only
        folder = folder_of(trainer) if self._log_dir is None else self._log_dir
        folder = local(trainer, trainer.strategy.broadcast(folder))
        if self._resume is None and self._trainer is not None and self._trainer() is trainer:
            self._resume = self._next_step()
        # a module or another callback may clip by torch's own functions wherever it likes
        options = self._options | {"raw_gradients": True}
        if self._resume is not None:
            options["first_step"] = self._resume
        self.watch = None
        guard = Guard("Nothing is recorded; training goes on.", lambda: None, passing=(ParamWatchError,))
        with guard.contain("attaching to the module"), beside([other.watch for other in beside_us if other.watch]):
            self.watch = attach(pl_module, folder, **options)
        if self.watch is None:
            return
        self.watch.recorder.raw = True
        here = self._trainer = weakref.ref(trainer)
        # Lightning takes all callbacks away while it searches for a learning rate or a batch size, and restores the weights after it
        self.watch.recorder.idle = lambda: (fitting := here()) is not None and self not in fitting.callbacks
        self._asked, self._logged, self._outlets = None, -1, Outlets()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.watch is not None:
            where = {"epoch": trainer.current_epoch, "batch_idx": batch_idx, "global_step": trainer.global_step}
            self.watch.recorder.context.update(where)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._settle()
        if self.watch is not None:
            # training_step may use parameters outside of any module
            self.watch.root(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.watch is not None:
            self.watch.recorder.backwards += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure raw gradients, where something may still change them: elsewhere raw is what is used."""
        self._settle()
        watch = self.watch
        if watch is None or watch.recorder.guard.failed:
            return
        with watch.recorder.guard.contain("looking at gradients before clipping"):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                # the scaler changes its scale in place when the step is over
                scale = scaler._scale.clone() if isinstance(scaler._scale, Tensor) else None
                watch.recorder.amp_scale = scale
                self._asked = weakref.ref(optimizer), watch.recorder.steps_seen, None if is_unscaled(scaler, optimizer) else scale
            # a fused optimizer divides by the scale itself, so these are not yet the gradients; Lightning refuses to clip them
            fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
            if pl_module.automatic_optimization and not fused and self._may_change(trainer, pl_module, optimizer):
                watch.recorder.before_clipping(lambda raw: raw.give(params_of(optimizer)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._settle()
        watch = self.watch
        if watch is not None and not watch.recorder.guard.failed:
            with watch.recorder.guard.contain("logging the totals of a step"):
                self._log_totals(trainer, watch)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._close()

    # ---- pieces --------------------------------------------------------------------------------

    def _settle(self) -> None:
        """A `GradScaler` that was asked for a step and did not make it has met an infinity, or Lightning had no loss to step for."""
        asked, self._asked = self._asked, None
        watch = self.watch
        if asked is None or watch is None or watch.recorder.guard.failed or watch.recorder.steps_seen != asked[1]:
            return
        with watch.recorder.guard.contain("recording a skipped step"):
            if (optimizer := asked[0]()) is not None:
                watch.recorder.skipped(optimizer, asked[2])

    def _next_step(self) -> int | None:
        return self._resume if self.watch is None else self.watch.recorder.next_step

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()
        self._resume = None

    def _may_change(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> bool:
        """Whether anything that runs after this hook may change gradients."""
        if trainer.gradient_clip_val or getattr(optimizer, "_optimizer_step_pre_hooks", None):
            return True
        if _overrides(pl_module, "configure_gradient_clipping") or _overrides(pl_module, "on_before_optimizer_step"):
            return True
        callbacks: list[Any] = trainer.callbacks
        later = callbacks[callbacks.index(self) + 1 :]
        return any(_overrides(callback, "on_before_optimizer_step") for callback in later)

    def _log_totals(self, trainer: Trainer, watch: Watch) -> None:
        """The totals of the latest step, on the axis on which Lightning puts what modules log."""
        interval: int = trainer.log_every_n_steps
        axis = trainer.fit_loop.epoch_loop._batches_that_stepped
        due = interval and (axis + 1) % interval == 0
        if not due or not trainer.loggers or not trainer.is_global_zero:
            return
        record = watch.latest()
        if record is not None and record.step != self._logged:
            self._logged = record.step
            prefix = "/".join(("paramwatch", *([self._options["name"]] if self._options["name"] else [])))
            metrics = {f"{prefix}/{name}": value for name, value in totals(record).items() if name != "lr"}
            self._outlets.log(trainer, metrics, axis)


def _steps_made(checkpoint: Mapping[str, Any]) -> int:
    """What the trainer had counted: steps of one optimizer; of several the batches that stepped, on which loggers draw their curves."""
    made: int = checkpoint.get("global_step", 0)
    if len(checkpoint.get("optimizer_states", ())) < 2:
        return made
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.state_dict", {})
    return int(progress.get("_batches_that_stepped", made))


def _overrides(owner: Any, hook: str) -> bool:
    """Whether a hook is someone's own and not Lightning's empty one."""
    for cls in type(owner).__mro__:
        if hook in cls.__dict__:
            return not cls.__module__.startswith(("lightning.pytorch.", "pytorch_lightning."))
    return False
