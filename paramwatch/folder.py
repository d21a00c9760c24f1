"""Where the files of a store are: a folder on disk, or the same in memory for a run without one."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

# a path object makes one slash of two; one letter before the colon is a drive
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|.*://", re.DOTALL)


def is_remote(path: str) -> bool:
    """Whether a path is an address (`s3://bucket/x`), also one that has lost a slash on its way through a path object."""
    return _REMOTE.match(path) is not None


class File(Protocol):
    """A file that grows, whole piece by whole piece."""

    sink: Any
    """Where pyarrow writes to."""

    def commit(self) -> None:
        """What was written until now is whole."""

    def close(self) -> None:
        """Nothing more will be written."""


class Folder(Protocol):
    """Where the files of a store are. Names are given without an ending."""

    def names(self) -> list[str]:
        """What is there, sorted."""

    def create(self, name: str) -> File:
        """Make a new file, and the folder around it if need be."""

    def open(self, name: str) -> Sequence[Any]:
        """What a file holds now, as pyarrow buffers one after the other, none of which ends inside an Arrow message but the last.

        Nothing is read before it is looked at: a buffer may be a view of a file.
        """

    def where(self, name: str) -> str:
        """How to call a file in a message."""


class DiskFolder:
    """A folder on disk. Each rank of a distributed run sees its own files only."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self._ending = f".r{rank}.arrow" if rank else ".arrow"

    def names(self) -> list[str]:
        files = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(file.name.removesuffix(self._ending) for file in files if file.name.endswith(self._ending))

    def create(self, name: str) -> File:
        self.path.mkdir(parents=True, exist_ok=True)
        return _DiskFile(self.where(name))

    def open(self, name: str) -> Sequence[Any]:
        where = self.where(name)
        # an empty file cannot be mapped
        return [pa.memory_map(where).read_buffer()] if os.path.getsize(where) else []

    def where(self, name: str) -> str:
        return str(self.path / f"{name}{self._ending}")


class MemoryFolder:
    """The same in memory, for a run without a folder."""

    def __init__(self) -> None:
        self._files: dict[str, _MemoryFile] = {}

    def names(self) -> list[str]:
        return sorted(self._files)

    def create(self, name: str) -> File:
        return self._files.setdefault(name, _MemoryFile())

    def open(self, name: str) -> Sequence[Any]:
        return tuple(self._files[name].pieces)

    def where(self, name: str) -> str:
        return f"{name} in memory"


class WithSpare:
    """A folder and, once it cannot be written any more, memory beside it: what is made from then on is there."""

    def __init__(self, folder: Folder) -> None:
        self._first = folder
        self._spare: MemoryFolder | None = None

    def give_up(self) -> bool:
        """Make no more files in the folder; whether there is memory to take them, which was not in use yet."""
        fresh, self._spare = self._spare is None, self._spare or MemoryFolder()
        return fresh

    def names(self) -> list[str]:
        return sorted({*self._first.names(), *(self._spare.names() if self._spare else ())})

    def create(self, name: str) -> File:
        return (self._spare or self._first).create(name)

    def open(self, name: str) -> Sequence[Any]:
        return self._of(name).open(name)

    def where(self, name: str) -> str:
        return self._of(name).where(name)

    def _of(self, name: str) -> Folder:
        return self._spare if self._spare and name in self._spare.names() else self._first


class Until:
    """A folder as the files of one session and of those before it make it: what a later one writes is not there.

    Args:
        folder: Only read.
        session: Starts the names of its files, which sort by when their sessions started.
    """

    def __init__(self, folder: Folder, session: str) -> None:
        self._folder = folder
        self._session = session

    def names(self) -> list[str]:
        return [name for name in self._folder.names() if name.partition(".")[0] <= self._session]

    def create(self, name: str) -> File:
        return self._folder.create(name)

    def open(self, name: str) -> Sequence[Any]:
        return self._folder.open(name)

    def where(self, name: str) -> str:
        return self._folder.where(name)


class _DiskFile:
    """Written without a buffer of its own: what is written can be read, and survives the process."""

    def __init__(self, where: str) -> None:
        os.close(os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        self.sink = pa.OSFile(where, "wb")
        self._where = where

    def commit(self) -> None:
        # the system lets one write to what nobody can read any more
        if not os.path.exists(self._where):
            raise FileNotFoundError(errno.ENOENT, "removed while it was being written", self._where)

    def close(self) -> None:
        self.sink.close()


class _MemoryFile:
    """Pieces that pyarrow writes as to a file of Python's."""

    closed = False

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.sink = pa.PythonFile(self, mode="w")
        self._open: list[Any] = []

    def write(self, data: Any) -> int:
        self._open.append(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is held back."""

    def commit(self) -> None:
        self.pieces.append(pa.py_buffer(b"".join(self._open)))
        self._open = []

    def close(self) -> None:
        """Keep what was written."""
