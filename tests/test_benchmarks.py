"""The benchmarks run, at sizes that say nothing about time, have a place for their tables, and time nothing that is red."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def reporting(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("reporting")
    del sys.modules["reporting"]


def test_each_benchmark_runs_and_has_a_place_for_its_table() -> None:
    # one process for all of them: torch alone takes seconds to load
    done = subprocess.run([sys.executable, BENCHMARKS / "all.py", "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"^(\w+) \.\.\.$", done.stdout, re.MULTILINE)
    assert ran == re.findall(r"^<!-- (\w+) -->$", (BENCHMARKS / "README.md").read_text(), re.MULTILINE)
    aside = {"all", "reporting", "workloads", "recognition"}  # the last of them is a part of test_laws.py
    assert {*ran} == {path.stem for path in BENCHMARKS.glob("*.py")} - aside


def test_nothing_is_timed_while_a_test_of_it_is_red(reporting: ModuleType, tmp_path: Path) -> None:
    red, timed = tmp_path / "test_red.py", []
    red.write_text("def test_red(): assert False")
    with pytest.raises(SystemExit, match="red"):
        reporting.report([str(red)], reporting.arguments(None).parse_args([]), lambda: timed.append(1))
    assert not timed


def test_a_table_says_that_no_tests_were_run(reporting: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    reporting.report(["no_such_file.py"], reporting.arguments(None).parse_args(["--skip-tests"]), lambda: ["| a |"])
    assert "measured without running the tests" in capsys.readouterr().out


def test_the_sizes_in_the_docs_are_what_the_command_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    command = runpy.run_path(str(BENCHMARKS / "store.py"))
    docs = (BENCHMARKS.parent / "docs" / "format.md").read_text(encoding="utf-8")

    assert f"a float32 takes {command['unchanging'](15_000):.1f} bytes" in docs
    assert f"with a few steps takes {command['of_a_batch'](6) / 1e3:.0f} kB" in docs
