"""The shipped test double: a sink that keeps what it is given."""

from __future__ import annotations

from paramwatch.record import Record


class ListSink:
    """A sink that appends every record to `records`, for tests of code that uses paramwatch."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = False

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True

    def __repr__(self) -> str:
        return f"ListSink({len(self.records)} records{', closed' if self.closed else ''})"
