"""What a TensorBoard server, of either loader, shows of an event file beside the user's own."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import inventory, record
from torch.utils.tensorboard import SummaryWriter

from paramwatch.tensorboard.events import EventFile

NAME = "0.block 2.0.weight"
ALIAS = "tied\n<b>"
DEADLINE_SECONDS = 60

needs_rust = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard_data_server") is None, reason="TensorBoard has no Rust loader for this platform"
)


@dataclass
class Server:
    """A running TensorBoard."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, route: str, **query: str) -> Any:
        url = f"{self.address}data/plugin/{route}?{urllib.parse.urlencode(query)}"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            return json.loads(answer.read())

    def points(self, run: str, tag: str) -> list[tuple[int, float]]:
        return [(step, float(value)) for _, step, value in self.get("scalars/scalars", run=run, tag=tag)]


def tensors_of(step: int, spoilt: bool = False) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(step)
    tensors = {kind: {name: rng.standard_normal(12).astype(np.float32) for name in (NAME, "other")} for kind in ("param", "grad", "update")}
    if spoilt:
        tensors["grad"]["other"][:] = np.nan
    return tensors


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's own curve, and a run that was left at step 8, gone back to step 5 and has a round in two at step 6."""
    folder = tmp_path_factory.mktemp("logs")
    with SummaryWriter(str(folder)) as writer:
        for step in range(10):
            writer.add_scalar("loss", 1 / (1 + step), step)
    inv = inventory(NAME, "other", ALIAS, tied={NAME: [ALIAS]})
    for steps in (range(9), range(5, 8)):
        events = EventFile(folder / "paramwatch")
        for step in steps:
            tensors = tensors_of(step, spoilt=step == 7)
            if step == 6:
                events.write(record(step, inv, {kind: {"other": data["other"]} for kind, data in tensors.items()}))
                events.flush()
                tensors = {kind: {NAME: data[NAME]} for kind, data in tensors.items()}
            events.write(record(step, inv, tensors))
        events.close()
    return folder


@pytest.fixture(scope="module", params=[pytest.param("true", marks=needs_rust), "false"], ids=["rust", "python"])
def server(request: pytest.FixtureRequest, log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--host", "127.0.0.1", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--load_fast={request.param}", "--reload_interval=1"], stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    try:
        yield started(process, log)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def started(process: subprocess.Popen[bytes], log: Path) -> Server:
    """Wait until the server has an address and has read both runs."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    seen: object = None
    while time.monotonic() < deadline:
        said = log.read_text(errors="replace")
        assert process.poll() is None, f"TensorBoard ended with {process.returncode}:\n{said}"
        if found := re.search(r"at (http://127\.0\.0\.1:\d+/)", said):
            server = Server(found[1], process, log)
            try:
                seen = server.get("scalars/tags")
                if "loss" in seen.get(".", {}) and [step for step, _ in server.points("paramwatch", "grad_norm/(all)")][-1:] == [7]:
                    return server
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                seen = error
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard did not show both runs in {DEADLINE_SECONDS} s; last seen: {seen!r}; it said:\n{log.read_text()}")


def test_the_users_own_curve_is_a_run_of_its_own(server: Server) -> None:
    assert set(server.get("scalars/tags")) == {".", "paramwatch"}
    assert [step for step, _ in server.points(".", "loss")] == list(range(10))


def test_every_name_has_its_curves(server: Server) -> None:
    tags = server.get("scalars/tags")["paramwatch"]
    expected = {f"{statistic}/{name}" for statistic in ("param_norm", "grad_norm", "update_ratio") for name in (NAME, ALIAS, "other")}
    assert expected <= set(tags)


def test_a_rerun_and_a_round_in_two_draw_no_zigzag(server: Server) -> None:
    for tag in ("grad_norm/(all)", f"grad_norm/{NAME}", "param_norm/other"):
        assert [step for step, _ in server.points("paramwatch", tag)] == list(range(8))


def test_values_are_those_of_the_tensors(server: Server) -> None:
    gradients = [[data.astype(np.float64) for data in tensors_of(step)["grad"].values()] for step in range(7)]
    own, total = ([value for _, value in server.points("paramwatch", f"grad_norm/{name}")][:7] for name in (NAME, "(all)"))
    assert own == pytest.approx([np.linalg.norm(named) for named, _ in gradients], rel=1e-6)
    assert total == pytest.approx([np.linalg.norm(np.concatenate(both)) for both in gradients], rel=1e-6)


def test_a_gradient_that_is_not_a_number_is_shown_as_such(server: Server) -> None:
    assert np.isnan(server.points("paramwatch", "grad_norm/other")[7][1])
    assert np.isnan(server.points("paramwatch", "grad_norm/(all)")[7][1])
    assert dict(server.points("paramwatch", "nonfinite/(all)"))[7] == 12


def test_the_text_tab_shows_ties_and_inventory(server: Server) -> None:
    assert set(server.get("text/tags")["paramwatch"]) == {"paramwatch/ties", "paramwatch/inventory", "paramwatch/curves"}
    newest = server.get("text/text", run="paramwatch", tag="paramwatch/ties")[-1]
    assert "<table>" in newest["text"]
    assert "tied&#92;n&#60;b&#62;" in newest["text"]
