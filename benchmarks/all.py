"""All tables of benchmarks/README.md: runs the tests of the timed code, then the benchmarks, and writes the tables between the markers.

python benchmarks/all.py [--only NAME] [--skip-tests] [--print]

While one of those tests is red nothing is timed. Where there is no GPU its last table stays as it is. It takes some minutes; on a machine
where nothing else runs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
README = HERE / "README.md"
TESTS = (
    "test_native.py",
    "test_measure.py",
    "test_plan.py",
    "test_batching.py",
    "test_truth_plain.py",
    "test_truth_closures.py",
    "test_events.py",
    "test_uses.py",
    "test_uses_cost.py",
)
"""Of the code that is timed."""

GPU_TESTS = ("test_ring.py", "test_deviceplan.py", "test_gpu.py", "test_gpu_device.py", "test_gpu_watched.py")
"""The same, where there is a GPU."""

TABLES = ("monitored_step", "contestants", "kernel", "growth", "event_file", "uses", "gpu_bandwidth", "gpu_step")


def machine() -> str:
    """What the numbers depend on; no name of a machine."""
    flags = ""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
    vectors = next((name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags), "no wide vectors known")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{day}, {platform.machine()} with {vectors}, {os.cpu_count()} cores, {versions}"


def gpu_table() -> list[str] | None:
    """None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        sys.argv = ["gpu_bandwidth.py"]
        importlib.import_module("gpu_bandwidth").main()
    return ["```text", *said.getvalue().rstrip().splitlines(), "```"]


def table_of(name: str) -> list[str] | None:
    made: Callable[[], list[str] | None] = gpu_table if name == "gpu_bandwidth" else importlib.import_module(name).table
    return made()


def put(name: str, lines: list[str]) -> None:
    """Between the markers of a table."""
    text = README.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"{README.name} has no place marked {start.strip()}")
    README.write_text(pattern.sub(lambda _: start + "\n".join(lines) + "\n" + end, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, action="append", help="this table; may be given again")
    parser.add_argument("--skip-tests", action="store_true", help="for development; the tables say so")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    if not options.skip_tests:
        print("running the tests of the timed code", flush=True)
        paths = [str(HERE.parent / "tests" / name) for name in (*TESTS, *(GPU_TESTS if torch.cuda.is_available() else ()))]
        if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *paths], cwd=HERE.parent, check=False).returncode:
            sys.exit("Not run: the tests of the timed code are red.")
    note = "**measured without running the tests**; " if options.skip_tests else ""
    for name in options.only or TABLES:
        started = time.monotonic()
        print(f"{name} ...", flush=True)
        lines = table_of(name)
        if lines is None:
            print("not run: no GPU")
            continue
        lines = [f"{note}{machine()}.", "", *lines]
        print("\n".join(lines), f"\n({time.monotonic() - started:.0f} s)", flush=True)
        if not options.print:
            put(name, lines)


if __name__ == "__main__":
    main()
