"""A statistic of the whole model at a glance: a line for each layer, a column for some steps, a colour for the largest value there.

Read in pieces and reduced at once, so that what is held is as small as what is shown.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from paramwatch.absence import counted
from paramwatch.columns import Array
from paramwatch.grid import Grid, escaped, number
from paramwatch.heatmap import MISSING, MOST_DECADES, NOT_FINITE, NOT_MEASURED, PALETTE, ZERO, Scale, levels, stretches
from paramwatch.lettering import shortened, visible
from paramwatch.png import png
from paramwatch.report.axes import Scale as Axis
from paramwatch.report.axes import rounds, written
from paramwatch.run import Run
from paramwatch.series import Series, select
from paramwatch.span import Span
from paramwatch.table import By, group_of

LINES, COLUMNS = 240, 600
"""So many are drawn at most."""

_CELLS = 2_000_000
# what was not measured is left open, so that the page shows through, whether it is light or dark
_PALETTE = [*PALETTE[:NOT_MEASURED], (0, 0, 0, 0), *PALETTE[NOT_MEASURED + 1 :]]
_SWATCHES = {ZERO: "zero", NOT_FINITE: "NaN or infinite"}

_LEFT, _WIDTH, _RIGHT, _BOTTOM = 190, 760, 10, 34


@dataclass(frozen=True)
class Heatmap:
    """What is drawn, and the numbers of each line over all recorded steps. Lines may stand for several layers that are neighbours."""

    statistic: str
    names: tuple[tuple[str, ...], ...]
    """The layers in each line."""
    by: By
    span: Span
    levels: Array
    """float32 [lines, columns], as `paramwatch.heatmap` has them: the greatest in each cell."""
    low: Array
    """float64 [lines]: the least finite value over all steps, NaN where there is none."""
    high: Array
    """The same of the largest."""
    last: Array
    """float64 [lines]: the largest of the line's layers at the last step that has one."""
    spoilt_steps: Array
    """int64 [lines]"""


def grouping(run: Run) -> By:
    """What a line is: a row where they are few, else a layer, else what shares as many name components as fit."""
    names = [str(name) for name in run.parameters.index]
    if len(names) <= LINES // 3:
        return "parameter"
    choices: list[By] = ["layer", *range(8, 0, -1)]
    sizes = {by: len({group_of(name, by) for name in names}) for by in choices}
    # with fewer than a few lines there would be little to see
    return next((by for by in choices if 8 <= sizes[by] <= LINES), "layer" if sizes["layer"] > 1 else "parameter")


