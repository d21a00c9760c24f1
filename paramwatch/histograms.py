"""The form of histograms in Arrow, written and read side by side: one line for each step, row and kind, without the bins that are empty.

Between records, the files of the store, and the frame that users read. Neither torch nor pandas is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paramwatch.columns import KINDS, Array
from paramwatch.globs import text
from paramwatch.record import Record

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("parameter", pa.string()),
        ("kind", pa.string()),
        ("bin", pa.list_(pa.uint8())),
        ("count", pa.list_(pa.int64())),
    ]
)
"""`bin` holds positions in `bins`, rising, `count` how many elements are in each. A tensor without finite elements has empty lists."""


def lines_of(record: Record) -> dict[str, Any] | None:
    """The columns of a record's lines without `step`, in Arrow; None where it has no histogram."""
    names = pa.array([text(row.name) for row in record.inventory.rows], pa.string())
    rows, kinds, sizes, bins, counts = [], [], [], [], []
    for kind, of_rows in record.histograms.items():
        made = np.flatnonzero(of_rows[:, 0] >= 0)
        if len(made):
            some = of_rows if len(made) == len(of_rows) else of_rows[made]
            line, place = some.nonzero()
            rows.append(names.take(pa.array(made)))
            kinds.append(pa.repeat(pa.scalar(kind), len(made)))
            sizes.append(np.bincount(line, minlength=len(made)))
            bins.append(place.astype(np.uint8))
            counts.append(some[line, place])
    if not rows:
        return None
    offsets = pa.array(np.cumsum(np.concatenate([[0], *sizes])), pa.int32())
    lists = (pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(numbers))) for numbers in (bins, counts))
    return dict(zip(SCHEMA.names[1:], (pa.concat_arrays(rows), pa.concat_arrays(kinds), *lists), strict=True))


@dataclass(frozen=True)
class Filled:
    """The bins that are not empty, of all lines one after the other: arrays [n]."""

    step: Array
    parameter: Array
    """Positions in the rows that were given to `filled`."""
    kind: Array
    """Positions in `KINDS`."""
    bin: Array
    count: Array


def filled(lines: Any, rows: Sequence[str], which: Array) -> Filled:
    """Read lines, by step, row and kind; of a histogram that was made twice in one step the later one.

    Args:
        lines: A table of them.
        rows: The names of the rows that are wanted, as the table has them, in order; one may be asked for several times.
        which: bool [lines], those that are wanted.
    """
    wanted = lines.filter(pa.array(which)).combine_chunks()
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row, []).append(i)
    last = {}
    for i, (step, row, kind) in enumerate(zip(*(wanted[name].to_pylist() for name in ("step", "parameter", "kind")), strict=True)):
        for place in places.get(row, ()):
            last[step, place, KINDS.index(kind)] = i
    keys = np.array(sorted(last), dtype=np.int64).reshape(-1, 3)
    chosen = wanted.take(pa.array([last[step, place, kind] for step, place, kind in keys.tolist()], pa.int64()))
    step, place, kind = np.repeat(keys, pc.list_value_length(chosen["bin"]).to_numpy(), axis=0).T
    bins, counts = (pc.list_flatten(chosen[name]).to_numpy() for name in ("bin", "count"))
    return Filled(step, place, kind, bins, counts)
