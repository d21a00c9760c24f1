"""One Arrow IPC stream of the store, appended and read side by side: batches with a checksum for each column, read column by column.

A file may be growing, may end anywhere since its writer was killed, and may have been damaged since: the first two cost the batch that is
torn and nothing else, the last is an error that names the file. A reader looks at those columns of those batches that it asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import google_crc32c
import pyarrow as pa
from pyarrow import ipc

from paramwatch.folder import Folder
from paramwatch.guard import ParamWatchError

VERSION = 1
"""Of the format; a reader knows those up to its own."""

# one thread, also to read: the others are wanted for training
OPTIONS = ipc.IpcWriteOptions(compression="lz4", use_threads=False)

_SUM = "crc32c"
_ZEROS = 16
"""With so many at its end, a batch that cannot be read is torn rather than damaged: one that is whole ends with fewer, nearly always."""

_END = b"\xff\xff\xff\xff\0\0\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"
_BAD = (pa.ArrowException, OSError, EOFError, ValueError, LookupError, MemoryError)
"""What pyarrow raises at bytes that make no sense."""


class ArrowWriter:
    """Makes a file and appends to it.

    Raises:
        OSError: From any method, where the file cannot be written. What was appended before can still be read.
    """

    def __init__(self, folder: Folder, name: str, schema: Any, label: Mapping[str, str]) -> None:
        described = {**_text(schema.metadata), **label, "format": "paramwatch", "version": str(VERSION)}
        schema = schema.with_metadata(described)
        self._where, self._file = folder.where(name), folder.create(name)
        self._stream = ipc.new_stream(self._file.sink, schema.with_metadata({**described, _SUM: _sum_of_schema(schema)}), options=OPTIONS)
        self._known: dict[str, tuple[tuple[int, int] | None, str]] = {}
        self._torn = False

    def append(self, batch: Any, note: Mapping[str, str] | None = None, same: Mapping[str, int] | None = None) -> None:
        """Write a batch, which any process can read from then on.

        Args:
            batch: Of the schema.
            note: Something to know about it.
            same: Columns with a number for the line that they hold throughout: of one number and length there is one checksum.
        """
        self._torn = True
        sums = self._sums(batch, same or {})
        try:
            self._stream.write_batch(batch, custom_metadata={**(note or {}), _SUM: f"{sums} {_sum_of_note(note or {})}"})
        except OSError as error:
            # what is torn stays: a reader may have mapped it, and would be killed if it went. pyarrow does not say which file
            raise OSError(error.errno, error.strerror, self._where) from error
        self._file.commit()
        self._torn = False

    def close(self) -> None:
        """Say that nothing more comes, unless the last batch is torn."""
        try:
            if not self._torn:
                self._stream.close()
                self._file.commit()
        finally:
            self._file.close()

    def _sums(self, batch: Any, same: Mapping[str, int]) -> str:
        found = []
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            line = (same[name], batch.num_rows) if name in same else None
            known = self._known.get(name)
            if line is None or known is None or known[0] != line:
                self._known[name] = known = line, f"{_sum(column):08x}"
            found.append(known[1])
        return " ".join(found)


class Batch(NamedTuple):
    """Some lines of a file."""

    columns: Any
    """A pyarrow record batch of those columns that were asked for."""
    note: dict[str, str]


class ArrowFile:
    """What is whole in a file now.

    Raises:
        ParamWatchError: From any method: the file is not ours, was damaged, or is of a newer paramwatch. The message names it.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._where = folder.where(name)
        self._messages: list[Any] = []
        self._closed = False
        try:
            pieces = folder.open(name)
        except OSError as error:
            raise ParamWatchError(
                f"{self._where} cannot be read: {error.strerror or error}. Move it elsewhere to read the rest of the run."
            ) from error
        for i, piece in enumerate(pieces):
            self._walk(piece, i == 0)
        if len(self._messages) > 1 and not self._closed and not any(memoryview(self._messages[-1])[-_ZEROS:]):
            self._leave_out_zeros()

    @cached_property
    def schema(self) -> Any:
        """The schema; None where not even that is whole yet."""
        if not self._messages:
            return None
        try:
            schema = ipc.read_schema(self._messages[0])
            metadata = _text(schema.metadata)
            written, found = metadata.pop(_SUM, None), _sum_of_schema(schema)
        except _BAD as error:
            raise self.damaged(f"its header cannot be read: {error}") from error
        if metadata.get("format") != "paramwatch":
            raise ParamWatchError(f"{self._where} is not a file of paramwatch. Move it elsewhere.")
        if not (version := metadata.get("version", "")).isdecimal() or int(version) > VERSION:
            raise ParamWatchError(f"{self._where} is of a newer paramwatch (format {version}, known is {VERSION}). Upgrade to read it.")
        if written != found:
            raise self.damaged("its header has changed since it was written")
        return schema

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What the schema says besides its columns."""
        return _text(self.schema.metadata)

    def __len__(self) -> int:
        """How many batches are whole."""
        return max(len(self._messages) - 1, 0) if self.schema is not None else 0

    def batches(self, columns: Sequence[str] | None = None, which: Sequence[int] | None = None) -> Iterator[Batch]:
        """Read some batches, by default all, in order.

        Args:
            columns: Those to read; None for all. The others are neither read nor checked.
            which: Positions of batches.
        """
        chosen = range(len(self)) if which is None else which
        if not len(chosen):
            return
        names = self.schema.names
        fields = list(range(len(names))) if columns is None else sorted(names.index(name) for name in columns)
        pieces = _Pieces([self._messages[0], *(self._messages[1 + i] for i in chosen)])
        options = ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        read = 0
        try:
            stream = ipc.open_stream(pa.PythonFile(pieces, mode="r"), options=options)
            for _ in chosen:
                batch, note = stream.read_next_batch_with_custom_metadata()
                batch.validate()
                note = _text(note)
                *sums, beside = note.pop(_SUM).split()
                if [sums[field] for field in fields] != _sums(batch).split() or beside != _sum_of_note(note):
                    raise ValueError("it has changed since it was written")
                read += 1
                yield Batch(batch, note)
        except (*_BAD, StopIteration) as error:
            raise self.damaged(f"batch {chosen[read] + 1} of {len(self)} cannot be read: {error}") from error

    def table(self) -> Any:
        """Everything, as a pyarrow table without metadata."""
        return pa.Table.from_batches([batch.columns for batch in self.batches()], self.schema).replace_schema_metadata()

    def _walk(self, piece: Any, first: bool) -> None:
        """Find the whole messages."""
        if first and not self._opens(piece):
            raise ParamWatchError(f"{self._where} is not a file of paramwatch: no Arrow IPC stream. Move it elsewhere.")
        if first and piece.size and not any(memoryview(piece)[:4]):
            raise self.damaged("it begins with zeros, as after a power cut")
        source, end = pa.BufferReader(piece), 0
        while end < piece.size:
            try:
                ipc.read_message(source)
            except _BAD:
                break
            if source.tell() % 8:
                break
            self._messages.append(piece.slice(end, source.tell() - end))
            end = source.tell()
        tail = piece.slice(end)
        self._closed = tail.to_pybytes()[: len(_END)] == _END
        if not self._opens(tail) or _whole_message_in(tail) or _is_closed(memoryview(tail)):
            raise self.damaged(f"nothing can be read at byte {end:,}, while there is more after it")

    def _leave_out_zeros(self) -> None:
        """After a power cut, the last batch may have its size and not its content."""
        try:
            list(self.batches(which=[len(self) - 1]))
        except ParamWatchError:
            self._messages.pop()

    def _opens(self, piece: Any) -> bool:
        written = piece.slice(0, min(4, piece.size)).to_pybytes().rstrip(b"\0")
        # after a power cut, a file may have a size and nothing in it
        empty = written != _CONTINUATION and piece.size > 4
        return written == _CONTINUATION[: len(written)] and not (empty and piece.slice(4).to_pybytes().strip(b"\0"))

    def damaged(self, how: str) -> ParamWatchError:
        """The error to raise, with what is wrong in words."""
        return ParamWatchError(
            f"{self._where} is damaged: {how}. Restore it from a copy, or move it elsewhere to read the rest of the run."
        )


class _Pieces:
    """Buffers one after the other, as pyarrow reads from a file of Python's; nothing is copied."""

    closed = False

    def __init__(self, buffers: Sequence[Any]) -> None:
        self._rest = list(reversed(buffers))
        self._at = 0

    def read(self, size: int) -> Any:
        while self._rest and self._at == self._rest[-1].size:
            self._rest.pop()
            self._at = 0
        if not self._rest:
            return b""
        found = self._rest[-1].slice(self._at, min(size, self._rest[-1].size - self._at))
        self._at += found.size
        return found

    def close(self) -> None:
        """Nothing is held open."""


