"""What was flushed survives: a killed process, a full disk, a folder that goes away. And what is kept costs what it may."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records import inventory, random_record, record

from paramwatch import epoch as epoch_module
from paramwatch import store as store_module
from paramwatch.batch import Batch
from paramwatch.columns import PARTS, STATISTICS
from paramwatch.frames import frame, steps_frame
from paramwatch.loading import load
from paramwatch.record import Changes, Inventory, Record
from paramwatch.store import DiskFolder, MemoryFolder, Store, read

WRITER = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hypothesis import given, settings
from hypothesis import strategies as st
from records import inventory, random_record, record
from paramwatch.store import DiskFolder, Store

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
once = random_record(0, inventory("a", "b"))
for line in sys.stdin:
    folder, first = line.split()
    if os.fork():
        continue
    store, said = Store(DiskFolder(Path(folder)), max_bytes=10**9), os.open(folder + ".said", os.O_WRONLY | os.O_CREAT)
    for step in range(int(first), 10**9):
        store.write(replace(once, step=step))
        if step % 40 == 39:
            store.flush()
            os.pwrite(said, b"%9d %9d" % (os.getpid(), step), 0)
"""


def test_a_killed_process_leaves_all_that_it_flushed_and_the_next_one_goes_on(tmp_path: Path) -> None:
    folder, said = tmp_path / "run", tmp_path / "run.said"
    command = [sys.executable, "-c", WRITER, str(Path(__file__).parent)]
    chance, first = random.Random(0), 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        for _ in range(20):
            print(folder, first, file=writer.stdin, flush=True)
            while not said.exists() or not said.read_bytes():
                time.sleep(0.001)
            time.sleep(0.02 * chance.random())
            pid = int(said.read_text().split()[0])
            os.kill(pid, signal.SIGKILL)
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.001)
            flushed = int(said.read_text().split()[1])
            said.unlink()
            steps = load(folder).frame("param_norm").index
            assert list(steps) == list(range(len(steps)))
            assert steps[-1] >= flushed
            first = len(steps) - chance.randint(0, 3)
        writer.stdin.close()
    assert len(read(DiskFolder(folder)).epochs) > 3


def test_a_disk_that_is_full_leaves_what_was_written_whole(tmp_path: Path) -> None:
    store, net = Store(DiskFolder(tmp_path), max_bytes=10**9), inventory("a", "b")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = []

    def go_on(step: int) -> None:
        for number in range(step, step + 10_000):
            store.write(random_record(number, net))
            store.flush()
            written.append(number)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        for _ in range(2):
            with pytest.raises(OSError, match="large"):
                go_on(len(written))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.close()
    assert list(load(tmp_path).frame("grad_norm").index) == written


def test_a_folder_that_was_removed_is_an_error_that_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    store = Store(DiskFolder(folder), max_bytes=10**9)
    store.write(random_record(0, inventory("a")))
    store.flush()
    shutil.rmtree(folder)
    store.write(random_record(1, inventory("a")))
    with pytest.raises(FileNotFoundError, match="removed"):
        store.flush()


# ---- what it costs --------------------------------------------------------------------------


def noisy(n: int, rows: int) -> Batch:
    """Steps in which all real numbers are noise, and whole ones stay as they are."""
    net, random_ = inventory(*map(str, range(rows))), np.random.default_rng(0)
    shape = n, len(net.kinds), rows
    values = {
        part: np.full(shape, 4) if PARTS[part].integer else random_.normal(size=shape).astype(PARTS[part].dtype) for _, part in net.layout
    }
    for part in ("nan", "posinf", "neginf", "zero"):
        values[part][:] = 0
    steps = {"skipped": [False] * n}
    return Batch(
        net, range(n), [0.0] * n, steps, values, np.ones(rows, bool), np.full((n, rows), 0.1), np.zeros((n, rows), np.int8), [Changes()] * n
    )


def bytes_by_column(folder: MemoryFolder) -> dict[str, float]:
    """What each column of the rows takes in the files, a value."""
    (name,) = (name for name in folder.names() if name.endswith("rows"))
    table = pa.ipc.open_stream(pa.py_buffer(b"".join(piece.to_pybytes() for piece in folder.open(name)))).read_all()
    out, options = {}, pa.ipc.IpcWriteOptions(compression="lz4")
    for column in table.schema.names[1:]:
        sink, kind = pa.BufferOutputStream(), table.schema.field(column).type
        with pa.ipc.new_stream(sink, pa.schema([(column, kind)]), options=options) as stream:
            stream.write_table(pa.table({column: table[column]}))
        out[column] = sink.getvalue().size / (table.num_rows * kind.list_size)
    return out


def stored(batch: Batch) -> MemoryFolder:
    folder = MemoryFolder()
    store = Store(folder, max_bytes=10**9)
    store.write(batch.record(0))
    store.write_batch(batch.at(range(1, len(batch))))
    store.close()
    return folder


