"""What several test files need, and flags: `--update-golden` writes printed output anew, `--screenshots` keeps pictures to look at."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from leftover import leftovers

# no test is timed: a machine with other work would fail it
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# several workers share the cores, and so do the processes that tests start; read when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch describes all that it compiles, at length, as soon as anybody listens, and pytest listens to each logger that does not propagate
logging.getLogger("torch.__trace").addHandler = lambda handler: None  # type: ignore[method-assign]  # of this one alone

# a job in the background ignores Ctrl-C, and would pass that on to the tests and the processes that they start
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files under tests/golden anew instead of comparing with them")
    parser.addoption("--screenshots", type=Path, help="keep what the browser shows in this folder, for a human to look at")


@pytest.fixture(scope="module", autouse=True)
def apart() -> Iterator[None]:
    """A file leaves nothing to the others in its process; its collections do not go through all of torch each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.collect()
    assert not leftovers()


@pytest.fixture
def nothing_open() -> Iterator[None]:
    """What was attached in a test ends with it, and what is said of models that are gone belongs to it."""
    from paramwatch import attached, worker

    yield
    for watch in tuple(attached.opened):
        watch.close()
    worker.wait_for_all()


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    """Where to keep what the browser shows; None for nowhere."""
    folder: Path | None = request.config.getoption("--screenshots")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the golden file of a name."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.write_text(text + "\n", encoding="utf-8")
        assert text + "\n" == file.read_text(encoding="utf-8")

    return compare


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """`summary` measures as where the compiled kernel is not."""
    from paramwatch import sampling
    from paramwatch.measure import native

    for module in (sampling, native):
        monkeypatch.setattr(module, "available", lambda: False)
    monkeypatch.setattr(sampling, "takes", lambda x: False)
