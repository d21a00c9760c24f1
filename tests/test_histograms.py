"""Histograms end to end: at the steps that were asked for, of what the optimizer used, live and loaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from records import inventory, record
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramwatch
from paramwatch.bins import BINS, HIGH, LOW, positions
from paramwatch.block import joined_record
from paramwatch.lightning import ParamWatch
from paramwatch.record import Record
from paramwatch.testing import ListSink


def net() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(8, 1))


def histogram(x: Tensor) -> np.ndarray:
    return np.bincount(positions(x.detach().double().numpy().ravel()), minlength=BINS + 1)[:BINS]


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, dict[str, np.ndarray]]]:
    """Kind -> row -> histogram, of each step, by hand."""
    found, x = [], torch.rand(16, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        moved = {name: p.detach().double() - before[name].double() for name, p in model.named_parameters()}
        kinds = {"param": before, "grad": grads, "update": moved}
        found.append({kind: {name: histogram(t) for name, t in tensors.items()} for kind, tensors in kinds.items()})
    return found


def watched(steps: int = 7, log_dir: Path | None = None, **options: Any) -> tuple[paramwatch.Watch, list[Record], list[Any], nn.Module]:
    sink, model = ListSink(), net()
    watch = paramwatch.attach(model, log_dir, sinks=[sink], **options)
    truth = train(model, torch.optim.Adam(model.parameters(), lr=0.01), steps)
    watch.close()
    return watch, sink.records, truth, model


def test_each_nth_measured_step_has_the_histograms_of_what_was_used_and_the_others_have_none() -> None:
    _, records, truth, _ = watched(histograms=3, update="exact")

    assert [bool(each.histograms) for each in records] == [True, False, False, True, False, False, True]
    for each in records[::3]:
        assert set(each.histograms) == {"param", "grad", "update"}
        for kind, counts in each.histograms.items():
            assert (counts.dtype, counts.shape, counts.flags.writeable) == (np.int64, (6, BINS), False)
            np.testing.assert_array_equal(counts, [truth[each.step][kind][row.name] for row in each.inventory.rows])


def test_measured_steps_are_meant() -> None:
    _, records, _, _ = watched(9, histograms=2, every=2)

    assert [each.step for each in records if each.histograms] == [0, 4, 8]


@pytest.mark.parametrize("update", ["sampled", "off"])
def test_what_an_update_was_is_not_guessed(update: str) -> None:
    _, records, _, _ = watched(1, histograms=1, update=update)

    assert set(records[0].histograms) == {"param", "grad"}


def test_a_frame_has_a_line_for_each_bin_that_holds_something(tmp_path: Path) -> None:
    watch, _, truth, _ = watched(log_dir=tmp_path, histograms=3, update="exact")
    found = watch.histograms()

    assert list(found.columns) == ["low", "high", "count"]
    assert found.index.names == ["step", "parameter", "kind"]
    assert list(dict.fromkeys(found.index)) == list(itertools.product([0, 3, 6], watch.parameters.index, ["param", "grad", "update"]))
    for (step, name, kind), lines in found.groupby(level=[0, 1, 2]):
        counts = truth[step][kind][name]
        filled = np.flatnonzero(counts)
        expected = pd.DataFrame({"low": LOW[filled], "high": HIGH[filled], "count": counts[filled]}, lines.index)
        pd.testing.assert_frame_equal(lines, expected)
    pd.testing.assert_frame_equal(paramwatch.load(tmp_path).histograms(), found)
    both = paramwatch.load([tmp_path]).histograms()
    assert both.index.names == ["run", "step", "parameter", "kind"]


def test_rows_and_steps_are_chosen_as_in_other_frames() -> None:
    watch, _, _, _ = watched(histograms=1)
    every = watch.histograms()

    pd.testing.assert_frame_equal(watch.histograms(steps=slice(2, 4)), every[every.index.get_level_values(0).isin([2, 3])])
    some = watch.histograms(parameters="4.bias", steps=slice(5, 6), aliases=True)
    assert set(some.index.get_level_values(1)) == {"2.bias", "4.bias"}
    pd.testing.assert_frame_equal(some.loc[5, "4.bias"], every.loc[5, "2.bias"])
    for wrong in ({"parameters": "nothing"}, {"steps": 3}, {"parameters": []}):
        with pytest.raises(paramwatch.ParamWatchError):
            watch.histograms(**wrong)  # type: ignore[arg-type]


def test_without_histograms_the_frame_is_empty() -> None:
    watch, _, _, _ = watched(2)

    assert watch.histograms().empty
    assert watch.histograms().index.names == ["step", "parameter", "kind"]


def test_a_factor_that_gradients_carry_into_the_step_is_taken_out() -> None:
    sink, model = ListSink(), net()
    with paramwatch.attach(model, sinks=[sink], histograms=1):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # type: ignore[attr-defined]  # as a scaler
        train(model, optimizer, 1)
    # the step has left them without it
    scaled = {name: histogram(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    np.testing.assert_array_equal(sink.records[0].histograms["grad"], [scaled[row.name] for row in sink.records[0].inventory.rows])


def test_a_step_that_amp_skipped_has_no_update() -> None:
    sink, model = ListSink(), net()
    with paramwatch.attach(model, sinks=[sink], histograms=1):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)  # type: ignore[attr-defined]  # as a scaler
        train(model, optimizer, 1)

    assert set(sink.records[0].histograms) == {"param", "grad"}


def test_two_optimizers_have_their_rows_in_one_record_and_what_nobody_steps_is_there_at_first() -> None:
    sink, model = ListSink(), net()
    model[0].bias.requires_grad_(False)
    with paramwatch.attach(model, sinks=[sink], histograms=1):
        first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[2], model[5]))
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            first.step(), second.step()
    whole = sink.records[0].histograms

    assert (whole["param"] >= 0).all()
    assert (whole["grad"] >= 0).all(1).tolist() == [False, False, True, True, True, True]
    assert (sink.records[1].histograms["param"] >= 0).all(1).sum() == 6  # a power of two
    assert whole["param"].sum() == sum(p.numel() for p in model.parameters())


def test_what_is_not_finite_is_in_no_bin_and_an_empty_histogram_is_kept(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with paramwatch.attach(model, tmp_path, histograms=1):
        nn.init.constant_(model.weight, float("nan"))
        torch.optim.SGD(model.parameters()).step()
    lines = paramwatch.load(tmp_path)._read().lines["histograms"].to_pylist()

    counted = {(line["parameter"], line["kind"]): sum(line["count"]) for line in lines}

    assert counted == {("weight", "param"): 0, ("bias", "param"): 1, ("weight", "update"): 0, ("bias", "update"): 1}


def test_training_is_the_same_bit_for_bit() -> None:
    *_, plain = watched()
    *_, binned = watched(histograms=1)

    for one, other in zip(plain.parameters(), binned.parameters(), strict=True):
        assert torch.equal(one, other)


class _Operations(TorchDispatchMode):
    """Names what is done."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_off_a_step_with_histograms_nothing_more_is_done() -> None:
    def operations(**options: int) -> list[str]:
        model = net()
        with paramwatch.attach(model, **options):  # type: ignore[arg-type]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train(model, optimizer, 1)
            with _Operations() as seen:
                train(model, optimizer, 3)
        return seen.names

    assert operations(histograms=100) == operations()


