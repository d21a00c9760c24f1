"""Text as it can be shown: what cannot be seen is written out, and what is too wide for its place is shortened.

Names come from a model and may hold anything. Tables, notebooks and pages show them through here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def visible(text: str) -> str:
    """The same text on one line, with what cannot be seen (a terminal's escape, a line feed, a change of direction) written out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def width_of(text: str) -> int:
    """Columns that a terminal gives a text: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def padded(text: str, width: int, right: bool = False) -> str:
    """A text with spaces behind it, or before it, up to a width."""
    spaces = " " * (width - width_of(text))
    return spaces + text if right else text + spaces


def shortened(text: str, width: int) -> str:
    """A text in so many columns: its beginning and its end say more than its middle."""
    if width_of(text) <= width:
        return text
    tail = _within(reversed(text), (width - 1) // 2)[::-1]
    return _within(text, width - 1 - width_of(tail)) + "…" + tail


def cut(text: str, width: int) -> str:
    """A text in so many columns, its end left out."""
    return text if width_of(text) <= width else _within(text, max(width - 1, 0)) + "…"


def sized(number: int) -> str:
    """Bytes in words: `80 bytes`, `27.7 kB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 10 * size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,} byte{'' if number == 1 else 's'}"


def _within(letters: Iterable[str], width: int) -> str:
    kept = ""
    for letter in letters:
        if width_of(kept + letter) > width:
            break
        kept += letter
    return kept
