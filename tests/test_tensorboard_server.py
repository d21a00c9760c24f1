"""What a TensorBoard server, of either loader, shows of an event file beside the user's own."""

from __future__ import annotations

import importlib.util
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from records import inventory, record
from servers import DEADLINE_SECONDS, tensorboard
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from paramwatch import attach, bins
from paramwatch.columns import ABSENT
from paramwatch.record import Inventory, Record
from paramwatch.tensorboard.events import EventFile
from paramwatch.tensorboard.picture import HEIGHT, WIDTH

NAME = "0.block 2.0.weight"
ALIAS = "tied\n<b>"
OTHER = '"q"/\U0001f525 %2F?&#'

LIVE = {"live": "loss", "live/paramwatch": "grad_norm/weight", "bare": "loss", "bare/paramwatch": "grad_norm/weight"}
"""The runs that go on while the server looks, and a curve of each."""

needs_rust = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard_data_server") is None, reason="TensorBoard has no Rust loader for this platform"
)


@dataclass
class Server:
    """A running TensorBoard."""

    address: str
    log: Path

    def get(self, route: str, **query: str) -> Any:
        url = f"{self.address}data/plugin/{route}?{urllib.parse.urlencode(query)}"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            data = answer.read()
        return json.loads(data) if route != "images/individualImage" else data

    def points(self, run: str, tag: str) -> list[tuple[int, float]]:
        return [(step, float(value)) for _, step, value in self.get("scalars/scalars", run=run, tag=tag)]


def tensors_of(step: int, spoilt: bool = False) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(step)
    tensors = {kind: {name: rng.standard_normal(12).astype(np.float32) for name in (NAME, OTHER)} for kind in ("param", "grad", "update")}
    if spoilt:
        tensors["grad"][OTHER][:] = np.nan
    return tensors


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's own curve, and a run that was left at step 8, gone back to step 5 and has a round in two at step 6."""
    folder = tmp_path_factory.mktemp("logs")
    with SummaryWriter(str(folder)) as writer:
        for step in range(10):
            writer.add_scalar("loss", 1 / (1 + step), step)
    inv = inventory(NAME, OTHER, ALIAS, tied={NAME: [ALIAS]})
    for steps in (range(9), range(5, 8)):
        events = EventFile(folder / "paramwatch")
        for step in steps:
            tensors = tensors_of(step, spoilt=step == 7)
            if step == 6:
                events.write(with_histograms(step, inv, {kind: {OTHER: data[OTHER]} for kind, data in tensors.items()}))
                events.flush()
                tensors = {kind: {NAME: data[NAME]} for kind, data in tensors.items()}
            events.write(with_histograms(step, inv, tensors))
        events.close()
    session(folder / "resumed", range(5))
    session(folder / "resumed", range(5, 9))
    session(folder / "torn", range(6), torn=True)
    session(folder / "gone on", range(4), torn=True)
    session(folder / "gone on", range(3, 7))
    return folder


def session(folder: Path, steps: range, torn: bool = False) -> None:
    """The steps of one parameter in a file of their own, which may be torn as by a process that is killed while it writes the last one."""
    before = set(folder.glob("*"))
    events = EventFile(folder)
    for step in steps:
        events.write(record(step, inventory("w"), {"param": {"w": np.ones(4)}, "grad": {"w": np.full(4, 1.0 + step)}}))
    events.flush()
    (file,) = set(folder.iterdir()) - before
    written = file.read_bytes()
    events.close()
    if torn:
        file.write_bytes(written[:-9])


def with_histograms(step: int, inv: Inventory, tensors: dict[str, dict[str, Any]]) -> Record:
    counts = {kind: np.array([binned(data.get(row.name)) for row in inv.rows]) for kind, data in tensors.items()}
    return replace(record(step, inv, tensors), histograms=counts)


