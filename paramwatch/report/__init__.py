"""A run as one page to look at: the sections of the digest, then figures, then the inventory.

`report` makes the parts in order; each is a function from the run to HTML, and a further one is one more entry in `PARTS`. The page holds
what is shown and no more: it is as large for 100,000 steps as for 1,000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from paramwatch.digest import Section, sections
from paramwatch.grid import Grid, escaped
from paramwatch.report.chart import Line, chart
from paramwatch.report.maps import drawn, grouping, heatmaps
from paramwatch.report.page import page, part
from paramwatch.run import Run
from paramwatch.series import latest, recorded_steps, select
from paramwatch.sheet import shape_text
from paramwatch.standing import standing
from paramwatch.table import group_of
from paramwatch.usedigest import pulls

Progress: TypeAlias = Callable[[float], None]
Part: TypeAlias = Callable[[Run, Progress], str]
"""Gives HTML, "" where there is nothing to show."""

LINES = 200
"""Lines of a table that are shown."""

WORST = 6
"""Layers whose lines are drawn."""

_MAPS = {
    "grad_norm": "Gradient norm",
    "update_ratio": "Update ratio: the size of a step relative to the parameter",
    "param_norm": "Parameter norm",
}
_TOTALS = ("grad_norm", "update_norm", "param_norm", "lr", "grad_raw_norm", "clip_coef")


def report(run: Run, *, progress: Progress = lambda share: None) -> str:
    """The page, as HTML that needs nothing beside it.

    Args:
        run: Read anew.
        progress: Told which share is done, 0 to 1.

    Raises:
        ParamWatchError: Nothing whole was written yet.
    """
    parts = []
    for i, part_of in enumerate(PARTS):
        parts.append(part_of(run, lambda share, i=i: progress((i + share) / len(PARTS))))  # type: ignore[misc]  # default binds i
    return page(f"{run.model}: paramwatch report", str(run.path), parts)


def digest(run: Run, progress: Progress) -> str:
    """What `paramwatch summary` says."""
    return "".join(map(_section, sections(run, LINES)))


def totals(run: Run, progress: Progress) -> str:
    """The totals over all rows, as lines."""
    steps = run.steps
    if not len(steps):
        return ""
    numbers, spoilt = steps.index.to_numpy(np.int64), steps["nonfinite"].fillna(0).to_numpy(np.int64) > 0
    charts = []
    for name in _TOTALS:
        values = steps[name].to_numpy(np.float64)
        finite = np.isfinite(values)
        if finite.any():
            crossed = ~finite & spoilt & (name != "lr")
            charts.append(chart(name, [Line(name, numbers, np.where(finite, values, np.nan), crossed)], width=480, height=180))
    return part("Totals, step by step", f'<div class="pair">{"".join(charts)}</div>')


def agreement(run: Run, progress: Progress) -> str:
    """Whether the uses of a tied parameter agree, as lines: of those that fight most."""
    lines = [Line(pull.parameter, pull.steps, pull.agreement, np.zeros(len(pull.steps), bool)) for pull in pulls(run)[:WORST]]
    return part("Tied gradients, use by use", chart("agreement", lines)) if lines else ""


def heat_maps(run: Run, progress: Progress) -> str:
    """The main statistics of every layer."""
    steps = recorded_steps(run)
    if not len(steps):
        return ""
    by, there = grouping(run), run.frame(steps=slice(0, 0)).columns
    found = heatmaps(run, [name for name in _MAPS if name in there], by, steps, progress)
    out = [drawn(each, _MAPS[each.statistic]) for each in found]
    return part("Every layer at every step" if by == "layer" else "The whole model, step by step", "".join(out))


def worst(run: Run, progress: Progress) -> str:
    """The layers that do worst, as lines."""
    steps = recorded_steps(run)
    if not len(steps):
        return ""
    judged = standing(run, latest(steps, len(run.parameters)))
    names = [layer.name for layer in judged.layers if layer.severity][:WORST]
    there = run.frame(steps=slice(0, 0)).columns
    shown = [statistic for statistic in _MAPS if statistic in there]
    charts = []
    if names and shown:
        found = select(run, shown, parameters=_rows_of(run, names), by="layer")
        for each in map(found.series, shown):
            at = [each.names.index(name) for name in names if name in each.names]
            charts.append(chart(each.statistic, [Line(each.names[j], each.steps, each.values[:, j], each.spoilt[:, j]) for j in at]))
    progress(1)
    return part("The layers that do worst", "".join(charts))


def inventory(run: Run, progress: Progress) -> str:
    """The rows of the model."""
    rows = run.parameters
    lines = [
        (
            row["parameter"],
            ", ".join(name[:200] for name in row["aliases"][:8]),
            row["module_type"],
            shape_text(row["shape"]),
            f"{row['numel']:,}",
            row["dtype"],
            "yes" if row["trainable"] and row["owned"] else "in no optimizer" if row["trainable"] else "frozen",
        )
        for row in rows.head(LINES).reset_index().to_dict("records")
    ]
    more = f"… and {len(rows) - LINES:,} more rows, in paramwatch.load(...).parameters" if len(rows) > LINES else ""
    words = frozenset({"also called", "module", "shape", "dtype", "trained"})
    grid = Grid(("parameter", "also called", "module", "shape", "elements", "dtype", "trained"), lines, words, more)
    return part("Inventory", grid.html("Inventory"))


PARTS: Sequence[Part] = (digest, totals, agreement, heat_maps, worst, inventory)
"""In the order in which they are shown."""


def _rows_of(run: Run, layers: Sequence[str]) -> list[str]:
    """The names of the rows in some layers."""
    return [name for name in map(str, run.parameters.index) if group_of(name, "layer") in layers]


def _section(section: Section) -> str:
    said = "".join(f"<p>{escaped(sentence, 2000)}</p>" for sentence in section.said)
    return part(section.title, said + (section.grid.html(section.title) if section.grid else ""))
