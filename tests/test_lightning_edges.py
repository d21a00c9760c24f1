"""The callback beside others: a second one, a search for a learning rate, a logger of another kind, a test loop."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pandas.testing import assert_frame_equal
from pytorch_lightning.strategies import SingleDeviceStrategy
from test_lightning import BATCHES, NAMESPACES, Manual, data, fit, module, watch_of

import paramwatch
from paramwatch.lightning import ParamWatch

pytestmark = [
    # a hint that does not concern loaders of 24 samples
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # a deprecation inside Lightning
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
SILENT: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_two_callbacks_watch_one_model_in_folders_of_their_own(tmp_path: Path) -> None:
    often, closely = ParamWatch("run", detail="cheap"), ParamWatch("run", name="close", detail="full", every=3)
    trainer = pl.Trainer(**SILENT, max_epochs=1, callbacks=[often, closely], logger=False)
    trainer.fit(module(pl), data())

    norms = watch_of(often).frame("grad_norm")
    assert list(norms.index) == list(range(BATCHES))
    assert_frame_equal(watch_of(closely).frame("grad_norm"), norms.loc[::3])
    assert "update_cos" in watch_of(closely).frame()
    assert watch_of(closely).path == tmp_path / "run" / "paramwatch" / "close"
    assert paramwatch.load("run/paramwatch/close").frame().equals(watch_of(closely).frame())


def test_two_callbacks_log_their_totals_under_names_of_their_own() -> None:
    logger = pl.loggers.CSVLogger("logs")
    callbacks = [ParamWatch(), ParamWatch(name="close")]
    pl.Trainer(**SILENT, max_epochs=1, callbacks=callbacks, logger=logger, log_every_n_steps=2).fit(module(pl), data())
    logged = set(Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(","))
    assert {"paramwatch/grad_norm", "paramwatch/close/grad_norm"} <= logged


def test_two_callbacks_cannot_share_a_folder() -> None:
    class Other(ParamWatch):
        state_key = "another"

    trainer = pl.Trainer(**SILENT, max_epochs=1, callbacks=[ParamWatch("run"), Other("run")], logger=False)
    with pytest.raises(paramwatch.ParamWatchError, match="pass name="):
        trainer.fit(module(pl), data())


@pytest.mark.parametrize("name", NAMESPACES)
def test_two_callbacks_without_names_are_refused_before_training_starts(name: str) -> None:
    namespace, callbacks, trained = NAMESPACES[name], [ParamWatch(), ParamWatch()], module(NAMESPACES[name])
    trainer = namespace.Trainer(**SILENT, max_epochs=1, callbacks=callbacks, logger=False)
    with pytest.raises(paramwatch.ParamWatchError, match="two ParamWatch callbacks of one trainer have the name ''; pass name= to one"):
        trainer.fit(trained, data())
    assert not trained.used
    assert [callback.watch for callback in callbacks] == [None, None]


# ---- checkpoints ----------------------------------------------------------------------------


@pytest.fixture
def without(tmp_path: Path) -> Path:
    """A checkpoint after one epoch that no ParamWatch has seen."""
    trainer = pl.Trainer(**SILENT, max_epochs=1, logger=False)
    trainer.fit(module(pl), data())
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    return tmp_path / "without.ckpt"


def said_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "paramwatch" and "checkpoint" in record.message]


def test_a_fit_resumed_from_a_checkpoint_without_a_counter_goes_on_at_the_trainers(without: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="paramwatch")
    callback = ParamWatch("run")
    fit(module(pl), callback, pl=pl, ckpt=without, max_epochs=2)

    steps = watch_of(callback).steps
    assert list(steps.index) == list(steps["global_step"]) == list(range(BATCHES, 2 * BATCHES))
    assert list(paramwatch.load("run").steps.index) == list(steps.index)
    (said,) = said_of(caplog)
    assert said.startswith("paramwatch: the checkpoint has no step counter of ParamWatch{'name': ''}, so steps are numbered from 6 on")


# a fit that is resumed without a callback that its checkpoint knows
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_resumed_under_another_name_goes_on_at_the_trainers_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="paramwatch")
    fit(module(pl), ParamWatch(name="one"), pl=pl).save_checkpoint(tmp_path / "one.ckpt")
    known, other = ParamWatch(name="one"), ParamWatch(name="other")
    fit(module(pl), known, pl=pl, ckpt=tmp_path / "one.ckpt", max_epochs=2, callbacks=[other])

    for callback in (known, other):
        assert list(watch_of(callback).steps.index) == list(range(BATCHES, 2 * BATCHES))
    assert len(said_of(caplog)) == 1
    assert "ParamWatch{'name': 'other'}" in said_of(caplog)[0]


def test_a_first_step_that_is_given_is_where_a_fit_without_a_counter_goes_on(without: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="paramwatch")
    callback = ParamWatch(first_step=100)
    fit(module(pl), callback, pl=pl, ckpt=without, max_epochs=2)

    assert list(watch_of(callback).steps.index) == list(range(100, 100 + BATCHES))
    assert not said_of(caplog)


def test_of_several_optimizers_the_trainers_count_is_in_batches(tmp_path: Path) -> None:
    trainer = pl.Trainer(**SILENT, max_epochs=1, logger=False)
    trainer.fit(module(pl, own=Manual), data())
    assert trainer.global_step == 2 * BATCHES
    trainer.save_checkpoint(tmp_path / "two.ckpt")

    callback = ParamWatch()
    fit(module(pl, own=Manual), callback, pl=pl, ckpt=tmp_path / "two.ckpt", max_epochs=2)
    assert list(watch_of(callback).steps.index) == list(range(BATCHES, 2 * BATCHES))


def test_testing_a_checkpoint_does_not_move_the_next_fit(tmp_path: Path) -> None:
    callback, trained = ParamWatch(), module(pl)
    trained.test_step = lambda batch, batch_idx: trained.loss(batch)
    trainer = fit(trained, callback, pl=pl)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trained, data())

    trainer.test(trained, data(), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trained, data())
    assert list(watch_of(callback).steps.index) == list(range(2 * BATCHES, 3 * BATCHES))


def test_a_strategy_that_restores_late_goes_on_at_the_saved_number(tmp_path: Path) -> None:
    class Late(SingleDeviceStrategy):
        """As those of sharded models: a checkpoint is read after `on_fit_start`."""

        restore_checkpoint_after_setup = True

    fit(module(pl), ParamWatch("run", first_step=10), pl=pl).save_checkpoint(tmp_path / "half.ckpt")
    callback = ParamWatch("run", first_step=10)
    fit(module(pl), callback, pl=pl, ckpt=tmp_path / "half.ckpt", max_epochs=2, strategy=Late("cpu"))
    assert list(watch_of(callback).steps.index) == list(range(10, 10 + 2 * BATCHES))
    assert list(watch_of(callback).steps["epoch"]) == [0] * BATCHES + [1] * BATCHES


# ---- searches, other loops, other loggers ---------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_search_for_a_learning_rate_is_not_recorded(order: str) -> None:
    from pytorch_lightning.callbacks import LearningRateFinder

    callback, trained = ParamWatch(), module(pl)
    trained.lr = 0.1
    finder = LearningRateFinder(num_training_steps=BATCHES, update_attr=False)
    callbacks = [callback, finder] if order == "before" else [finder, callback]
    with warnings.catch_warnings():
        # Lightning's own checkpoint of the search loads with a default that it warns of
        warnings.simplefilter("ignore")
        pl.Trainer(**SILENT, max_epochs=1, callbacks=callbacks, logger=False).fit(trained, data())

    steps = watch_of(callback).steps
    assert list(steps.index) == list(range(BATCHES))
    assert list(steps["batch_idx"]) == list(range(BATCHES))


def test_the_tuner_is_not_recorded() -> None:
    from pytorch_lightning.tuner import Tuner

    callback, trained = ParamWatch(), module(pl)
    trained.lr = 0.1
    trainer = pl.Trainer(**SILENT, max_epochs=1, callbacks=[callback], logger=False)
    with warnings.catch_warnings():
        # as above
        warnings.simplefilter("ignore")
        Tuner(trainer).lr_find(trained, data(), num_training=BATCHES, update_attr=False)
    assert callback.watch is None
    trainer.fit(trained, data())
    assert list(watch_of(callback).steps.index) == list(range(BATCHES))


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_test_loop_makes_no_records_and_leaves_the_watch_readable(name: str) -> None:
    namespace = NAMESPACES[name]
    callback, trained = ParamWatch(), module(namespace)
    trained.test_step = lambda batch, batch_idx: trained.loss(batch)
    trainer = fit(trained, callback, pl=namespace)
    recorded = watch_of(callback).frame()
    trainer.test(trained, data(), verbose=False)
    assert watch_of(callback).frame().equals(recorded)


def test_totals_reach_weights_and_biases_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: its offline logger is not tried")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = pl.loggers.WandbLogger(save_dir="wb", offline=True)
    callback = ParamWatch()
    with warnings.catch_warnings():
        # deprecations inside wandb
        warnings.simplefilter("ignore")
        pl.Trainer(**SILENT, max_epochs=1, callbacks=[callback], logger=logger, log_every_n_steps=2).fit(module(pl), data())
        summary = dict(logger.experiment.summary)
        logger.experiment.finish()
    assert summary["paramwatch/grad_norm"] == pytest.approx(watch_of(callback).steps.loc[BATCHES - 1, "grad_norm"])
    assert watch_of(callback).path is not None


def test_a_module_without_an_optimizer_is_said_to_have_none(caplog: pytest.LogCaptureFixture) -> None:
    class Without:
        def configure_optimizers(self) -> None:
            return None

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will run with no optimizer")
        fit(module(pl, own=Without), ParamWatch(), pl=pl)

    (said,) = [record.message for record in caplog.records if record.name == "paramwatch"]
    assert "0 optimizer steps of" in said
    assert "No torch optimizer stepped while it was attached" in said
