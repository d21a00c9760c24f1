"""The form of splits in Arrow, written and read side by side: one line for each step, row and use, then two for the gradient and the rest.

A line holds the inner products of one contribution with all others of its split; what is said of uses follows from them (`agreement`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from paramwatch.agreement import UNATTRIBUTED
from paramwatch.record import Record, Split

GRADIENT = "(gradient)"
"""In the place of a use: the gradient itself."""

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("parameter", pa.string()),
        ("use", pa.string()),
        ("mode", pa.string()),
        ("backwards", pa.int64()),
        ("rounding", pa.float64()),
        ("unit", pa.float64()),
        ("products", pa.list_(pa.float64())),
    ]
)


def lines_of(record: Record) -> dict[str, list[Any]] | None:
    """The lines of a record, None where nothing was split."""
    if not record.uses:
        return None
    lines: dict[str, list[Any]] = {name: [] for name in SCHEMA.names if name != "step"}
    for row, split in record.uses.items():
        # as arrays: of lists Arrow asks each number, and of hundreds of uses there are many
        for use, products in zip((*split.uses, GRADIENT, UNATTRIBUTED), split.products, strict=True):
            told = (row, use, split.mode, split.backwards, split.rounding, split.unit, products)
            for name, value in zip(lines, told, strict=True):
                lines[name].append(value)
    return lines


def splits_of(lines: Any) -> Iterator[tuple[int, str, Split]]:
    """Step, row and split, in the order in which they were written; a split whose lines are not all there is left out."""
    step, (row, use, mode) = lines["step"].to_numpy(), (lines[name].to_pylist() for name in ("parameter", "use", "mode"))
    backwards, rounding, unit = (lines[name].to_numpy() for name in ("backwards", "rounding", "unit"))
    products, start = lines["products"], 0
    while start < len(step):
        size = len(products[start])
        end = start + size
        if end <= len(step) and use[end - 1] == UNATTRIBUTED:
            table = np.array(products.slice(start, size).combine_chunks().flatten(), dtype=np.float64).reshape(size, size)
            names = tuple(use[start : end - 2])
            yield (
                int(step[start]),
                row[start],
                Split(names, mode[start], int(backwards[start]), table, float(rounding[start]), float(unit[start])),
            )
        start = end
