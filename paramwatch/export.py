"""A run as one Parquet or CSV file, for other programs (`paramwatch export`).

The lines are those of `Run.frame()`, sorted by parameter and then by step, so that the series of one parameter lies together and
compresses best. They are made and written in pieces: memory stays bounded however long the run is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from paramwatch.frames import some_columns
from paramwatch.guard import ParamWatchError
from paramwatch.output import opened
from paramwatch.run import Run
from paramwatch.series import recorded_steps
from paramwatch.table import nearest

Format: TypeAlias = Literal["parquet", "csv"]
FORMATS: tuple[Format, ...] = ("parquet", "csv")

LINES = 1 << 19
"""Lines of a piece: 120 MB with all statistics."""

FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "\n")
"""A spreadsheet takes a cell that begins with one of these for a formula, in full width, too, or (tab, line ends) what comes after it."""

NOT_SEEN = " \ufeff"
"""What some of them leave out at the beginning of a cell: spaces, and the mark of the byte order."""


def export(
    run: Run,
    target: Path | None,
    to: Format,
    *,
    parameters: str | Sequence[str] = "*",
    steps: slice | None = None,
    statistics: Sequence[str] = (),
    force: bool = False,
    raw_names: bool = False,
    progress: Callable[[float], None] = lambda share: None,
    lines: int = LINES,
) -> int:
    """Write a run.

    Parquet is written with zstd; numbers with their bytes split into streams (2.4 to 2.8 bytes for a noisy float32). Reading it with
    pandas and sorting by step gives `Run.frame()`, to the bit and dtype by dtype, but that names are a categorical. In CSV a parameter
    whose name a spreadsheet would take for a formula gets an apostrophe before it.

    Args:
        run: Read anew.
        target: The file, None for standard output.
        to: The format.
        parameters: As for `Run.frame`, as `steps` is.
        steps: By number, end excluded.
        statistics: Columns, all by default.
        force: Replace a file that is there.
        raw_names: Leave names in CSV as they are.
        progress: Told which share is done, 0 to 1.
        lines: Of a piece, about.

    Returns:
        How many lines were written.

    Raises:
        ParamWatchError: As `Run.frame`; the file exists.
        OSError: It cannot be written; nothing is left of it.
    """
    pieces = _Pieces(run, parameters, steps, statistics, lines)
    schema, written = pa.Schema.from_pandas(pieces.empty, preserve_index=False), 0
    with opened(target, force) as file, _writer(file, schema, to) as write:
        for share, piece in pieces:
            table = pa.Table.from_pandas(piece, schema, preserve_index=False)
            write(table if to == "parquet" else _as_text(table, raw_names))
            written += len(piece)
            progress(share)
    return written


def guarded(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name.lstrip(NOT_SEEN).startswith(FORMULA) else name


class _Pieces:
    """A run as frames of about as many lines, sorted by parameter and then by step: gives each with the share that is done after it."""

    def __init__(self, run: Run, parameters: str | Sequence[str], steps: slice | None, statistics: Sequence[str], lines: int) -> None:
        self._run, self._lines = run, lines
        # no step is read for these: what there is, and in which order
        tidy = run.frame(parameters=parameters, steps=slice(0, 0))
        columns = list(tidy.columns)
        for name in statistics:
            if name not in columns:
                raise ParamWatchError(f"there is no statistic {name!r} here{nearest(name, columns)}")
        self._columns = [name for name in columns if name in statistics] if statistics else columns
        self._names = [str(name) for name in run.frame("lr", parameters=parameters, steps=slice(0, 0)).columns]
        self._steps = recorded_steps(run) if steps is None else run.frame("lr", parameters=parameters, steps=steps).index.to_numpy(np.int64)
        self._type = pd.CategoricalDtype(self._names)
        self._stride = 1 if steps is None or steps.step is None else steps.step
        self.empty = self._sorted(tidy)

    def __iter__(self) -> Iterator[tuple[float, pd.DataFrame]]:
        n = max(1, len(self._steps))
        rows = max(1, self._lines // n)
        for first in range(0, len(self._names), rows):
            names = self._names[first : first + rows]
            for start in range(0, n, self._lines) if len(self._steps) else ():
                among = self._steps[start : start + self._lines]
                between = slice(int(among[0]), int(among[-1]) + 1, self._stride)
                piece = some_columns(self._run._epochs(), self._columns, parameters=names, steps=between)
                done = (first + len(names) * (start + len(among)) / n) / len(self._names)
                if "*" in names:
                    # which alone means all
                    piece = piece[piece.index.get_level_values("parameter").isin(names)]
                yield done, self._sorted(piece)

    def _sorted(self, tidy: pd.DataFrame) -> pd.DataFrame:
        step, name = (tidy.index.get_level_values(level) for level in ("step", "parameter"))
        parameter = pd.Categorical(name, dtype=self._type)
        order = np.argsort(parameter.codes, kind="stable")
        columns = {"step": step.to_numpy(np.int64)[order], "parameter": parameter.take(order)}
        return pd.DataFrame(columns | {column: tidy[column].array.take(order) for column in self._columns}, copy=False)


def _as_text(table: Any, raw_names: bool) -> Any:
    """With names in place of their numbers."""
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            column = table[field.name].combine_chunks()
            if field.name == "parameter" and not raw_names:
                guarded_names = pa.array([guarded(name) for name in column.dictionary.to_pylist()], pa.string())
                column = pa.DictionaryArray.from_arrays(column.indices, guarded_names)
            table = table.set_column(i, field.name, column.cast(pa.string()))
    return table


@contextmanager
def _writer(file: IO[bytes], schema: Any, to: Format) -> Iterator[Callable[[Any], None]]:
    if to == "csv":
        plain = pa.schema([pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in schema])
        with pyarrow.csv.CSVWriter(file, plain) as csv:
            yield csv.write_table
        return
    numbers = [field.name for field in schema if pa.types.is_floating(field.type)]
    words = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    options = {"compression": "zstd", "use_dictionary": words, "use_byte_stream_split": numbers}
    with pq.ParquetWriter(file, schema, store_schema=True, **options) as parquet:
        yield parquet.write_table
