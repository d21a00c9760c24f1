"""Where the files of a store are: a folder on disk, or the same in memory for a run without one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa


class Folder(Protocol):
    """Where the files of a store are. Names are given without an ending."""

    def names(self) -> list[str]:
        """What is there, sorted."""

    def create(self, name: str) -> IO[bytes]:
        """Make a new file, and the folder around it if need be."""

    def open(self, name: str) -> Any:
        """What a file holds now, as a pyarrow file."""

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

    def create(self, name: str) -> IO[bytes]:
        self.path.mkdir(parents=True, exist_ok=True)
        return open(self.where(name), "xb")

    def open(self, name: str) -> Any:
        return pa.OSFile(self.where(name))

    def where(self, name: str) -> str:
        return str(self.path / f"{name}{self._ending}")


class MemoryFolder:
    """The same in memory, for a run without a folder."""

    def __init__(self) -> None:
        self._files: dict[str, _Buffer] = {}

    def names(self) -> list[str]:
        return sorted(self._files)

    def create(self, name: str) -> IO[bytes]:
        return self._files.setdefault(name, _Buffer())

    def open(self, name: str) -> Any:
        return pa.BufferReader(self._files[name].getvalue())

    def where(self, name: str) -> str:
        return f"{name} in memory"


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

    def create(self, name: str) -> IO[bytes]:
        return self._folder.create(name)

    def open(self, name: str) -> Any:
        return self._folder.open(name)

    def where(self, name: str) -> str:
        return self._folder.where(name)


class _Buffer(io.BytesIO):
    def close(self) -> None:
        """Keep what was written."""