def test_noise_takes_its_own_size_and_what_does_not_change_nearly_nothing() -> None:
    folder = stored(noisy(256, 200))
    found = bytes_by_column(folder)
    constant = {column for column in found if column in ("stepped", "lr", "grad_state") or PARTS[column.partition(".")[2]].integer}
    assert max(found[column] for column in constant) < 0.1
    assert 3.9 < max(found[column] for column in found.keys() - constant) < 4.1
    total = sum(piece.size for name in folder.names() for piece in folder.open(name))
    assert total < 256 * 200 * (4.1 * len(found.keys() - constant) + 0.1 * len(constant))


def columns_looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each column of each batch that is read from now on."""
    looked_at: list[str] = []
    batches = epoch_module.ArrowFile.batches

    def counted(self: object, columns: list[str], which: list[int]) -> object:
        looked_at.extend(column for _ in which for column in columns)
        return batches(self, columns, which)  # type: ignore[arg-type]

    monkeypatch.setattr(epoch_module.ArrowFile, "batches", counted)
    return looked_at


def test_what_all_steps_have_in_common_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BATCH_STEPS", 256)
    (epoch,) = read(stored(noisy(256 * 3 + 1, 40))).epochs
    looked_at = columns_looked_at(monkeypatch)
    block = epoch.block([("grad", "nan"), ("grad", "rms")], per_row=("lr",), keys=())
    assert {column: looked_at.count(column) for column in looked_at} == {"grad.nan": 1, "lr": 1, "grad.rms": 4}
    assert block.values["nan"].shape == block.values["rms"].shape == (769, 1, 40)
    assert not block.values["nan"].any()


HAPPENS: dict[str, dict[str, object]] = {
    "ordinary": {},
    "another rate": {"lr": 0.2},
    "one row": {"stepped": ["a"]},
    "nothing there": {"without": ["b"]},
    "a NaN": {"spoilt": np.nan},
    "garbage": {"without": ["b"], "garbage": 1},
}
"""Ways in which steps differ from those before."""


@settings(max_examples=25)
@given(parts=st.lists(st.tuples(st.sampled_from(sorted(HAPPENS)), st.integers(1, 9)), min_size=1, max_size=6))
@example(parts=[("ordinary", 8), ("garbage", 8)])
def test_what_is_read_once_is_what_each_batch_holds(parts: list[tuple[str, int]]) -> None:
    net, folder = inventory("a", "b"), MemoryFolder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "BATCH_STEPS", 4)
        store = Store(folder, max_bytes=1)
        for step, how in enumerate(how for how, times in parts for _ in range(times)):
            store.write(differing(step, net, **HAPPENS[how]))  # type: ignore[arg-type]  # of several types
        store.close()
    (once,), (each,) = read(folder).epochs, read(folder).epochs
    each._same = [{} for _ in each._same]
    for span in (None, epoch_module.Span(3, 9)):
        found, wanted = once.block(span=span), each.block(span=span)
        for part, array in wanted.values.items():
            np.testing.assert_array_equal(found.values[part], array)
        for name in epoch_module.PER_ROW:
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def differing(step: int, net: Inventory, without: tuple[str, ...] = (), spoilt: float = 1.0, garbage: int = 0, **options: Any) -> Record:
    """A record in which rows may not be measured, with anything in their place."""
    tensors = {kind: {row.name: [spoilt, 1.0 + step % 3] for row in net.rows if row.name not in without} for kind in net.kinds}
    made = record(step, net, tensors, **options)
    values = {part: np.where(made.values["count"] < 0, garbage, array).astype(array.dtype) for part, array in made.values.items()}
    return replace(made, values=values | {"count": made.values["count"]})


def test_no_more_is_read_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(noisy(256 * 3 + 1, 40))
    (epoch,) = read(folder).epochs
    looked_at = columns_looked_at(monkeypatch)
    frame([epoch], "grad_norm", parameters="7", steps=slice(300, 310))
    needs = [f"{kind}.{part}" for kind, part in STATISTICS["grad_norm"].needs]
    assert sorted(looked_at) == sorted(needs)
    looked_at.clear()
    steps_frame([epoch])
    assert not {"param.mean", "grad.min"} & set(looked_at)
    looked_at.clear()
    frame([epoch], "lr")
    assert set(looked_at) == {"lr"}


def test_a_printed_run_has_not_read_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = noisy(64, 5)
    store = Store(DiskFolder(tmp_path), max_bytes=10**9)
    store.write(batch.record(0))
    store.close()
    looked_at = columns_looked_at(monkeypatch)
    assert "5 rows" in repr(load(tmp_path))
    assert set(looked_at) == {"step", "time", "skipped", "stepped", "grad_state"}


@pytest.mark.parametrize("name", ["x" * 1_000_000, "\udc80.weight", "a\n/\x00‮.w", "." * 50])
def test_any_name_survives(tmp_path: Path, name: str) -> None:
    net = inventory(name, "b", tied={name: ["b"]})
    store = Store(DiskFolder(tmp_path), max_bytes=10**9)
    store.write(random_record(0, net))
    store.close()
    (epoch,) = read(DiskFolder(tmp_path)).epochs
    assert epoch.inventory == net
    assert epoch.inventory.ties[0].names == (name, "b")
