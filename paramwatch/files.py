"""The files that a session writes: made when something is first written to them, and in memory once the folder cannot be written any more.

Between `store`, which knows what is written and when, and one `arrowfile` after the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from paramwatch.arrowfile import ArrowWriter
from paramwatch.folder import Folder, WithSpare
from paramwatch.guard import logger

_TIME = "%Y%m%dT%H%M%S-%f"


def session_after(folder: Folder) -> str:
    """The name of a session that starts now: its time and its process.

    It sorts after those that are there, also where the clock is behind theirs: later sessions replace what earlier ones hold.
    """
    start = datetime.now(UTC)
    for name in folder.names():
        # not every file needs to be ours
        with suppress(ValueError, OverflowError):
            start = max(start, datetime.strptime(f"{name.rpartition('-')[0]}+0000", f"{_TIME}%z") + timedelta(microseconds=1))
    return f"{start:{_TIME}}-{os.getpid()}"


class _Piece(NamedTuple):
    kind: str
    """One of each is open at a time."""
    batch: Any
    schema: Any
    note: Mapping[str, str]
    same: Mapping[str, int]
    """As in `ArrowWriter.append`."""


class Files:
    """The open files of a session.

    Args:
        folder: Where they are.
        session: Begins their names.
        on_loss: Called when the folder is given up, before what could not be written is written to memory.

    Raises:
        OSError: From any method, where the folder cannot be written and has no spare.
    """

    first_step: int | None = None
    """Of the session."""

    def __init__(self, folder: Folder, session: str, on_loss: Callable[[], None]) -> None:
        self._folder, self._session, self._on_loss = folder, session, on_loss
        self._open: dict[str, ArrowWriter] = {}
        self._epoch = -1

    def begin(self) -> None:
        """Further files of rows and of steps from here on."""
        self._close("rows", "steps")
        self._epoch += 1

    def append_steps(
        self, rows: Any, rows_schema: Any, steps: Any, steps_schema: Any, note: Mapping[str, str], same: Mapping[str, int]
    ) -> None:
        """Write some steps, with something to know about them, and with the columns of the rows that hold one line throughout."""
        # a reader believes what both have
        self._append(_Piece("rows", rows, rows_schema, {}, same), _Piece("steps", steps, steps_schema, note, {}))

    def append_lines(self, name: str, lines: Any) -> None:
        """Write some lines of a long stream."""
        self._append(_Piece(name, lines, lines.schema, {}, {}))

    def close(self) -> None:
        """Close all."""
        self._close(*self._open)

    def _append(self, *pieces: _Piece) -> None:
        try:
            for piece in pieces:
                self._write(piece)
        except OSError as error:
            if not isinstance(self._folder, WithSpare) or not self._folder.give_up():
                raise
            self._lose(error, pieces[0].batch["step"][0].as_py())
            for piece in pieces:
                self._write(piece)

    def _write(self, piece: _Piece) -> None:
        if piece.kind not in self._open:
            of_steps = piece.kind in ("rows", "steps")
            first = piece.batch["step"][0].as_py() if self.first_step is None else self.first_step
            label = {"session": self._session, "first_step": str(first)} | ({"epoch": str(self._epoch)} if of_steps else {})
            name = f"{self._session}.{self._epoch}.{piece.kind}" if of_steps else f"{self._session}.{piece.kind}"
            self._open[piece.kind] = ArrowWriter(self._folder, name, piece.schema, label)
        self._open[piece.kind].append(piece.batch, piece.note, piece.same)

    def _lose(self, error: OSError, step: int) -> None:
        logger.warning(
            "paramwatch: the run cannot be written any more (%s: %s). From step %d on it is kept in the memory of this process, thinned so "
            "that it stays small: frames of this Watch have it, other processes do not. Training goes on.",
            *(type(error).__name__, error, step),
        )
        for file in self._open.values():
            # what was written before is whole already
            with suppress(OSError):
                file.close()
        self._open.clear()
        # the steps of one epoch are in one place
        self._epoch += 1
        self._on_loss()

    def _close(self, *kinds: str) -> None:
        with ExitStack() as files:
            for kind in kinds:
                if kind in self._open:
                    files.callback(self._open.pop(kind).close)
