"""The callback in real Trainers of both namespaces: what a plain loop would record, and what only Lightning knows."""

from __future__ import annotations

import copy
import csv
import importlib
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning
import torch
import torch.optim.optimizer as torch_optimizer
from pandas.testing import assert_frame_equal
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import paramwatch
from paramwatch import ParamWatchError, Watch, raw
from paramwatch import lightning as callback_module
from paramwatch.lightning import ParamWatch

pytestmark = [
    # a hint that does not concern loaders of 24 samples
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # a deprecation inside Lightning
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
for namespace in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(f"{namespace}.utilities.rank_zero").setLevel(logging.WARNING)

NAMESPACES = {"pytorch_lightning": pytorch_lightning, "lightning.pytorch": lightning.pytorch}
BATCHES = 6
LR = 0.1


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything runs in an empty folder, and takes its hooks away."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not torch_optimizer._global_optimizer_pre_hooks


def data(bad: int = -1) -> DataLoader[Any]:
    """Six batches of four, of which one may hold infinities."""
    x = torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(1))
    if bad >= 0:
        x[4 * bad] = float("inf")
    return DataLoader(TensorDataset(x, x.nan_to_num(posinf=0).sum(1, keepdim=True)), batch_size=4)


def module(pl: ModuleType = lightning.pytorch, make: Callable[..., Optimizer] = torch.optim.SGD, own: type = object, **options: Any) -> Any:
    """A LightningModule around the same MLP each time, with the methods of `own`; `used` collects what its optimizer used."""

    class Lit(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
            self.used: list[list[float]] = []

        def loss(self, batch: list[Tensor]) -> Tensor:
            x, y = batch
            return (self.net(x) - y).square().mean()

        def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = make(self.parameters(), lr=LR, **options)
            optimizer.register_step_post_hook(lambda *_: self.used.append([float(p.grad.norm()) for p in self.parameters()]))
            return optimizer

    methods = {name: method for name, method in vars(own).items() if not name.startswith("__")}
    return type("Own", (Lit,), methods)()


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
SMALL = QUIET | {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}


def fit(
    pl_module: Any, callback: ParamWatch, pl: ModuleType = lightning.pytorch, loader: Any = None, ckpt: Any = None, **options: Any
) -> Any:
    """A quiet fit on the CPU; its Trainer."""
    callbacks = [callback, *options.pop("callbacks", [])]
    trainer = pl.Trainer(**SMALL | options, callbacks=callbacks)
    trainer.fit(pl_module, data() if loader is None else loader, ckpt_path=ckpt)
    return trainer


def watch_of(callback: ParamWatch) -> Watch:
    assert callback.watch is not None
    return callback.watch


def plain(pl_module: Any, *, accumulate: int = 1, clip: Callable[[nn.Module], object] = lambda net: None) -> Watch:
    """The same training in a plain loop."""
    pl_module.log = lambda *_: None
    optimizer = pl_module.configure_optimizers()
    batches = list(data())
    with paramwatch.attach(pl_module, raw_gradients=True) as watch:
        for i, batch in enumerate(batches, start=1):
            (pl_module.training_step(batch) / accumulate).backward()
            if i % accumulate == 0 or i == len(batches):
                clip(pl_module)
                optimizer.step()
                optimizer.zero_grad()
    return watch


def assert_used(callback: ParamWatch, pl_module: Any, steps: int = BATCHES) -> None:
    """One record a step, and each has the gradient that the optimizer used."""
    norms = watch_of(callback).frame("grad_norm")
    assert list(norms.index) == list(range(steps))
    np.testing.assert_allclose(norms, pl_module.used, rtol=1e-5)


# ---- the same as a plain loop ---------------------------------------------------------------


@pytest.mark.parametrize("pl", NAMESPACES.values(), ids=NAMESPACES)
def test_lightning_and_a_plain_loop_record_the_same(pl: ModuleType) -> None:
    callback, trained = ParamWatch(), module(pl)
    fit(trained, callback, pl=pl)

    assert_used(callback, trained)
    assert_frame_equal(watch_of(callback).frame(), plain(module(pl)).frame())


CLIPS = {
    "norm": (0.5, lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.5)),
    "value": (0.05, lambda net: nn.utils.clip_grad_value_(net.parameters(), 0.05)),
}


