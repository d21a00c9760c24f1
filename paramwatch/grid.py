"""Cells in columns: one table as text that fits a terminal, and as HTML. Cells are data and may hold anything.

What the command line prints and the report shows side by side.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paramwatch.lettering import cut, padded, shortened, visible, width_of

_LEAST_NAME = 24
_GAP = "  "
_LONGEST = 120
"""Characters of one cell in HTML; the rest is not needed to tell two names apart."""


@dataclass(frozen=True)
class Grid:
    """A table. The first column holds names; the others come by importance, since the last ones are left out where there is no room."""

    header: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    left: frozenset[str] = frozenset()
    """Columns of words, to the left; numbers are to the right."""
    more: str = ""
    """What is said below a table that does not show all."""

    def text(self, width: int, paint: Callable[[str, str], str] = lambda text, style: text) -> list[str]:
        """As lines of at most so many columns.

        Args:
            width: Of the terminal.
            paint: Given a text and `bold`, `dim` or `red`, colours it.
        """
        cells = [tuple(map(visible, line)) for line in self.lines]
        columns = list(zip(self.header, *cells, strict=True))
        widths = [max(map(width_of, column)) for column in columns]
        # words of the last column may be cut, numbers may not
        needed = [min(w, 24) if name in self.left else w for name, w in zip(self.header, widths, strict=True)]
        shown = len(columns)
        while shown > 2 and min(widths[0], _LEAST_NAME) + sum(needed[1:shown]) + len(_GAP) * (shown - 1) > width:
            shown -= 1
        room = width - len(_GAP) * (shown - 1)
        widths[0] = max(min(widths[0], room - sum(needed[1:shown])), min(widths[0], _LEAST_NAME))
        spare = room - widths[0] - sum(needed[1:shown])
        for i in range(1, shown):
            more = min(widths[i] - needed[i], max(spare, 0))
            widths[i], spare = needed[i] + more, spare - more

        def line(values: Sequence[str]) -> str:
            fitted = [shortened(values[0], widths[0]), *(cut(value, widths[i]) for i, value in enumerate(values[1:shown], 1))]
            places = zip(fitted, widths, self.header, strict=False)
            return _GAP.join(padded(value, w, i > 0 and name not in self.left) for i, (value, w, name) in enumerate(places)).rstrip()

        out = [paint(line(self.header), "bold")]
        out += [paint(said, "red") if "×" in said else said for said in map(line, cells)]
        return out + ([paint(self.more, "dim")] if self.more else [])

    def html(self, caption: str) -> str:
        """As a table element, everything escaped."""
        head = "".join(f'<th scope="col"{self._side(name)}>{escaped(name)}</th>' for name in self.header)
        body = "".join(
            f'<tr><th scope="row">{_cell(line[0])}</th>'
            + "".join(f"<td{self._side(name)}>{_cell(cell)}</td>" for name, cell in zip(self.header[1:], line[1:], strict=True))
            + "</tr>"
            for line in self.lines
        )
        more = f'<p class="note">{escaped(self.more)}</p>' if self.more else ""
        return (
            f'<div class="wide"><table><caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{more}"
        )

    def _side(self, name: str) -> str:
        if name == "trend":
            return ' class="trend"'
        return "" if name in self.left or name == self.header[0] else ' class="number"'


def number(value: float) -> str:
    """A number in four digits; nothing where there is none."""
    return "" if math.isnan(value) else f"{value:.4g}"


def escaped(text: str, longest: int = 10_000) -> str:
    """A text that is nothing but text in HTML, in an element or in quotes; a very long one is shortened in its middle."""
    if len(text) > longest:
        text = text[: longest // 2] + "…" + text[-longest // 2 :]
    return html.escape(visible(text))


def _cell(value: str) -> str:
    if len(value) <= _LONGEST:
        return escaped(value)
    return f'<span title="{escaped(value, 1000)}">{escaped(value, _LONGEST)}</span>'
