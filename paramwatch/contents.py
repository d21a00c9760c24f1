"""What a folder holds: the reader of what `store` writes, also while it grows, after a crash, and over the sessions of a repeated run.

The single source of frames, command line, report and tab. Neither torch nor pandas is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paramwatch.arrowfile import ArrowFile
from paramwatch.block import Block
from paramwatch.epoch import Epoch
from paramwatch.folder import Folder
from paramwatch.record import Finding
from paramwatch.streams import LONG


class Contents:
    """What a folder holds, after later sessions have hidden what they replace. The numbers themselves are read when they are asked for."""

    def __init__(self, epochs: list[Epoch], long: Mapping[str, list[ArrowFile]], end: Callable[[str], float]) -> None:
        self.epochs = epochs
        """By session, then by number. Two epochs of one session share a step in which the inventory changed."""
        self.lines = _Lines(long, end)
        """Name of a long stream -> a pyarrow table of its lines, those of all sessions in order; without lines where there are none."""

    @property
    def blocks(self) -> list[Block]:
        """Everything that is in the epochs."""
        return [epoch.block() for epoch in self.epochs]

    @property
    def findings(self) -> list[Finding]:
        """What the rules said."""
        return [Finding(**line) for line in self.lines["findings"].to_pylist()]


def read(folder: Folder) -> Contents:
    """Find what is whole in a folder, also while it is being written.

    Raises:
        ParamWatchError: A file has one of our names but is not ours, was damaged, or was written by a newer paramwatch.
    """
    names = folder.names()
    epochs = [epoch for name in names if name.endswith(".rows") and (epoch := _epoch(folder, names, name.removesuffix(".rows")))]
    long = {key: [file for name in names if name.endswith(f".{key}") and len(file := ArrowFile(folder, name))] for key in LONG}
    starts = {epoch.session: epoch.first_step for epoch in epochs}
    starts |= {file.metadata["session"]: int(file.metadata["first_step"]) for files in long.values() for file in files}

    def end(session: str) -> float:
        return min((start for other, start in starts.items() if other > session), default=np.inf)

    for epoch in epochs:
        epoch.until = end(epoch.session)
    epochs.sort(key=lambda epoch: (epoch.session, epoch.number))
    return Contents([epoch for epoch in epochs if len(epoch.step)], long, end)


class _Lines(Mapping[str, Any]):
    """Reads a stream when it is asked for."""

    def __init__(self, long: Mapping[str, list[ArrowFile]], end: Callable[[str], float]) -> None:
        self._long = long
        self._end = end

    def __getitem__(self, name: str) -> Any:
        found = [self._shown(file) for file in self._long[name]]
        return pa.concat_tables([LONG[name].schema.empty_table(), *found], promote_options="default")

    def __iter__(self) -> Iterator[str]:
        return iter(self._long)

    def __len__(self) -> int:
        return len(self._long)

    def _shown(self, file: ArrowFile) -> Any:
        table = file.table()
        return table.filter(pc.less(table["step"], self._end(file.metadata["session"])))


def _epoch(folder: Folder, names: list[str], name: str) -> Epoch | None:
    # what the second file has, the first one had before
    steps = ArrowFile(folder, f"{name}.steps") if f"{name}.steps" in names else ()
    rows = ArrowFile(folder, f"{name}.rows")
    if len(steps) and rows.schema is None:
        raise rows.damaged("not even its header is whole, while the file of its steps holds some")
    return Epoch(rows, steps) if len(rows) and isinstance(steps, ArrowFile) and len(steps) else None
