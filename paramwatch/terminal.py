"""What a terminal is told: text in its width and its colours, a table that is drawn again in place, and how far something is.

A stream that is no terminal, or that cannot show a sign, gets plain text. Nothing from a run reaches it unless it was made visible.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TextIO

_STYLES = {"bold": "1", "dim": "2", "red": "31"}
_PLAIN = str.maketrans({**dict(zip("▁▂▃▄▅▆▇█", "_.-=+*%#", strict=True)), "×": "x", "…": "~", "─": "-", "±": "+-"})
_WIDE = 200
_PATIENCE_SECONDS = 2.0
_REDRAW_SECONDS = 0.1


class Terminal:
    """A stream to print to.

    Args:
        stream: Standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        """It is a terminal in which lines can be drawn again."""
        self._coloured = self.live and not os.environ.get("NO_COLOR")

    @property
    def width(self) -> int:
        """Columns, at least 40; where there is no terminal, and nobody says how many, more than any table of ours needs."""
        return max(shutil.get_terminal_size((_WIDE, 24)).columns, 40)

    @property
    def height(self) -> int:
        """Lines."""
        return max(shutil.get_terminal_size().lines, 8)

    def paint(self, text: str, style: str) -> str:
        """A text in `bold`, `dim` or `red`, where there are colours."""
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self._coloured else text

    def print(self, lines: Iterable[str]) -> None:
        """Print lines."""
        for line in lines:
            self._write(f"{line}\n")
        self._stream.flush()

    def redraw(self, lines: Iterable[str]) -> None:
        """Print lines from the top of the screen, and nothing below them."""
        # each line is wiped behind its end, so that nothing flickers
        self._write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self._stream.flush()

    def begin(self) -> None:
        """Take the screen: what is on it comes back at the end."""
        self._write("\x1b[?1049h\x1b[?25l")

    def end(self) -> None:
        """Give the screen back."""
        self._write("\x1b[?25h\x1b[?1049l")
        self._stream.flush()

    def _write(self, text: str) -> None:
        self._stream.write(writable(text, self._stream))


def writable(text: str, stream: TextIO | None) -> str:
    """A text in signs that a stream can take: one of another encoding than Unicode's raises at all others."""
    # a stream of text alone has no encoding, and no limits
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text if encoding.lower().startswith("utf") else text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)


class Progress:
    """A bar on standard error, from two seconds on, where that is a terminal. It goes on while nobody says how far it is.

    Args:
        what: What is going on.
        clock: Seconds.
        terminal: Where to.
    """

    def __init__(self, what: str, *, clock: Callable[[], float] = time.monotonic, terminal: Terminal | None = None) -> None:
        self._what = what
        self._clock = clock
        self._terminal = Terminal(sys.stderr) if terminal is None else terminal
        self._begun = self._drawn = clock()
        self._shown = False
        self._share = 0.0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._ticking = threading.Thread(target=self._tick, daemon=True) if self._terminal.live else None

    def __enter__(self) -> Progress:
        if self._ticking:
            self._ticking.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._ticking:
            self._ticking.join()
        if self._shown:
            self._terminal._write("\r\x1b[K")
            self._terminal._stream.flush()

    def at(self, share: float) -> None:
        """So much is done: 0 to 1."""
        self._share = share
        self._draw()

    def _tick(self) -> None:
        while not self._over.wait(0.5):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            now, share = self._clock(), self._share
            if not self._terminal.live or now - self._begun < _PATIENCE_SECONDS or now - self._drawn < _REDRAW_SECONDS:
                return
            self._shown, self._drawn = True, now
            full, spent = int(share * 24), now - self._begun
            wait = f" {share:.0%}, {duration(spent * (1 - share) / share)} left" if share > 0 else f", {duration(spent)}"
            said = f"{self._what} {'█' * full}{'─' * (24 - full)}{wait}"
            self._terminal._write(f"\r{said[: self._terminal.width - 1]}\x1b[K")
            self._terminal._stream.flush()


def duration(seconds: float) -> str:
    """`0.8 s`, `12 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