def test_a_stored_histogram_takes_some_bytes_a_bin(tmp_path: Path) -> None:
    model = nn.Linear(300, 300, bias=False)
    with paramwatch.attach(model, tmp_path, histograms=1):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(60):
            model(torch.randn(8, 300)).square().mean().backward()
            optimizer.step()
    (file,) = (tmp_path / "paramwatch").glob("*.histograms.arrow")
    lines = paramwatch.load(tmp_path)._read().lines["histograms"]

    assert file.stat().st_size < 8 * sum(map(len, lines["bin"].to_pylist()))


def test_the_parts_of_a_step_make_one_record() -> None:
    net, counts = inventory("a", "b"), np.full((2, BINS), -1)
    first, second = counts.copy(), counts.copy()
    first[0], second[1] = 1, 2
    early, late = record(3, net, {}), record(3, net, {})
    object.__setattr__(early, "histograms", {"param": first, "grad": first})
    object.__setattr__(late, "histograms", {"param": second})
    joined = joined_record(early, late).histograms

    np.testing.assert_array_equal(joined["param"], [first[0], second[1]])
    np.testing.assert_array_equal(joined["grad"], first)


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_the_lightning_callback_takes_them() -> None:
    callback = ParamWatch(histograms=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=4, accelerator="cpu", callbacks=[callback], **quiet)  # type: ignore[arg-type]
    trainer.fit(_Module(), torch.utils.data.DataLoader(torch.rand(16, 4), batch_size=4))

    assert set(callback.watch.histograms().index.get_level_values("step")) == {0, 2}
