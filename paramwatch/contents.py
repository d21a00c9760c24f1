"""What a folder holds: the reader of what `store` writes, also while it grows, after a crash, and over the sessions of a repeated run.

The single source of frames, command line, report and tab. Neither torch nor pandas is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    def __init__(self, epochs: list[Epoch], lines: Mapping[str, Any]) -> None:
        self.epochs = epochs
        """By session, then by number. Two epochs of one session share a step in which the inventory changed."""
        self.lines = lines
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

    def shown(file: ArrowFile) -> Any:
        table = file.table()
        return table.filter(pc.less(table["step"], end(file.metadata["session"])))

    for epoch in epochs:
        epoch.until = end(epoch.session)
    lines = {
        key: pa.concat_tables([LONG[key].schema.empty_table(), *map(shown, files)], promote_options="default")
        for key, files in long.items()
    }
    epochs.sort(key=lambda epoch: (epoch.session, epoch.number))
    return Contents([epoch for epoch in epochs if len(epoch.step)], lines)


def _epoch(folder: Folder, names: list[str], name: str) -> Epoch | None:
    if f"{name}.steps" not in names:
        return None
    # what the second file has, the first one had before
    steps = ArrowFile(folder, f"{name}.steps")
    rows = ArrowFile(folder, f"{name}.rows")
    return Epoch(rows, steps) if len(rows) and len(steps) else None
