"""Lines over the steps, as SVG: totals of the model, and the layers that do worst.

A line of more steps than columns is drawn through the least and the largest value of each column, so that no spike is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paramwatch.absence import counted
from paramwatch.columns import Array
from paramwatch.grid import escaped, number
from paramwatch.report.axes import Scale, rounds, written
from paramwatch.span import Span

COLUMNS = 480

_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 8, 10, 34


@dataclass(frozen=True)
class Line:
    """Numbers over some steps."""

    name: str
    steps: Array
    """int64 [n]"""
    values: Array
    """float64 [n], NaN where there is no finite number."""
    spoilt: Array
    """bool [n]: measured, and not finite."""


def chart(title: str, lines: Sequence[Line], *, width: int = 960, height: int = 240) -> str:
    """A figure; nothing where no line has a number.

    Args:
        title: What the numbers are.
        lines: At most 8, told apart by colour and by name.
        width: Of the drawing, in its own units.
        height: The same.
    """
    lines = [line for line in lines if len(line.steps) and (line.spoilt.any() or not np.isnan(line.values).all())]
    if not lines:
        return ""
    steps = np.unique(np.concatenate([line.steps for line in lines]))
    span, scale = Span(steps, COLUMNS), Scale.of(np.concatenate([line.values for line in lines]))
    plot = _Plot(span, scale, width - _LEFT - _RIGHT, height - _TOP - _BOTTOM)
    said = f"{title} over the steps {span.first} to {int(steps[-1])}: " + "; ".join(map(_said, lines))
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(said, 4000)}">', *plot.frame()]
    for i, line in enumerate(lines):
        parts.append(plot.line(line, i))
    parts.append("</svg>")
    names = "".join(f'<span class="key c{i}"><span class="swatch"></span>{escaped(line.name, 60)}</span>' for i, line in enumerate(lines))
    legend = f'<div class="legend">{names}</div>' if len(lines) > 1 else ""
    return f'<figure><figcaption>{escaped(title)}</figcaption><div class="wide">{"".join(parts)}</div>{legend}</figure>'


@dataclass(frozen=True)
class _Plot:
    span: Span
    scale: Scale
    width: float
    height: float

    def x(self, columns: Array) -> Array:
        """The middle of these columns."""
        return _LEFT + (columns + 0.5) / self.span.columns * self.width

    def y(self, values: Array) -> Array:
        return _TOP + (1 - self.scale.share(values)) * self.height

    def frame(self) -> list[str]:
        out = []
        for tick in self.scale.ticks():
            y = float(self.y(np.array(tick)))
            out.append(f'<path class="rule" d="M{_LEFT} {y:.1f}h{self.width}"/><text class="name" x="{_LEFT - 8}" y="{y + 3.5:.1f}">')
            out.append(f"{written(tick)}</text>")
        bottom, reach = _TOP + self.height, self.span.end - self.span.first
        for step in dict.fromkeys(round(value) for value in rounds(self.span.first, self.span.end, 8)):
            if self.span.first <= step <= self.span.end:
                x = _LEFT + (step - self.span.first) / reach * self.width
                out.append(f'<path class="tick" d="M{x:.1f} {bottom}v5"/><text class="step" x="{x:.1f}" y="{bottom + 17}">{step:,}</text>')
        out.append(f'<path class="tick" d="M{_LEFT} {bottom}h{self.width}"/>')
        return [*out, f'<text class="axis" x="{_LEFT + self.width}" y="{bottom + 31}">step</text>']

    def line(self, line: Line, colour: int) -> str:
        low, high, spoilt = (np.full(self.span.columns, np.nan), np.full(self.span.columns, np.nan), np.zeros(self.span.columns, bool))
        self.span.largest(line.steps, line.values, low, np.fmin)
        self.span.largest(line.steps, line.values, high)
        self.span.largest(line.steps, line.spoilt, spoilt, np.logical_or)
        seen = self.span.seen(line.steps)
        # the line breaks where it has a step without a number
        pieces = np.split(seen, np.flatnonzero(np.isnan(high[seen])))
        paths, dots = [], []
        for piece in pieces:
            known = piece[~np.isnan(high[piece])]
            if len(known) == 1:
                dots.append(f'<circle cx="{self.x(known)[0]:.1f}" cy="{self.y(high[known])[0]:.1f}" r="2"/>')
            if len(known) > 1:
                paths.append("M" + "L".join(self._points(known, low, high)))
        crosses = "".join(f"M{x - 2.5:.1f} {_TOP}l5 5m0 -5l-5 5" for x in self.x(np.flatnonzero(spoilt)))
        marks = f'<path class="spoilt" d="{crosses}"/>' if crosses else ""
        drawn = f'<path class="line" d="{"".join(paths)}"/>' if paths else ""
        return f'<g class="c{colour}"><title>{escaped(line.name, 200)}</title>{drawn}{"".join(dots)}{marks}</g>'

    def _points(self, columns: Array, low: Array, high: Array) -> list[str]:
        out = []
        for x, bottom, top in zip(self.x(columns), self.y(low[columns]), self.y(high[columns]), strict=True):
            out.append(f"{x:.1f} {bottom:.1f}")
            if bottom - top >= 0.1:
                out.append(f"{x:.1f} {top:.1f}")
        return out


def _said(line: Line) -> str:
    known = line.values[~np.isnan(line.values)]
    said = []
    if len(known):
        said.append(f"from {number(known[0])} to {number(known[-1])}, least {number(known.min())}, largest {number(known.max())}")
    if line.spoilt.any():
        said.append(f"not finite in {counted(int(line.spoilt.sum()), 'step')}")
    return f"{line.name[:100]} {', '.join(said)}"