def heatmaps(
    run: Run, statistics: Sequence[str], by: By, steps: Array, progress: Callable[[float], None] = lambda share: None
) -> list[Heatmap]:
    """Read statistics that are never negative, what they have in common once.

    Args:
        run: Read anew.
        statistics: Columns of `Run.frame()`.
        by: What a layer is, as in `Run.frame`.
        steps: int64, the recorded steps, at least one.
        progress: Told which share is done.
    """
    names = tuple(map(str, run.frame("lr", by=by, steps=slice(0, 0)).columns))
    made = [_Reduced(statistic, len(names), Span(steps, COLUMNS)) for statistic in statistics]
    size = max(1, _CELLS // max(1, len(names)))
    for start in range(0, len(steps) if names else 0, size):
        among = steps[start : start + size]
        found = select(run, statistics, by=by, steps=slice(int(among[0]), int(among[-1]) + 1))
        for each in made:
            each.add(found.series(each.statistic))
        progress((start + len(among)) / len(steps))
    return [each.heatmap(names, by) for each in made]


class _Reduced:
    """One statistic, of which no more is held than is shown."""

    def __init__(self, statistic: str, names: int, span: Span) -> None:
        self.statistic = statistic
        self._lines = min(LINES, names)
        self._starts = np.arange(self._lines) * names // max(self._lines, 1)
        self._alone = self._lines == names
        self._span = span
        self._cells = np.full((span.columns, self._lines), MISSING, np.float32)
        self._low, self._high, self._last = (np.full(self._lines, np.nan) for _ in range(3))
        self._spoilt_steps = np.zeros(self._lines, np.int64)

    def add(self, found: Series) -> None:
        """Take some steps, which come after those before."""
        seen = levels(np.where(found.spoilt, np.inf, found.values), found.spoilt | ~np.isnan(found.values))
        self._span.largest(found.steps, self._joined(np.maximum, seen), self._cells, np.maximum)
        greatest = self._joined(np.fmax, found.values)
        self._low = np.fmin(self._low, np.fmin.reduce(self._joined(np.fmin, found.values), axis=0))
        self._high = np.fmax(self._high, np.fmax.reduce(greatest, axis=0))
        self._spoilt_steps += self._joined(np.logical_or, found.spoilt).sum(0)
        known = ~np.isnan(greatest)
        latest = len(known) - 1 - known[::-1].argmax(0)
        self._last = np.where(known.any(0), greatest[latest, np.arange(self._lines)], self._last)

    def heatmap(self, names: Sequence[str], by: By) -> Heatmap:
        bounds = [*self._starts, len(names)]
        members = tuple(tuple(names[a:b]) for a, b in pairwise(bounds)) if self._lines else ()
        return Heatmap(self.statistic, members, by, self._span, self._cells.T, self._low, self._high, self._last, self._spoilt_steps)

    def _joined(self, of: np.ufunc, values: Array) -> Array:
        joined: Array = values if self._alone else of.reduceat(values, self._starts, axis=1)
        return joined


def drawn(found: Heatmap, title: str) -> str:
    """The heat map as a figure: the picture, its legend, and its numbers as a table."""
    n = len(found.names)
    if not n:
        return ""
    height = max(min(n * 18, 640), n * 2)
    scale = _scale(found.levels)
    picture = base64.b64encode(png(scale.pixels(found.levels[:, found.span.source]), _PALETTE)).decode()
    said = (
        f"{title} of {n} lines over the steps {found.span.first} to {found.span.end - 1}: from {written(scale.low)} (dark) to "
        f"{written(scale.high)} (bright), {int((found.spoilt_steps > 0).sum())} lines with NaN or infinite values; the numbers follow"
    )
    parts = [
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} {height + _BOTTOM}" role="img" aria-label="{escaped(said)}">',
        f'<rect class="nothing" x="{_LEFT}" y="0" width="{_WIDTH}" height="{height}"/>',
        f'<image x="{_LEFT}" y="0" width="{_WIDTH}" height="{height}" preserveAspectRatio="none" href="data:image/png;base64,{picture}"/>',
        *_blocks(found.names, height),
        *_steps(found.span, height),
        *_tips(found, height),
        "</svg>",
    ]
    shared = sum(map(len, found.names))
    note = f"A line is the largest of up to {-(-shared // n)} neighbouring layers. " if shared > n else ""
    return (
        f'<figure><figcaption>{escaped(title)}</figcaption><div class="wide">{"".join(parts)}</div>{_legend(scale)}'
        f'<p class="note">{note}Each cell is the largest value in its steps.</p>{_numbers(found, title)}</figure>'
    )


