"""TensorBoard, started on loopback for a test and ended after it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_SECONDS = 60


@contextmanager
def tensorboard(log_dir: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a server of these runs; what it says goes to a file."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--host", "127.0.0.1", "--port", "0", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (found := re.search(r"at (http://127\.0\.0\.1:\d+/)", said := log.read_text(errors="replace"))):
            assert process.poll() is None, f"TensorBoard ended with {process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"TensorBoard has no address after {DEADLINE_SECONDS} s; it said:\n{said}"
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
