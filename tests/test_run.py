"""Runs are found where they were written, and read the same from disk as from memory."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from records import inventory, random_record

from paramwatch.guard import ParamWatchError
from paramwatch.loading import Runs, load
from paramwatch.record import Finding, Inventory
from paramwatch.run import Run
from paramwatch.store import Contents, DiskFolder, Folder, MemoryFolder, Store, read

NET = inventory("0.weight", "0.bias", "2.weight", "4.weight", tied={"2.weight": ["4.weight"]}, model="Sequential")


def write(folder: Folder, steps: int = 3, *, first: int = 0) -> Store:
    store = Store(folder, max_bytes=10**9)
    for step in range(first, first + steps):
        store.write(random_record(step, NET))
    store.find([Finding(first, "rule", "0.bias", "look")])
    store.flush()
    return store


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    write(DiskFolder(tmp_path / "first" / "paramwatch")).close()
    return tmp_path / "first"


class InMemory(Run):
    """As `Watch` does it."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(None)
        self.folder = folder

    def _read(self) -> Contents:
        return read(self.folder)

    def _inventory(self) -> Inventory:
        return NET


# ---- one run --------------------------------------------------------------------------------


def test_a_run_that_stands_still_is_what_it_was_and_looks_through_its_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(DiskFolder(tmp_path), max_bytes=10**9)
    store.write(random_record(0, inventory("a")))
    store.flush()
    still = load(tmp_path).still()
    store.write(random_record(1, inventory("a")))
    store.close()
    monkeypatch.setattr(DiskFolder, "names", lambda self: pytest.fail("looked again"))

    assert list(still.frame("lr").index) == list(still.steps.index) == [0]


def test_a_run_is_found_by_its_log_dir_its_own_folder_and_a_folder_above(log_dir: Path) -> None:
    for path in (log_dir, str(log_dir), log_dir / "paramwatch", log_dir.parent):
        assert load(path).path == log_dir / "paramwatch"


def test_a_second_model_is_found_by_its_name_and_the_first_by_the_folder_of_both(log_dir: Path) -> None:
    write(DiskFolder(log_dir / "paramwatch" / "critic"), 5).close()
    assert len(load(log_dir / "paramwatch" / "critic").steps) == 5
    assert len(load(log_dir / "paramwatch").steps) == 3


def test_several_runs_are_listed_where_one_was_asked_for(log_dir: Path) -> None:
    write(DiskFolder(log_dir / "paramwatch" / "critic")).close()
    with pytest.raises(ParamWatchError, match=r"holds 2 runs(.|\n)*paramwatch\n(.|\n)*paramwatch/critic"):
        load(log_dir)