def label(names: Sequence[str]) -> str:
    """What a line is called."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"


def _scale(cells: Array) -> Scale:
    """From the smallest to the largest that is shown, but for the smallest hundredth."""
    shown = cells[(cells > 0) & np.isfinite(cells)].astype(np.float64)
    axis = Axis.of(shown[shown >= np.quantile(shown, 0.01, method="lower")] if len(shown) else shown, logarithmic=True)
    return Scale(max(axis.low, axis.high / 10**MOST_DECADES), axis.high)


def _blocks(names: Sequence[tuple[str, ...]], height: float) -> list[str]:
    """The names of the lines or, where they are too many, of the blocks that they are in, and the bounds of these."""
    line = height / len(names)
    labels, bounds = [label(each) for each in names], [line * i for i in range(len(names) + 1)]
    told_apart = False
    if line < 11:
        found = stretches([each[0] for each in names], int(height // 5))
        labels, bounds = [stretch.name for stretch in found], [*(stretch.start * line for stretch in found), float(height)]
        # thinner ones would be nothing but bounds
        told_apart = len(found) <= height / 12
    out, free = [], -1.0
    for name, top, bottom in zip(labels, bounds[:-1], bounds[1:], strict=True):
        if told_apart and top > 0:
            out.append(f'<path class="bound" d="M{_LEFT - 6} {top:.1f}H{_LEFT + _WIDTH}"/>')
        middle = min(max((top + bottom) / 2, 6), height - 5)
        if middle - 5.5 >= free:
            shown = escaped(shortened(visible(name[:2000]), 28))
            out.append(f'<text class="name" x="{_LEFT - 8}" y="{middle + 3.5:.1f}">{shown}</text>')
            free = middle + 6.5
    return out


def _steps(span: Span, height: float) -> list[str]:
    reach = span.end - span.first
    out = []
    for tick in dict.fromkeys(round(value) for value in rounds(span.first, span.end, 8)):
        if span.first <= tick <= span.end:
            x = _LEFT + (tick - span.first) / reach * _WIDTH
            out.append(f'<path class="tick" d="M{x:.1f} {height}v5"/><text class="step" x="{x:.1f}" y="{height + 17}">{tick:,}</text>')
    return [*out, f'<text class="axis" x="{_LEFT + _WIDTH}" y="{height + 31}">step</text>']


def _tips(found: Heatmap, height: float) -> list[str]:
    """What a pointer over a line is told."""
    line = height / len(found.names)
    out = []
    for i, names in enumerate(found.names):
        numbers = (
            f"last {number(found.last[i])}, {number(found.low[i])} to {number(found.high[i])}"
            if np.isfinite(found.high[i])
            else "not measured"
        )
        spoilt = f", not finite in {counted(int(found.spoilt_steps[i]), 'step')}" if found.spoilt_steps[i] else ""
        tip = escaped(f"{label([name[:200] for name in names])}: {numbers}{spoilt}")
        out.append(f'<rect class="tip" x="{_LEFT}" y="{i * line:.1f}" width="{_WIDTH}" height="{line:.1f}"><title>{tip}</title></rect>')
    return out


def _legend(scale: Scale) -> str:
    first = NOT_FINITE + 1
    bar = base64.b64encode(png(np.arange(first, len(_PALETTE), dtype=np.uint8)[None], _PALETTE)).decode()
    axis = Axis(scale.low, scale.high, True)
    ticks = "".join(
        f'<path class="tick" d="M{x:.1f} 12v4"/><text class="step" x="{x:.1f}" y="27">{written(tick)}</text>'
        for tick, x in ((tick, 4 + 240 * float(axis.share(np.array(tick)))) for tick in axis.ticks(4))
    )
    keys = "".join(
        f'<span class="key"><span class="swatch" style="background:rgb{_PALETTE[i][:3]}"></span>{said}</span>'
        for i, said in _SWATCHES.items()
    )
    return (
        f'<div class="legend"><svg class="bar" viewBox="-16 0 280 30" aria-hidden="true"><image x="4" width="240" height="12" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{bar}"/>{ticks}</svg>{keys}'
        '<span class="key"><span class="swatch nothing"></span>not measured</span></div>'
    )


def _numbers(found: Heatmap, title: str) -> str:
    first = found.by if isinstance(found.by, str) else "block"
    lines = [
        (
            label(names),
            number(found.last[i]),
            number(found.low[i]),
            number(found.high[i]),
            f"{found.spoilt_steps[i]:,}",
        )
        for i, names in enumerate(found.names)
    ]
    grid = Grid((first, "last", "min", "max", "steps not finite"), lines)
    return f"<details><summary>The same in numbers</summary>{grid.html(title)}</details>"
