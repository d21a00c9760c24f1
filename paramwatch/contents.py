"""What a folder holds: the reader of what `store` writes, also while it grows, after a crash, and over the sessions of a repeated run.

The single source of frames, command line, report and tab. Neither torch nor pandas is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from paramwatch.block import Block, one_per_step
from paramwatch.folder import Folder
from paramwatch.format import block_of
from paramwatch.guard import ParamWatchError
from paramwatch.record import Finding
from paramwatch.streams import LONG

VERSION = 1

_OPENING = b"\xff\xff\xff\xff"
_NOTHING = pa.table({})


@dataclass(frozen=True)
class Contents:
    """What a folder holds, after later sessions have hidden what they replace."""

    blocks: list[Block]
    """By session, then by epoch. Two blocks of one session share a step in which the inventory changed."""
    lines: Mapping[str, Any]
    """Name of a long stream -> a pyarrow table of its lines, those of all sessions in order; without lines where there are none."""

    @property
    def findings(self) -> list[Finding]:
        """What the rules said."""
        return [Finding(**line) for line in self.lines["findings"].to_pylist()]


def read(folder: Folder) -> Contents:
    """Read what is whole in a folder, also while it is being written.

    Raises:
        ParamWatchError: A file has one of our names but is not ours, or was written by a newer paramwatch.
    """
    names = folder.names()
    epochs = [name.removesuffix(".rows") for name in names if name.endswith(".rows")]
    blocks = [block for epoch in epochs if (block := _read_block(folder, epoch))]
    long = {key: [table for name in names if name.endswith(f".{key}") and (table := _read_table(folder, name)).num_rows] for key in LONG}
    starts = {block.session: block.first_step for block in blocks} | dict(_session(table) for tables in long.values() for table in tables)

    def end(session: str) -> float:
        return min((start for other, start in starts.items() if other > session), default=np.inf)

    def shown(table: Any) -> Any:
        return table.filter(pc.less(table["step"], end(_session(table)[0]))).replace_schema_metadata()

    blocks = [block.at(block.step < end(block.session)) for block in sorted(blocks, key=lambda block: (block.session, block.epoch))]
    lines = {
        key: pa.concat_tables([LONG[key].schema.empty_table(), *map(shown, tables)], promote_options="default")
        for key, tables in long.items()
    }
    return Contents([one_per_step(block) for block in blocks if len(block.step)], lines)


def _session(table: Any) -> tuple[str, int]:
    return table.schema.metadata[b"session"].decode(), int(table.schema.metadata[b"first_step"])


def _read_block(folder: Folder, epoch: str) -> Block | None:
    """The steps that are whole in both files: they are apart by the batch that is being written."""
    rows, steps = _read_table(folder, f"{epoch}.rows"), _read_table(folder, f"{epoch}.steps")
    n = min(rows.num_rows, steps.num_rows)
    return block_of(rows.slice(0, n), steps.slice(0, n)) if n else None


def _read_table(folder: Folder, name: str) -> Any:
    """The whole batches of a stream: a torn or growing tail is left out, and a file without a whole header is empty."""
    if name not in folder.names():
        return _NOTHING
    batches = []
    with folder.open(name) as file:
        opening = file.read(4)
        if opening != _OPENING[: len(opening)] and opening.strip(b"\0"):
            raise ParamWatchError(f"{folder.where(name)} is not a file of paramwatch: no Arrow IPC stream. Move it elsewhere.")
        file.seek(0)
        try:
            stream = ipc.open_stream(file)
        except (pa.ArrowInvalid, OSError):
            return _NOTHING
        metadata = stream.schema.metadata or {}
        if metadata.get(b"format") != b"paramwatch":
            raise ParamWatchError(f"{folder.where(name)} is not a file of paramwatch. Move it elsewhere.")
        if (version := int(metadata[b"version"])) > VERSION:
            raise ParamWatchError(
                f"{folder.where(name)} is of a newer paramwatch (format {version}, {VERSION} is known here). Upgrade to read it."
            )
        with suppress(pa.ArrowInvalid, OSError):
            # one by one: those before the torn one count
            for batch in stream:
                batches.append(batch)  # noqa: PERF402
    return pa.Table.from_batches(batches, stream.schema)