def _whole_message_in(tail: Any) -> bool:
    """Whether a message is whole somewhere in what could not be read, beyond its start: then it is not the end that is torn."""
    content, at = memoryview(tail), 4
    text = bytes(content)
    while (at := text.find(_CONTINUATION, at)) >= 0:
        if any(text[at + 4 : at + 8]):
            try:
                message = ipc.read_message(pa.py_buffer(content[at:]))
            except _BAD:
                message = None
            if message is not None and message.type == "record batch":
                return True
        at += 1
    return False


def _is_closed(tail: memoryview) -> bool:
    """Whether the mark of a closed file is at the end of what could not be read: then nothing was cut off."""
    before, mark = bytes(tail[-len(_END) - 1 : -len(_END)]), bytes(tail[-len(_END) :])
    # a column that is all true may end in the same bytes, where a batch may be torn: then they come after more of 0xff
    return mark == _END and before not in (b"", b"\xff")


def _sums(batch: Any) -> str:
    """A checksum for each column, over all its buffers."""
    return " ".join(f"{_sum(column):08x}" for column in batch.columns)


def _sum(column: Any) -> int:
    found = 0
    for buffer in column.buffers():
        if buffer is not None and buffer.size:
            found = google_crc32c.extend(found, buffer)
    return found


def _sum_of_note(note: Mapping[str, str]) -> str:
    return f"{google_crc32c.value(repr(sorted(note.items())).encode()):08x}"


def _sum_of_schema(schema: Any) -> str:
    fields = [(field.name, _type(field.type), sorted(_text(field.metadata).items())) for field in schema]
    described = sorted((key, value) for key, value in _text(schema.metadata).items() if key != _SUM)
    return f"{google_crc32c.value(repr((fields, described)).encode()):08x}"


def _type(kind: Any) -> str:
    """A type in words that do not depend on the version of pyarrow."""
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return f"{getattr(kind, 'list_size', '')} of {_type(kind.value_type)}"
    return str(kind)


def _text(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (metadata or {}).items()}
