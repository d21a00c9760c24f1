"""The file under the event writer: TensorBoard's record framing, and the name by which its loaders find and order files.

A record is the payload's length (8 bytes, little endian), a checksum of the length, the payload and a checksum of the payload. What is
inside a payload is the business of `events`.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import struct
import time
from functools import lru_cache
from pathlib import Path

import google_crc32c

FLUSH_SECONDS = 1.0
"""How long a record may wait in memory while further ones arrive."""

FRAMING = 16
"""Bytes around each payload."""

_made_here = itertools.count()
_STAMP = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class RecordFile:
    """An event file made for this writer alone, named so that it comes after all that are in the folder.

    Written out at most once a second and on `flush`, so a crash costs the last second and a torn last record, which loaders ignore.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The pure Python loader reads files in the order of their names and never goes back: a clock that is behind must not hide us.
        stamps = [int(found[1]) for found in map(_STAMP.match, os.listdir(folder)) if found]
        stamp = max(int(time.time()), *(stamp + 1 for stamp in stamps), 0)
        self.path = folder / f"events.out.tfevents.{stamp:010}.{socket.gethostname()}.{os.getpid()}.{next(_made_here)}"
        self._file = self.path.open("xb")
        self._waiting: list[bytes] = []
        self._written_out = time.monotonic()

    def append(self, payload: bytes) -> None:
        self._waiting.append(b"".join((_length(len(payload)), payload, _checksum(payload))))
        if time.monotonic() - self._written_out >= FLUSH_SECONDS:
            self.flush()

    def take_back(self) -> bool:
        """Drop the last record if it is still in memory; False where it has been written out."""
        if not self._waiting:
            return False
        self._waiting.pop()
        return True

    def flush(self) -> None:
        try:
            self._file.write(b"".join(self._waiting))
            self._waiting.clear()
            self._file.flush()
        except OSError as error:
            # a write does not say which file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        # from the end, so that where writing takes long there is not always time for more of it
        self._written_out = time.monotonic()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


# most events have the same few
@lru_cache(maxsize=1024)
def _length(size: int) -> bytes:
    """The length of a payload, and the checksum of that."""
    length = struct.pack("<Q", size)
    return length + _checksum(length)


def _checksum(data: bytes) -> bytes:
    # A checksum of data that holds a checksum is weak, so the format rotates and shifts it.
    crc: int = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")
