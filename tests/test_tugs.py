"""Curves, sections and pictures of gradients by use, against the frames of the same run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import paramwatch
from paramwatch import cli
from paramwatch.digest import sections
from paramwatch.report import report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> paramwatch.Run:
    """A shared layer and a cell that is called twenty times, 30 steps, split at each third."""
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    net = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), shared, nn.Tanh(), shared), "cell": nn.RNNCell(8, 8)})
    folder = tmp_path_factory.mktemp("run")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, folder, uses=3, uses_of="*") as watch:
        for _ in range(30):
            optimizer.zero_grad()
            seen, state = net["mlp"](torch.rand(5, 4)), None
            for _ in range(20):
                state = net["cell"](seen, state)
            loss = state.square().mean()
            watch.root(loss)
            loss.backward()
            optimizer.step()
    return paramwatch.load(folder)


@pytest.fixture(scope="module")
def events(run: paramwatch.Run) -> EventAccumulator:
    found = EventAccumulator(str(run.path))
    found.Reload()
    return found


def test_each_split_row_has_a_curve_of_its_agreement(run: paramwatch.Run, events: EventAccumulator) -> None:
    agreement = run.agreement()["agreement"].unstack("parameter")

    assert {"mlp.2.weight", "mlp.2.bias", "cell.weight_hh"} <= set(agreement.columns)
    for row in agreement.columns:
        drawn = events.Scalars(f"agreement/{row}")
        assert [point.step for point in drawn] == list(range(0, 30, 3))
        np.testing.assert_allclose([point.value for point in drawn], agreement[row], rtol=1e-6)


def test_each_use_has_a_curve_of_its_share_unless_there_are_very_many(run: paramwatch.Run, events: EventAccumulator) -> None:
    shares = run.uses(parameters="mlp.2.weight")["use_share"].unstack("use")["mlp.4"]
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("use_share/")]

    assert {tag.removeprefix("use_share/").split("/")[0] for tag in tags} == {"mlp.2.weight", "mlp.2.bias"}
    drawn = events.Scalars("use_share/mlp.2.weight/mlp.4")
    np.testing.assert_allclose([point.value for point in drawn], shares, rtol=1e-6)


def test_the_summary_has_a_section_of_ties_by_use_those_that_fight_first(run: paramwatch.Run) -> None:
    (section,) = [section for section in sections(run) if section.key == "uses"]
    medians = run.agreement()["agreement"].groupby("parameter").median()

    found = {each["parameter"]: each for each in section.data}
    assert set(found) == set(medians.index)
    for row, median in medians.items():
        assert found[row]["agreement_median"] == pytest.approx(median)
    listed = [each["agreement_median"] for each in section.data]
    assert listed == sorted(listed)
    strongest = run.uses()["use_norm"].groupby(["parameter", "use"]).median()["mlp.2.weight"]
    assert found["mlp.2.weight"]["strongest"] == strongest.idxmax()


def test_json_of_the_summary_holds_the_uses(run: paramwatch.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["summary", str(run.path), "--json"]) == 0

    assert {each["parameter"] for each in json.loads(capsys.readouterr().out)["uses"]} >= {"mlp.2.weight", "cell.weight_hh"}


def test_the_report_draws_the_agreement(run: paramwatch.Run) -> None:
    page = report(run)

    assert "Tied gradients, use by use" in page
    assert 'aria-label="agreement over the steps 0 to 27' in page


def test_a_run_without_splits_has_no_such_section(tmp_path: Path) -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net, tmp_path):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    run = paramwatch.load(tmp_path)

    assert "uses" not in {section.key for section in sections(run)}
    assert "use by use" not in report(run)