def binned(x: Any) -> Any:
    """Counts as a record has them."""
    if x is None:
        return np.full(bins.BINS, ABSENT)
    return np.bincount(bins.positions(x), minlength=bins.BINS + 1)[: bins.BINS]


class Live:
    """Two runs that are being trained, each with a writer of its own in the folder above ours: Lightning's logger, and torch's bare one."""

    def __init__(self, folder: Path) -> None:
        self.logger, self.writer = TensorBoardLogger(folder, name="live", version=""), SummaryWriter(str(folder / "bare"))
        self.nets = [nn.Linear(1, 1) for _ in range(2)]
        self.watches = [attach(net, folder / run) for net, run in zip(self.nets, ("live", "bare"), strict=True)]
        self.optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in self.nets]
        self.step = -1
        self.go_on()

    def go_on(self) -> None:
        """Three more steps."""
        for _ in range(3):
            self.step += 1
            for net, optimizer in zip(self.nets, self.optimizers, strict=True):
                net(torch.ones(1, 1)).sum().backward()
                optimizer.step()
            self.logger.log_metrics({"loss": 1.0}, step=self.step)
            self.writer.add_scalar("loss", 1.0, self.step)
        self.logger.save()
        self.writer.flush()
        for watch in self.watches:
            watch.flush()

    def close(self) -> None:
        for watch in self.watches:
            watch.close()
        self.logger.finalize("success")
        self.writer.close()


@pytest.fixture(scope="module")
def live(log_dir: Path) -> Iterator[Live]:
    found = Live(log_dir)
    yield found
    found.close()


