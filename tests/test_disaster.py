"""A real training that cannot be written any more goes on, and is kept in memory; of one that is killed, what was written is there."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loops import mlp, sgd
from torch import nn

import paramwatch
from paramwatch import store as store_module
from paramwatch.store import Store

NOBODY = 65534


def train(net: nn.Module, steps: int) -> None:
    optimizer = sgd(net)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()


def held(store: Store) -> tuple[int, int, int]:
    """Steps that wait to be written, lines that do, and bytes of the latest steps."""
    return store._kept_steps.steps + store._dropped_steps.steps, store._lines.bytes, store._latest._bytes


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.message for entry in caplog.records if entry.levelname == "WARNING"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that soon drops steps, and so holds the latest ones."""
    monkeypatch.setattr(store_module, "BATCH_STEPS", 16)


def in_memory(watch: paramwatch.Watch) -> int:
    """Bytes of files that are not on the disk."""
    spare = watch._store._files._folder._spare  # type: ignore[attr-defined]  # on disk it is one with a spare
    return sum(piece.size for file in spare._files.values() for piece in file.pieces) if spare else 0


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_said_once_and_the_run_goes_on_in_memory_within_its_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, limits = mlp(), resource.getrlimit(resource.RLIMIT_FSIZE)
    watch = paramwatch.attach(net, tmp_path, max_bytes=300_000)
    train(net, 200)
    watch.flush()
    held_before, nothing = held(watch._store), in_memory(watch)
    largest = max(file.stat().st_size for file in tmp_path.rglob("*.rows.arrow"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 10, limits[1]))
        train(net, 3000)
        watch.flush()
        during = watch.frame("grad_norm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(net, 10)
    watch.close()
    frame, loaded = watch.frame("grad_norm"), paramwatch.load(tmp_path).frame("grad_norm")

    assert held_before[2] > 0, "the schedule drops some, or this tests nothing"
    assert nothing == 0 < in_memory(watch) <= 300_000
    assert largest + 10 in [file.stat().st_size for file in tmp_path.rglob("*.rows.arrow")], "what is torn was taken from whoever mapped it"
    assert list(frame.index[-4:]) == list(range(3206, 3210))
    assert set(loaded.index) < set(during.index) < set(frame.index)
    assert frame.loc[loaded.index].equals(loaded)
    assert held(watch._store) == (0, 0, 0)
    assert watch.recorder.steps_seen == 3210
    lost, digest = messages(caplog)
    if "switched off" in lost:
        lost, digest = digest, lost
    assert "the run cannot be written any more (OSError: " in lost
    assert ".arrow'). From step" in lost
    assert "TensorBoard's event file is switched off" in digest
    assert "events.out.tfevents." in digest
    assert not any(entry.exc_info for entry in caplog.records), "a full disk needs no trace"


@pytest.mark.parametrize("then", ["gone", "a file"])
def test_of_a_folder_that_is_removed_what_comes_after_is_kept_in_memory(
    then: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, folder = mlp(), tmp_path / "run"
    watch = paramwatch.attach(net, folder)
    train(net, 20)
    watch.flush()
    shutil.rmtree(folder)
    if then == "a file":
        folder.touch()
    train(net, 1000)
    watch.flush()
    frame, shown = watch.frame("grad_norm"), repr(watch)
    train(net, 1000)
    watch.close()

    assert list(frame.index) == list(range(20, 1020))
    assert list(watch.steps.index) == list(range(20, 2020))
    assert "4 rows" in shown
    said = [each for each in messages(caplog) if "the run cannot be written any more" in each]
    assert len(said) == 1
    assert "removed while it was being written" in said[0]
    assert "From step 20 on" in said[0]


@pytest.mark.usefixtures("small")
def test_memory_that_takes_the_place_of_a_disk_is_bounded_however_much_the_disk_was_to_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MEMORY_BYTES", 200_000)
    net, folder = mlp(), tmp_path / "run"
    watch = paramwatch.attach(net, folder)
    train(net, 20)
    watch.flush()
    base = watch._store.schedule.base  # type: ignore[union-attr]  # after a step there is one
    shutil.rmtree(folder)
    train(net, 3000)
    watch.flush()
    steps = watch.steps

    assert watch._store.schedule.base < base  # type: ignore[union-attr]  # as above
    assert in_memory(watch) + held(watch._store)[2] <= 200_000
    assert not steps["full_rate"].iloc[-1]
    assert 100 < len(steps) < 1000


@pytest.fixture
def someone() -> Iterator[Path]:
    """A folder of a user whom permission bits hold back: root they do not."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for each in (folder, *folder.rglob("*")):
            each.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_becomes_read_only_is_said_once_and_the_run_goes_on_in_memory(
    someone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = mlp()
    watch = paramwatch.attach(net, someone)
    train(net, 20)
    watch.flush()
    (someone / "paramwatch").chmod(0o555)
    # the files that are open can still be written, and new rows take new ones
    net.append(nn.Linear(1, 1, dtype=torch.float64))
    train(net, 1000)
    watch.flush()
    frame = watch.frame("grad_norm")
    watch.close()

    assert list(frame.index) == list(range(1020))
    assert watch.recorder.steps_seen == 1020
    (said,) = (each for each in messages(caplog) if "the run cannot be written any more" in each)
    assert "PermissionError" in said
    assert len(paramwatch.load(someone).steps) == 20


TRAINING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
import paramwatch
from loops import loss_of, mlp, sgd

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    folder, first = line.split()
    if os.fork():
        continue
    net = mlp()
    optimizer, said = sgd(net), os.open(folder + ".said", os.O_WRONLY | os.O_CREAT)
    watch = paramwatch.attach(net, folder, first_step=int(first))
    for step in range(int(first), 10**9):
        optimizer.zero_grad()
        loss_of(net, step % 5).backward()
        optimizer.step()
        if step % 40 == 39:
            watch.flush()
            os.pwrite(said, b"%9d %9d" % (os.getpid(), step), 0)
"""


def test_a_killed_training_leaves_all_that_it_flushed_and_the_resumed_one_goes_on(tmp_path: Path) -> None:
    folder, said, first = tmp_path / "run", tmp_path / "run.said", 0
    command = [sys.executable, "-c", TRAINING, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as training:
        assert training.stdin is not None
        for _ in range(2):
            print(folder, first, file=training.stdin, flush=True)
            while not said.exists() or not said.read_bytes():
                time.sleep(0.001)
            time.sleep(0.1)
            pid, flushed = map(int, said.read_text().split())
            os.kill(pid, signal.SIGKILL)
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.001)
            flushed = int(said.read_text().split()[1])
            said.unlink()
            steps = paramwatch.load(folder).frame("grad_norm").index
            assert list(steps) == list(range(len(steps)))
            assert steps[-1] >= flushed > first
            first = len(steps) - 3
        training.stdin.close()
    assert len({file.name.partition(".")[0] for file in (folder / "paramwatch").glob("*.rows.arrow")}) == 2


def test_what_is_asked_for_besides_the_rows_has_its_share_of_the_bytes() -> None:
    """The schedule keeps fewer steps where histograms and splits are to be kept as well."""
    kept = [paramwatch.attach(mlp(), histograms=histograms, uses=uses)._store._budget for histograms, uses in ((0, 0), (9, 0), (9, 9))]
    assert kept[0] > kept[1] > kept[2] > 0