def test_a_path_without_a_run_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ParamWatchError, match=r"there is no run in .*\.rows\.arrow"):
        load(tmp_path)
    with pytest.raises(ParamWatchError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    write(DiskFolder(tmp_path / "run[1]" / "paramwatch")).close()
    assert load(str(tmp_path / "run[1]")).path == tmp_path / "run[1]" / "paramwatch"


def test_memory_and_disk_give_equal_frames(log_dir: Path) -> None:
    folder = MemoryFolder()
    write(folder)
    live, loaded = InMemory(folder), load(log_dir)
    for name in ("parameters", "steps", "findings"):
        pd.testing.assert_frame_equal(getattr(live, name), getattr(loaded, name))
    pd.testing.assert_frame_equal(live.frame(), loaded.frame())
    pd.testing.assert_frame_equal(live.frame("grad_norm", by="layer"), loaded.frame("grad_norm", by="layer"))
    assert live.ties == loaded.ties == NET.ties


def test_a_run_that_goes_on_is_read_anew(tmp_path: Path) -> None:
    store = write(DiskFolder(tmp_path))
    run = load(tmp_path)
    assert len(run.frame("lr")) == 3
    store.write(random_record(3, NET))
    store.flush()
    assert len(run.frame("lr")) == 4
    store.close()


def test_it_prints_what_it_holds(log_dir: Path) -> None:
    assert repr(load(log_dir)) == f"<Run {log_dir / 'paramwatch'}: Sequential, 3 rows (4 names), 3 steps (0 to 2)>"
    folder = MemoryFolder()
    assert repr(InMemory(folder)) == "<InMemory in memory: Sequential, 3 rows (4 names), no steps yet>"
    write(folder, 1, first=7)
    assert repr(InMemory(folder)) == "<InMemory in memory: Sequential, 3 rows (4 names), 1 step>"
    store = Store(hostile := MemoryFolder(), max_bytes=10**9)
    store.write(random_record(0, inventory("a", model="Net\x1b[2J\n" + "x" * 1_000_000)))
    store.close()
    assert re.fullmatch(r"<InMemory in memory: Net\\x1b\[2J\\nx+…x+, 1 row, 1 step>", shown := repr(InMemory(hostile)))
    assert len(shown) < 150


def test_before_the_first_step_everything_can_be_asked() -> None:
    run = InMemory(MemoryFolder())
    assert run.frame().empty
    assert run.steps.empty
    assert list(run.parameters.index) == ["0.weight", "0.bias", "2.weight"]
    assert run.findings.empty
    assert run.path is None


def test_a_run_torn_before_its_first_batch_says_so(tmp_path: Path) -> None:
    (tmp_path / "s.0.rows.arrow").touch()
    run = load(tmp_path)
    with pytest.raises(ParamWatchError, match="holds no whole step"):
        run.frame()
    assert repr(run) == f"<Run {tmp_path}: no steps yet>"


# ---- several runs ---------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, steps in (("a", 2), ("b", 3)):
        write(DiskFolder(tmp_path / "runs" / name / "paramwatch"), steps).close()
    (tmp_path / "runs" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("two")
def test_a_glob_and_a_list_give_the_frames_of_all_runs_by_path() -> None:
    for runs in (load("runs/*"), load(["runs/a", "runs/b"]), load(["runs/*"]), load([Path("runs/a"), Path("runs/b")])):
        assert isinstance(runs, Runs)
        assert runs.labels == ("runs/a", "runs/b")
        tidy = runs.frame()
        assert tidy.index.names == ["run", "step", "parameter"]
        assert len(tidy) == 5 * 3
        pd.testing.assert_frame_equal(tidy.loc["runs/b"], load("runs/b").frame())
        assert runs.frame("grad_norm").index.names == ["run", "step"]
        assert runs.steps.index.names == ["run", "step"]
        assert runs.parameters.index.names == ["run", "parameter"]
        assert runs.findings.loc["runs/a"].to_dict("records") == load("runs/a").findings.to_dict("records")


def test_a_run_named_by_a_relative_path_is_read_after_the_working_folder_has_changed(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, runs = load("runs/a"), load("runs/*")
    monkeypatch.chdir(two / "runs")
    assert [len(run.steps), len(runs.frame("lr"))] == [2, 5]
    assert run.path == Path("runs/a/paramwatch")
    assert repr(run).startswith("<Run runs/a/paramwatch: ")


@pytest.mark.usefixtures("two")
def test_a_folder_with_several_runs_gives_them_under_their_own_paths() -> None:
    runs = load(["runs"])
    assert runs.labels == ("runs/a/paramwatch", "runs/b/paramwatch")
    assert [len(run.steps) for run in runs] == [2, 3]
    assert len(runs["runs/b/paramwatch"].steps) == len(runs) + 1
    assert repr(runs).startswith("<Runs: 2 runs>\n  runs/a/paramwatch: <Run runs/a/paramwatch: Sequential")


@pytest.mark.usefixtures("two")
def test_runs_with_different_rows_and_keys_are_joined_without_a_warning() -> None:
    store = Store(DiskFolder(Path("runs/c/paramwatch")), max_bytes=10**9)
    store.write(random_record(0, inventory("other"), epoch=1))
    store.close()
    runs = load("runs/*")
    assert runs.frame("grad_norm").loc["runs/c", "0.weight"].isna().all()
    assert str(runs.steps["epoch"].dtype) == "Int64"
    assert len(runs.frame()) == 5 * 3 + 1


@pytest.mark.usefixtures("two")
def test_paths_without_runs_are_errors() -> None:
    with pytest.raises(ParamWatchError, match="no run matches none"):
        load("none/*")
    with pytest.raises(ParamWatchError, match="runs/c does not exist"):
        load(["runs/a", "runs/c"])
    with pytest.raises(ParamWatchError, match="no runs were named"):
        load([])


@pytest.mark.parametrize("given", [5, None, b"runs/a", [5], [None], "", [""], "runs\0"], ids=repr)
@pytest.mark.usefixtures("two")
def test_what_is_no_path_is_refused(given: Any) -> None:
    with pytest.raises(ParamWatchError, match=r"load takes (a|the) path"):
        load(given)


# ---- what reading loads ---------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("run store frames block folder schedule totals columns record", {"torch"}),
        ("store block folder", {"torch", "pandas"}),
        ("record columns totals schedule", {"torch", "pandas", "pyarrow"}),
    ],
)
def test_reading_needs_no_torch_and_storing_no_pandas(modules: str, without: set[str]) -> None:
    found = loaded_by(f"import {', '.join('paramwatch.' + module for module in modules.split())}")
    assert "numpy" in found
    assert not found & without


def test_the_guard_on_imports_can_fail() -> None:
    assert "pandas" in loaded_by("import paramwatch.run")


def test_a_notebook_shows_the_latest_step_the_ties_and_the_findings_escaped() -> None:
    folder = MemoryFolder()
    store = Store(folder, max_bytes=10**9)
    store.write(random_record(0, inventory("a<b>", "c")))
    store.find([Finding(0, "first_nonfinite", "a<b>", "said of a<b>")])
    store.flush()

    shown = InMemory(folder)._repr_html_()
    assert "&lt;InMemory in memory" in shown
    assert "<th>a&lt;b&gt;</th>" in shown
    assert "said of a&lt;b&gt;" in shown
    assert "<b>" not in shown
