"""A run of a million rows is kept, read and shown like any other, and what is printed of it is bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from records import inventory

from paramwatch.batch import Batch
from paramwatch.cli import main
from paramwatch.columns import LAYOUTS, PARTS
from paramwatch.loading import load
from paramwatch.record import Changes
from paramwatch.store import DiskFolder, Store

ROWS, STEPS = 1_000_000, 2
PAGE = 20_000
"""Characters that a command prints at most."""

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = inventory(*(f"block.{i // 1000}.{i % 1000}.weight" for i in range(ROWS)), layout=LAYOUTS["cheap"])
    shape = STEPS, len(net.kinds), ROWS
    parts = {PARTS[name] for _, name in net.layout}
    values = {part.name: np.full(shape, 4 if part.name == "count" else 0).astype(part.dtype) for part in parts}
    values["rms"][:] = np.arange(ROWS)
    lr, state = np.full((STEPS, ROWS), 0.1), np.zeros((STEPS, ROWS), np.int8)
    where = tmp_path_factory.mktemp("run")
    store = Store(DiskFolder(where / "paramwatch"), max_bytes=10**12)
    batch = Batch(net, range(STEPS), [0.0] * STEPS, {}, values, np.ones(ROWS, bool), lr, state, [Changes()] * STEPS)
    for i in range(STEPS):
        store.write(batch.record(i))
    store.close()
    return where


def test_frames_of_one_row_and_of_all_hold_what_was_written(folder: Path) -> None:
    run = load(folder)

    assert run.frame("grad_rms", parameters="block.999.999.weight").to_numpy().tolist() == [[ROWS - 1]] * STEPS
    assert (run.frame("grad_rms").to_numpy() == np.arange(ROWS)).all()
    assert run.frame("grad_norm", by="layer").shape == (STEPS, ROWS)
    assert len(run.parameters) == ROWS


@pytest.mark.parametrize("command", [["summary"], ["show", "grad_norm"], ["tail", "--once"], ["findings"]], ids=" ".join)
def test_what_a_command_prints_fits_a_page(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command[0], str(folder), *command[1:]]) == 0

    said = capsys.readouterr()
    assert len(said.out) < PAGE
    assert not said.err


def test_a_report_and_an_export_are_files(folder: Path, tmp_path: Path) -> None:
    page, table = tmp_path / "report.html", tmp_path / "some.parquet"
    assert main(["report", str(folder), "-o", str(page)]) == 0
    assert page.stat().st_size < 1_000_000

    assert main(["export", str(folder), "-o", str(table), "--parameters", "block.7.*"]) == 0
    assert len(pd.read_parquet(table)) == STEPS * 1000
