"""A real browser, driven over the WebDriver protocol with nothing but the standard library: opens pages, runs scripts, takes pictures."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "no Chromium here: Debian's packages chromium and chromium-driver are not installed"

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --hide-scrollbars --force-device-scale-factor=1"
)


class Browser:
    """A window of a headless Chromium."""

    def __init__(self, session: str) -> None:
        """Use `browser`."""
        self._session = session

    def open(self, address: str) -> None:
        _call("POST", f"{self._session}/url", {"url": address})

    def resize(self, width: int, height: int) -> None:
        _call("POST", f"{self._session}/window/rect", {"width": width, "height": height})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return _call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Run a script until it returns something true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"after {seconds} s not true: {script}"
            time.sleep(0.2)
        return found

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(_call("GET", f"{self._session}/screenshot")))


@contextmanager
def browser(profile: Path, width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """A browser with a fresh profile in an empty folder."""
    assert CHROMIUM is not None
    assert DRIVER is not None
    log = profile / "driver.txt"
    with log.open("wb") as output:
        process = subprocess.Popen([DRIVER, "--port=0"], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not (found := re.search(r"started successfully on port (\d+)", log.read_text(errors="replace"))):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        server = f"http://127.0.0.1:{found[1]}/session"
        flags = [*_FLAGS.split(), f"--window-size={width},{height}", f"--user-data-dir={profile / 'data'}"]
        options = {"browserName": "chrome", "goog:chromeOptions": {"binary": CHROMIUM, "args": flags}}
        session = f"{server}/{_call('POST', server, {'capabilities': {'alwaysMatch': options}})['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _call("DELETE", session)
    finally:
        process.terminate()
        process.wait(10)


def _call(method: str, address: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=90) as answer:
        return json.loads(answer.read())["value"]
