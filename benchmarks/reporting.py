"""How a benchmark reports: under a line of what its numbers depend on, and not while a test of what it times is red.

Each benchmark names its tests in `TESTS` and makes the lines of its tables in `table`; `all.py` writes these to the README.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every benchmark can be asked."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true", help="for development; the table says so")
    parser.add_argument("--tiny", action="store_true", help="only to see that this file runs: its numbers mean nothing, nor are tests run")
    return parser


def report(tests: Sequence[str], options: argparse.Namespace, table: Callable[[], Iterable[str] | None]) -> None:
    """Print a table, unless a test is red.

    Args:
        tests: Files of the tests of what is timed.
        options: As `arguments` has them.
        table: Gives its lines; None where there is no GPU and it needs one.
    """
    tested = not (options.tiny or options.skip_tests)
    if tested:
        refuse_if_red(tests)
    lines = table()
    if lines is None:
        print("not run: no GPU")
        return
    for line in (*heading(tested), *lines):
        print(line, flush=True)


def refuse_if_red(tests: Iterable[str]) -> None:
    """Run these tests, if there are any, and end here while one is red."""
    files = [str(ROOT / "tests" / name) for name in tests]
    if not files:
        return
    print("running the tests of the timed code", file=sys.stderr, flush=True)
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *files], cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        sys.exit("Not run: the tests of the timed code are red.")


def heading(tested: bool) -> list[str]:
    """What the numbers depend on; no name of a machine."""
    flags = ""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
    vectors = next((name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags), "no wide vectors known")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    note = "" if tested else "**measured without running the tests**; "
    return [f"{note}{day}, {platform.machine()} with {vectors}, {os.cpu_count()} cores, {versions}.", ""]