@pytest.mark.parametrize("algorithm", CLIPS)
def test_raw_gradients_are_those_before_lightning_clips(algorithm: str) -> None:
    value, clip = CLIPS[algorithm]
    callback, trained = ParamWatch(), module()
    fit(trained, callback, gradient_clip_val=value, gradient_clip_algorithm=algorithm)

    assert_used(callback, trained)
    steps = watch_of(callback).steps
    assert (steps["clip_coef"] < 1).all()
    np.testing.assert_allclose(steps["clip_coef"], steps["grad_norm"] / steps["grad_raw_norm"])
    assert_frame_equal(watch_of(callback).frame(), plain(module(), clip=clip).frame())


class ClipsLate:
    """Changes gradients in the last hook that Lightning has."""

    def configure_gradient_clipping(self, optimizer: Optimizer, **_: Any) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.grad.mul_(0.25)


def test_raw_gradients_are_those_before_a_module_changes_them() -> None:
    callback, trained = ParamWatch(), module(own=ClipsLate)
    fit(trained, callback)

    assert_used(callback, trained)
    np.testing.assert_allclose(watch_of(callback).frame("clip_coef"), 0.25, rtol=1e-6)


def test_raw_gradients_are_those_before_a_later_callback_changes_them() -> None:
    class Halves(lightning.pytorch.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
            for param in pl_module.parameters():
                param.grad.mul_(0.5)

    callback, trained = ParamWatch(), module()
    fit(trained, callback, callbacks=[Halves()])

    assert_used(callback, trained)
    np.testing.assert_allclose(watch_of(callback).frame("clip_coef"), 0.5, rtol=1e-6)


class ClipsItself:
    """Clips by torch's own function, in a place that says so."""

    clips_in = ""
    noted: list[list[float]]

    def clip_in(self: Any, place: str) -> None:
        if place == self.clips_in:
            self.noted = [*getattr(self, "noted", []), [float(param.grad.norm()) for param in self.parameters()]]
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    def on_after_backward(self) -> None:
        self.clip_in("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.clip_in("on_before_optimizer_step")

    def configure_gradient_clipping(
        self: Any, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_in("configure_gradient_clipping")
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class ClipsInACallback(lightning.pytorch.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        pl_module.clip_in("a callback")


@pytest.mark.parametrize("later", [None, 10.0, 0.05], ids="then {}".format)
@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("place", ["on_after_backward", "a callback", "on_before_optimizer_step", "configure_gradient_clipping"])
def test_raw_gradients_are_those_before_the_first_clipping_wherever_it_is(place: str, earlier: bool, later: float | None) -> None:
    callback, trained = ParamWatch(), module(own=ClipsItself)
    trained.clips_in = place
    both: list[Any] = [ClipsInACallback(), callback] if earlier else [callback, ClipsInACallback()]
    trainer = lightning.pytorch.Trainer(**SMALL, callbacks=both, gradient_clip_val=later)
    trainer.fit(trained, data())

    assert_used(callback, trained)
    frame, last = watch_of(callback).frame("grad_raw_norm"), min(0.1, later or 1)
    np.testing.assert_allclose(frame, trained.noted, rtol=1e-6)
    np.testing.assert_allclose(watch_of(callback).steps["clip_coef"], last / np.linalg.norm(trained.noted, axis=1), rtol=1e-4)


def test_a_gradient_that_is_clipped_once_more_by_lightning_is_measured_once_before(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = raw.measure
    monkeypatch.setattr(raw, "measure", lambda grads: (measured.append(len(grads)), measure(grads))[1])
    fit(module(), ParamWatch(), gradient_clip_val=0.5)

    assert [n for n in measured if n] == [4] * BATCHES


def test_accumulated_batches_are_one_step() -> None:
    callback, trained = ParamWatch(), module()
    fit(trained, callback, accumulate_grad_batches=4)

    assert_used(callback, trained, steps=2)
    assert list(watch_of(callback).steps["backwards"]) == [4, 2]
    first = slice(0, 1)
    # Lightning divides the loss of an incomplete round by 4 as well
    assert_frame_equal(watch_of(callback).frame(steps=first), plain(module(), accumulate=4).frame(steps=first))


def test_lbfgs_is_one_step_a_batch_with_its_last_gradient() -> None:
    callback, trained = ParamWatch(), module(make=torch.optim.LBFGS, max_iter=3)
    fit(trained, callback)

    assert_used(callback, trained)
    steps = watch_of(callback).steps
    assert steps["evaluations"].max() == 3
    assert (steps["backwards"] == steps["evaluations"]).all()


# ---- manual optimization --------------------------------------------------------------------


class Manual:
    """Two optimizers, one for each layer; the first one's gradients are clipped."""

    def training_step(self: Any, batch: list[Tensor], batch_idx: int) -> None:
        for i, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            if i == 0:
                self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()

    def configure_optimizers(self: Any) -> Any:
        self.automatic_optimization = False
        return [torch.optim.SGD(layer.parameters(), lr=LR) for layer in (self.net[0], self.net[2])]


@pytest.mark.parametrize("pl", NAMESPACES.values(), ids=NAMESPACES)
def test_two_manual_optimizers_make_one_record_a_batch(pl: ModuleType) -> None:
    callback, trained = ParamWatch(), module(pl, own=Manual)
    fit(trained, callback, pl=pl)

    reference = module(pl, own=Manual)
    optimizers = reference.configure_optimizers()
    with paramwatch.attach(reference, raw_gradients=True) as watch:
        for batch in data():
            for i, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                reference.loss(batch).backward()
                if i == 0:
                    nn.utils.clip_grad_norm_(reference.net[0].parameters(), 0.5)
                optimizer.step()

    assert_frame_equal(watch_of(callback).frame(), watch.frame())
    assert (watch.frame("clip_coef")[["net.0.weight", "net.0.bias"]] < 1).all(axis=None)
    assert list(watch_of(callback).steps["backwards"]) == [2] * BATCHES
    assert list(watch_of(callback).steps["global_step"]) == [2 * i for i in range(BATCHES)]


# ---- mixed precision ------------------------------------------------------------------------


def test_bfloat16_is_recorded_as_used() -> None:
    callback, trained = ParamWatch(), module()
    fit(trained, callback, precision="bf16-mixed")

    assert_used(callback, trained)
    assert watch_of(callback).steps["amp_scale"].isna().all()


def scaled() -> Any:
    """float16 on the CPU, with a scaler that is not the device's default there."""
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_under_a_scaler_gradients_are_without_the_scale_and_skipped_steps_are_seen(clip: float | None) -> None:
    callback, trained = ParamWatch(), module()
    fit(trained, callback, loader=data(bad=2), plugins=[scaled()], gradient_clip_val=clip)

    steps = watch_of(callback).steps
    assert list(steps["skipped"]) == [False, False, True, False, False, False]
    assert list(steps["amp_scale"]) == [64, 64, 64, 32, 32, 32]
    assert list(steps["batch_idx"]) == list(range(BATCHES))
    made = watch_of(callback).frame("grad_norm")[~steps["skipped"].to_numpy(bool)]
    np.testing.assert_allclose(made, trained.used, rtol=1e-5)
    assert steps["update_norm"].isna().tolist() == list(steps["skipped"])
    assert (steps["clip_coef"].drop(2) < 1).all() == (clip is not None)
    assert watch_of(callback).findings.empty


def test_under_a_scaler_a_fused_optimizer_that_skips_is_seen() -> None:
    callback, trained = ParamWatch(), module(fused=True)
    fit(trained, callback, loader=data(bad=2), plugins=[scaled()])

    steps = watch_of(callback).steps
    assert list(steps["skipped"]) == [False, False, True, False, False, False]
    assert list(steps["amp_scale"]) == [64, 64, 64, 32, 32, 32]
    np.testing.assert_allclose(watch_of(callback).frame("grad_norm").drop(2), np.delete(trained.used, 2, axis=0), rtol=1e-5)


# ---- where it goes --------------------------------------------------------------------------


def test_without_a_logger_nothing_is_written(tmp_path: Path) -> None:
    callback = ParamWatch()
    fit(module(), callback)

    assert watch_of(callback).path is None
    assert len(watch_of(callback).steps) == BATCHES
    assert not list(tmp_path.iterdir())


TRIALS: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"fast_dev_run": 3},
    "barebones": {"barebones": True, "max_steps": 3, "log_every_n_steps": 0},
}


@pytest.mark.parametrize("options", TRIALS.values(), ids=TRIALS)
def test_trial_runs_stay_in_memory(options: dict[str, Any], tmp_path: Path) -> None:
    callback, trained = ParamWatch(), module()
    trained.log = lambda *_: None
    fit(trained, callback, **options)

    assert watch_of(callback).path is None
    assert len(watch_of(callback).steps) == 3
    assert not list(tmp_path.iterdir())


def test_a_log_dir_of_its_own_needs_no_logger(tmp_path: Path) -> None:
    callback = ParamWatch(tmp_path / "own", name="generator")
    fit(module(), callback)

    assert watch_of(callback).path == tmp_path / "own" / "paramwatch" / "generator"
    assert_frame_equal(paramwatch.load(tmp_path / "own").frame(), watch_of(callback).frame())


@pytest.mark.parametrize("kind", ["TensorBoardLogger", "CSVLogger"])
@pytest.mark.parametrize("name", NAMESPACES)
def test_it_is_written_into_the_folder_of_the_logger(name: str, kind: str, tmp_path: Path) -> None:
    pl = NAMESPACES[name]
    logger = getattr(importlib.import_module(f"{name}.loggers"), kind)(tmp_path, name="run")
    callback = ParamWatch()
    fit(module(pl), callback, pl=pl, logger=logger)

    assert watch_of(callback).path == tmp_path / "run" / "version_0" / "paramwatch"
    assert_frame_equal(paramwatch.load(tmp_path).frame(), watch_of(callback).frame())


def list_logger(save_dir: Path | None = None) -> Any:
    """A logger that keeps what it is given, and has a folder only by way of its name."""
    from lightning.pytorch.loggers import Logger

    class ListLogger(Logger):
        name, version = "listed", 7

        def __init__(self) -> None:
            super().__init__()
            self.found: list[tuple[int, dict[str, float]]] = []

        @property
        def save_dir(self) -> str | None:
            return None if save_dir is None else str(save_dir)

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.found.append((-1 if step is None else step, metrics))

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    return ListLogger()


@pytest.mark.parametrize("save_dir", ["saved", None])
def test_a_logger_without_a_folder_gets_one_by_its_name_and_version(save_dir: str | None, tmp_path: Path) -> None:
    callback = ParamWatch()
    logger = list_logger(tmp_path / save_dir if save_dir else None)
    fit(module(), callback, logger=logger, default_root_dir=tmp_path / "root", max_steps=1)

    assert watch_of(callback).path == tmp_path / (save_dir or "root") / "listed" / "version_7" / "paramwatch"


@pytest.mark.parametrize("kind", ["by_name", "log_dir", "root"])
def test_a_remote_folder_of_a_logger_keeps_the_records_in_memory_and_says_so(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, logger = ParamWatch(), list_logger()
    remote = "s3://bucket/run"
    if kind == "root":
        monkeypatch.setattr(lightning.pytorch.Trainer, "default_root_dir", remote)
    else:
        monkeypatch.setattr(type(logger), "save_dir" if kind == "by_name" else "log_dir", remote, raising=False)
    fit(module(), callback, logger=logger, max_steps=2)

    assert watch_of(callback).path is None
    assert len(watch_of(callback).steps) == 2
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]
    (said,) = [record.message for record in caplog.records if record.name == "paramwatch" and record.levelno >= logging.WARNING]
    where = remote if kind == "log_dir" else f"{remote}/listed/version_7"
    assert said.startswith(f"paramwatch: the logger's folder {where} is not a local one, so nothing is written")
    assert "pass ParamWatch(log_dir=...)" in said


def test_a_logger_that_fails_is_left_out_by_name_and_the_others_get_theirs(caplog: pytest.LogCaptureFixture) -> None:
    callback, failing_one, sound = ParamWatch(), list_logger(), list_logger()

    class Failing(type(failing_one)):  # type: ignore[misc]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            super().log_metrics(metrics, step)
            if "paramwatch/grad_norm" in metrics:
                raise OSError("no network")

    failing_one.__class__ = Failing
    fit(module(), callback, logger=[failing_one, sound], log_every_n_steps=1)

    assert len(watch_of(callback).steps) == BATCHES
    got = [len([metrics for _, metrics in each.found if "paramwatch/grad_norm" in metrics]) for each in (failing_one, sound)]
    assert got == [1, BATCHES]
    (said,) = [record.message for record in caplog.records if record.name == "paramwatch"]
    assert said == (
        "paramwatch failed while logging totals to Failing (OSError: no network). "
        "No more totals go to Failing; recording and training go on."
    )


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_totals_reach_every_logger_at_the_steps_at_which_lightning_logs(every: int, accumulate: int, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    callback, listed = ParamWatch(), list_logger()
    loggers = [CSVLogger(tmp_path, name="run"), listed]
    fit(module(), callback, logger=loggers, log_every_n_steps=every, accumulate_grad_batches=accumulate, max_epochs=2)

    theirs = [step for step, metrics in listed.found if "loss" in metrics]
    ours = {step: metrics for step, metrics in listed.found if "paramwatch/grad_norm" in metrics}
    assert list(ours) == theirs
    assert len(ours) == 2 * BATCHES // accumulate // every
    recorded = watch_of(callback).steps
    assert [metrics["paramwatch/grad_norm"] for metrics in ours.values()] == list(recorded.loc[theirs, "grad_norm"])
    with open(tmp_path / "run" / "version_0" / "metrics.csv") as file:
        written = {int(row["step"]): row["paramwatch/update_norm"] for row in csv.DictReader(file) if row["paramwatch/update_norm"]}
    np.testing.assert_allclose([float(written[step]) for step in theirs], recorded.loc[theirs, "update_norm"])


def test_totals_are_curves_in_the_loggers_tensorboard(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = ParamWatch()
    fit(module(), callback, logger=TensorBoardLogger(tmp_path, name="run"), log_every_n_steps=2)
    read = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()

    norms = {event.step: event.value for event in read.Scalars("paramwatch/grad_norm")}
    assert list(norms) == [event.step for event in read.Scalars("loss")] == [1, 3, 5]
    np.testing.assert_allclose(list(norms.values()), watch_of(callback).steps.loc[[1, 3, 5], "grad_norm"], rtol=1e-6)


def test_a_step_that_was_not_measured_is_not_logged_as_the_one_before() -> None:
    callback, listed = ParamWatch(every=3), list_logger()
    fit(module(), callback, logger=listed, log_every_n_steps=1)

    assert [step for step, metrics in listed.found if "paramwatch/grad_norm" in metrics] == [0, 3]


# ---- the course of a fit --------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_when_training_raises_the_watch_is_closed_and_holds_what_was_seen(error: type[BaseException], tmp_path: Path) -> None:
    callback, trained = ParamWatch(tmp_path), module()
    loss = trained.loss

    def failing(batch: list[Tensor]) -> Tensor:
        if len(trained.used) == 3:
            raise error
        return loss(batch)

    trained.loss = failing
    with pytest.raises((error, SystemExit)):
        fit(trained, callback)

    assert watch_of(callback)._closed
    assert list(paramwatch.load(tmp_path).steps.index) == [0, 1, 2]
    assert_used(callback, trained, steps=3)


def test_validation_makes_no_records_and_steps_say_where_they_were() -> None:
    callback, trained = ParamWatch(), module()
    trained.validation_step = lambda batch, batch_idx: trained.loss(batch)
    sanity = {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 2}
    trainer = lightning.pytorch.Trainer(**SMALL | sanity, callbacks=[callback])
    trainer.fit(trained, data(), data())

    assert_used(callback, trained, steps=2 * BATCHES)
    steps = watch_of(callback).steps
    assert list(steps["epoch"]) == [0] * BATCHES + [1] * BATCHES
    assert list(steps["batch_idx"]) == [*range(BATCHES)] * 2
    assert list(steps["global_step"]) == list(range(2 * BATCHES))
    assert list(steps["backwards"]) == [1] * 2 * BATCHES


def test_a_resumed_fit_goes_on_at_the_next_number_also_in_the_same_folder(tmp_path: Path) -> None:
    trained, first = module(), ParamWatch(tmp_path)
    fit(trained, first).save_checkpoint(tmp_path / "half.ckpt")
    resumed, second = module(), ParamWatch(tmp_path)
    fit(resumed, second, ckpt=tmp_path / "half.ckpt", max_epochs=2)

    assert list(watch_of(second).steps["epoch"].iloc[-BATCHES:]) == [1] * BATCHES
    assert list(paramwatch.load(tmp_path).steps.index) == list(range(2 * BATCHES))
    norms = paramwatch.load(tmp_path).frame("grad_norm")
    np.testing.assert_allclose(norms, [*trained.used, *resumed.used], rtol=1e-5)


def test_a_second_fit_of_one_trainer_goes_on_and_one_of_another_starts_anew() -> None:
    trained, callback = module(), ParamWatch(first_step=10)
    trainer = fit(trained, callback)
    assert list(watch_of(callback).steps.index) == list(range(10, 10 + BATCHES))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trained, data())
    assert list(watch_of(callback).steps.index) == list(range(10 + BATCHES, 10 + 2 * BATCHES))

    fit(trained, callback)
    assert list(watch_of(callback).steps.index) == list(range(10, 10 + BATCHES))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))], ids=["deepcopy", "pickle"])