@pytest.fixture(scope="module", params=[pytest.param("true", marks=needs_rust), "false"], ids=["rust", "python"])
def server(request: pytest.FixtureRequest, log_dir: Path, live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with tensorboard(log_dir, log, f"--load_fast={request.param}", "--reload_interval=1") as address:
        yield started(address, log)


def started(address: str, log: Path) -> Server:
    """Wait until the server has read both runs."""
    server, deadline = Server(address, log), time.monotonic() + DEADLINE_SECONDS
    seen: object = None
    while time.monotonic() < deadline:
        try:
            seen = server.get("scalars/tags")
            if "loss" in seen.get(".", {}) and [step for step, _ in server.points("paramwatch", "grad_norm/(all)")][-1:] == [7]:
                return server
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            seen = error
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard did not show both runs in {DEADLINE_SECONDS} s; last seen: {seen!r}; it said:\n{log.read_text()}")


def test_the_users_own_curve_is_a_run_of_its_own(server: Server) -> None:
    assert set(server.get("scalars/tags")) == {".", "paramwatch", *LIVE, "resumed", "torn", "gone on"}
    assert [step for step, _ in server.points(".", "loss")] == list(range(10))


def test_every_name_has_its_curves(server: Server) -> None:
    tags = server.get("scalars/tags")["paramwatch"]
    expected = {f"{statistic}/{name}" for statistic in ("param_norm", "grad_norm", "update_ratio") for name in (NAME, ALIAS, OTHER)}
    assert expected <= set(tags)


def test_a_rerun_and_a_round_in_two_draw_no_zigzag(server: Server) -> None:
    for tag in ("grad_norm/(all)", f"grad_norm/{NAME}", f"param_norm/{OTHER}"):
        assert [step for step, _ in server.points("paramwatch", tag)] == list(range(8))


def test_a_resumed_run_draws_one_line(server: Server) -> None:
    assert server.points("resumed", "grad_norm/w") == [(step, 2.0 + 2 * step) for step in range(9)]


def test_a_torn_file_loses_its_last_step_only_and_what_goes_on_from_there_is_shown(server: Server) -> None:
    assert server.points("torn", "grad_norm/w") == [(step, 2.0 + 2 * step) for step in range(5)]
    assert server.points("gone on", "grad_norm/w") == [(step, 2.0 + 2 * step) for step in range(7)]


def test_values_are_those_of_the_tensors(server: Server) -> None:
    gradients = [[data.astype(np.float64) for data in tensors_of(step)["grad"].values()] for step in range(7)]
    own, total = ([value for _, value in server.points("paramwatch", f"grad_norm/{name}")][:7] for name in (NAME, "(all)"))
    assert own == pytest.approx([np.linalg.norm(named) for named, _ in gradients], rel=1e-6)
    assert total == pytest.approx([np.linalg.norm(np.concatenate(both)) for both in gradients], rel=1e-6)


def test_a_gradient_that_is_not_a_number_is_shown_as_such(server: Server) -> None:
    assert np.isnan(server.points("paramwatch", f"grad_norm/{OTHER}")[7][1])
    assert np.isnan(server.points("paramwatch", "grad_norm/(all)")[7][1])
    assert dict(server.points("paramwatch", "nonfinite/(all)"))[7] == 12


def test_the_text_tab_shows_ties_and_inventory(server: Server) -> None:
    assert set(server.get("text/tags")["paramwatch"]) == {"paramwatch/ties", "paramwatch/inventory", "paramwatch/curves"}
    newest = server.get("text/text", run="paramwatch", tag="paramwatch/ties")[-1]
    assert "<table>" in newest["text"]
    assert "tied&#92;n&#60;b&#62;" in newest["text"]


def test_histograms_are_of_the_finite_elements(server: Server) -> None:
    kinds = ("param", "grad", "update")
    tags = set(server.get("histograms/tags")["paramwatch"])
    assert tags >= {f"{kind}/{name}" for kind in kinds for name in (NAME, ALIAS, OTHER)}
    points = {step: buckets for _, step, buckets in server.get("histograms/histograms", run="paramwatch", tag=f"grad/{OTHER}")}
    # of step 7 there is nothing finite to show, and what was on disk of it before the re-run is gone
    assert sorted(points) == list(range(7))
    x = tensors_of(6)["grad"][OTHER]
    assert sum(count for _, _, count in points[5]) == x.size
    assert points[4][0][0] == pytest.approx(tensors_of(4)["grad"][OTHER].min())
    assert points[4][-1][1] == pytest.approx(tensors_of(4)["grad"][OTHER].max())


def test_distributions_are_over_the_parameters(server: Server) -> None:
    tags = {f"{statistic}/(log10 of each)" for statistic in ("param_norm", "grad_norm", "update_ratio")}
    assert tags <= set(server.get("distributions/tags")["paramwatch"])
    points = server.get("distributions/distributions", run="paramwatch", tag="grad_norm/(log10 of each)")
    assert [step for _, step, _ in points] == list(range(8))
    norms = [np.linalg.norm(x.astype(np.float64)) for x in tensors_of(3)["grad"].values()]
    quantiles = [value for _, value in points[3][2]]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] <= np.log10(min(norms)) <= np.log10(max(norms)) <= quantiles[-1]


def test_the_heat_map_is_a_picture_of_the_latest_session(server: Server) -> None:
    for tag in ("grad_norm/(heat map)", "update_ratio/(heat map)"):
        found = server.get("images/images", run="paramwatch", tag=tag, sample="0")
        assert [image["step"] for image in found] == [7]
        png = server.get("images/individualImage", **dict(urllib.parse.parse_qsl(found[0]["query"])))
        assert Image.open(io.BytesIO(png)).size == (WIDTH, HEIGHT)


def test_what_is_written_later_beside_lightnings_logger_and_a_bare_writer_is_shown_of_each(server: Server, live: Live) -> None:
    live.go_on()
    deadline = time.monotonic() + DEADLINE_SECONDS
    seen: dict[str, list[int]] = {}
    while any(seen.get(run) != list(range(live.step + 1)) for run in LIVE):
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)
        seen = {run: [step for step, _ in server.points(run, tag)] for run, tag in LIVE.items()}
