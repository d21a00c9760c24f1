"""The callback beside others: a second one, a search for a learning rate, a logger of another kind, a test loop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pandas.testing import assert_frame_equal
from test_lightning import BATCHES, NAMESPACES, data, fit, module, watch_of

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