def test_a_callback_can_be_copied_before_and_after_a_fit(copied: Callable[[ParamWatch], ParamWatch]) -> None:
    trained, callback = module(), copied(ParamWatch(every=2))
    fit(trained, callback)
    again = copied(callback)
    fit(trained, again)

    assert list(watch_of(again).steps.index) == [0, 2, 4]
    assert again.watch is not callback.watch


def test_the_callback_belongs_to_both_namespaces() -> None:
    # it is of those that were imported before it, which in this process depends on who imported it first
    code = """
import lightning.pytorch, pytorch_lightning
from paramwatch.lightning import ParamWatch
assert issubclass(ParamWatch, lightning.pytorch.Callback)
assert issubclass(ParamWatch, pytorch_lightning.Callback)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_callback_takes_what_attach_takes() -> None:
    import inspect

    theirs = dict(inspect.signature(paramwatch.attach).parameters)
    del theirs["module"]
    assert {name: p.default for name, p in theirs.items()} == {
        name: p.default for name, p in inspect.signature(ParamWatch).parameters.items()
    }


# ---- misuse and failures --------------------------------------------------------------------


def test_misuse_is_refused_when_the_callback_is_made_or_before_training_starts() -> None:
    with pytest.raises(ParamWatchError, match="every must be a whole number of at least 1"):
        ParamWatch(every=0)
    with pytest.raises(ParamWatchError, match="log_dir must be a local folder, not 's3:/bucket/run'"):
        ParamWatch(Path("s3://bucket/run"))
    trained = module()
    with pytest.raises(ParamWatchError, match="no row matches"):
        fit(trained, ParamWatch(include="layer*"))

    assert not trained.used


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("ours")


FAILURES = {
    "raw": (ParamWatch, "_may_change", "looking at gradients before clipping"),
    "totals": (callback_module, "totals", "logging the totals of a step"),
}


@pytest.mark.parametrize(("owner", "function", "doing"), FAILURES.values(), ids=FAILURES)
def test_a_failure_of_ours_is_reported_once_and_the_fit_goes_on(
    owner: Any, function: str, doing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    untouched, trained, callback = module(), module(), ParamWatch()
    plain(untouched)
    monkeypatch.setattr(owner, function, failing)
    fit(trained, callback, logger=list_logger(), log_every_n_steps=1)

    for one, other in zip(trained.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one, other)
    said = [record.message for record in caplog.records if record.name == "paramwatch"]
    assert said == [f"paramwatch failed while {doing} (RuntimeError: ours). This Watch has stopped; training goes on."]


def test_a_fit_goes_on_if_attaching_to_its_module_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    untouched, trained, callback = module(), module(), ParamWatch()
    plain(untouched)
    monkeypatch.setattr(callback_module, "attach", failing)
    fit(trained, callback)

    for one, other in zip(trained.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one, other)
    assert callback.watch is None
    said = [record.message for record in caplog.records if record.name == "paramwatch"]
    assert said == ["paramwatch failed while attaching to the module (RuntimeError: ours). Nothing is recorded; training goes on."]


def test_a_skipped_step_is_reported_once_if_recording_it_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    callback, trained = ParamWatch(), module()
    monkeypatch.setattr("paramwatch.recorder.Recorder.skipped", failing)
    fit(trained, callback, loader=data(bad=2), plugins=[scaled()])

    assert len(trained.used) == BATCHES - 1
    assert isinstance(watch_of(callback).frame(), pd.DataFrame)
    assert caplog.text.count("paramwatch failed while recording a skipped step (RuntimeError: ours)") == 1
