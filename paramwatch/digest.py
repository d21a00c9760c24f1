"""A run in sections: what was watched, its totals, ties, layers, what was skipped or not finite, findings.

`paramwatch summary` prints the sections, its `--json` gives their data, and the report begins with them. A further section is one more
function in `SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from paramwatch.absence import counted
from paramwatch.columns import Array
from paramwatch.grid import Grid, number
from paramwatch.lettering import shortened, sized
from paramwatch.run import Run
from paramwatch.series import latest
from paramwatch.span import sparkline
from paramwatch.standing import Layer, Standing, standing
from paramwatch.terminal import duration
from paramwatch.usedigest import data_of, lines_of, pulls, said_of

SHOWN = 10
"""Lines of a table before the rest is only counted."""

_TOTALS = ("grad_norm", "grad_raw_norm", "clip_coef", "update_norm", "param_norm", "lr")
_WIDTH = 24
_NAMES = 4


@dataclass(frozen=True)
class Section:
    """One thing to know of a run."""

    key: str
    """Its name in JSON."""
    title: str
    said: tuple[str, ...] = ()
    """Sentences."""
    grid: Grid | None = None
    data: Any = field(default=None, repr=False)
    """The same for a script: dicts, lists, numbers and texts."""


@dataclass(frozen=True)
class Reading:
    """What sections are made from, read once."""

    run: Run
    steps: pd.DataFrame
    parameters: pd.DataFrame
    window: slice
    """The latest steps, on which layers are judged."""


SectionOf: TypeAlias = Callable[[Reading], Section | None]
"""Gives None where there is nothing to say."""


def sections(run: Run, shown: int = SHOWN) -> Iterator[Section]:
    """The sections of a run.

    Args:
        run: Read anew.
        shown: Lines of a table, at most.

    Raises:
        ParamWatchError: Nothing whole was written yet.
    """
    steps, parameters = run.steps, run.parameters
    reading = Reading(run, steps, parameters, latest(steps.index.to_numpy(np.int64), len(parameters)))
    for section_of in SECTIONS:
        section = section_of(reading)
        if section is not None:
            yield _first_lines(section, shown)


def watched(reading: Reading) -> Section:
    """The model, its rows, and the steps."""
    rows, steps, model = reading.parameters, reading.steps, reading.run.model
    names = len(rows) + int(rows["aliases"].map(len).sum())
    trained = int(rows.loc[rows["trainable"], "numel"].sum())
    size = f"{counted(len(rows), 'row')} ({names:,} names)" if names > len(rows) else counted(len(rows), "row")
    elements, held = int(rows["numel"].sum()), int(rows["bytes"].sum())
    held -= sum(tie.bytes_saved for tie in reading.run.ties if tie.kind == "storage")
    said = [f"{shortened(model, 80)}: {size}, {counted(elements, 'element')}, {trained:,} of them trained, {sized(held)}"]
    data: dict[str, Any] = {
        "path": str(reading.run.path),
        "model": model,
        "rows": len(rows),
        "names": names,
        "elements": elements,
        "trained_elements": trained,
        "bytes": held,
        "steps": len(steps),
    }
    if len(steps):
        first, last, begun, ended = steps.index[0], steps.index[-1], steps["time"].iloc[0], steps["time"].iloc[-1]
        seconds = (ended - begun).total_seconds()
        thinned = "" if steps["full_rate"].fillna(True).all() else ", thinned as the run grew"
        took = f" in {duration(seconds)}" if seconds > 0 else ""
        said.append(f"{counted(len(steps), 'recorded step')} ({first} to {last}){took}{thinned}; the last at {ended:%F %T} UTC")
        data |= {
            "first_step": int(first),
            "last_step": int(last),
            "begun": begun.isoformat(),
            "ended": ended.isoformat(),
            "seconds": seconds,
        }
        modes = steps["update_mode"].dropna().unique().tolist()
        if "sampled" in modes:
            said.append("updates are estimates from a sample of each row (update_mode: sampled)")
        data["update_modes"] = modes
        overhead = steps["overhead_us"].median()
        if not np.isnan(overhead):
            on_gpu = "overhead_host_us" in steps and steps["overhead_host_us"].notna().any()
            whose = "GPU's stream" if on_gpu else "training thread"
            said.append(f"watching took {overhead:,.0f} µs of the {whose} at the median step")
            data["median_overhead_us"] = float(overhead)
    else:
        said.append("no steps yet")
    return Section("watched", "Watched", tuple(said), data=data)


def totals(reading: Reading) -> Section | None:
    """The totals over all rows, as they went."""
    steps = reading.steps
    numbers, lines, data = steps.index.to_numpy(np.int64), [], {}
    nonfinite = steps["nonfinite"].fillna(0).to_numpy(np.int64) > 0
    for name in _TOTALS:
        values = steps[name].to_numpy(np.float64)
        known = values[np.isfinite(values)]
        if len(known):
            spoilt = np.isinf(values) | (np.isnan(values) & nonfinite & (name != "lr"))
            three = known[-1], float(np.median(known)), known.min(), known.max()
            drawn = sparkline(numbers, np.where(np.isfinite(values), values, np.nan), spoilt, _WIDTH)
            lines.append((name, drawn, *map(number, three)))
            data[name] = dict(zip(("last", "median", "min", "max"), map(float, three), strict=True))
    grid = Grid(("total", "trend", "last", "median", "min", "max"), lines, frozenset({"trend"}))
    return Section("totals", "Totals over all rows", (), grid, data) if lines else None


def ties(reading: Reading) -> Section | None:
    """Names that share a tensor, or memory."""
    found = reading.run.ties
    if not found:
        return None
    saved = sum(tie.bytes_saved for tie in found)
    said = [f"{counted(len(found), 'tie group')}, {sized(saved)} saved"]
    if any(tie.kind == "storage" for tie in found):
        said.append("kind storage is not tying: gradients are not summed, and each update hits the same memory")
    lines = [(_listed(tie.names, " = "), tie.kind, f"{tie.numel:,}", f"{tie.bytes_saved:,}") for tie in found]
    grid = Grid(("names", "kind", "elements", "bytes saved"), lines, frozenset({"kind"}))
    data = [{"names": list(tie.names), "kind": tie.kind, "numel": tie.numel, "bytes_saved": tie.bytes_saved} for tie in found]
    return Section("ties", "Ties", tuple(said), grid, data)


def uses(reading: Reading) -> Section | None:
    """Whether the uses of a tied parameter agree."""
    found = pulls(reading.run)
    return Section("uses", "Tied gradients, use by use", tuple(said_of(found)), lines_of(found), data_of(found)) if found else None


def layers(reading: Reading) -> Section | None:
    """The worst layers and the best."""
    if not len(reading.steps):
        return None
    found = standing(reading.run, reading.window)
    ranked = [layer for layer in found.layers if layer.severity]
    few = len(ranked) <= 8
    worst = ranked if few else ranked[:5]
    best = [] if few else [layer for layer in ranked if layer.severity == 1][:-4:-1]
    steps = found.ratios.steps
    said = [f"medians over the latest {counted(len(steps), 'recorded step')} ({_span(steps)}); faster and slower: than the median layer"]
    frozen = len(found.layers) - len(ranked)
    said += [f"{counted(frozen, 'frozen layer')} left out"] * (frozen > 0)
    said += [f"{len(ranked) - len(worst) - len(best):,} layers between these are not shown"] * (not few)
    lines = [*_judged(worst, found), *_judged(best, found)]
    grid = Grid(("layer", "verdict", "update_ratio", "trend", "grad_norm"), lines, frozenset({"trend", "verdict"}))
    data = {"worst": [_plain(layer) for layer in worst], "best": [_plain(layer) for layer in best or reversed(worst)]}
    title = "Layers, from worst to best" if few else "Layers: the five worst, then the three best"
    return Section("layers", title, tuple(said), grid, data) if ranked else None


def skipped(reading: Reading) -> Section | None:
    """Steps that a GradScaler skipped."""
    steps = reading.steps
    found = steps.index[steps["skipped"].fillna(False).to_numpy(bool)].tolist()
    if not found:
        return None
    said = f"{counted(len(found), 'step')} of {len(steps):,} skipped by the GradScaler: {_listed(list(map(str, found)), ', ', 10)}"
    return Section("skipped", "Skipped steps", (said,), data={"count": len(found), "steps": found})


def nonfinite(reading: Reading) -> Section | None:
    """Steps with NaN or infinite elements."""
    counts = reading.steps["nonfinite"].dropna()
    found = counts[counts > 0]
    if not len(found):
        return None
    listed = _listed([str(step) for step in found.index], ", ", 10)
    said = f"{counted(len(found), 'recorded step')} with NaN or infinite elements in parameters or gradients: {listed}"
    return Section("nonfinite", "Not finite", (said,), data={"count": len(found), "steps": found.index.tolist()})


def findings(reading: Reading) -> Section:
    """What the rules said."""
    found = reading.run.findings
    lines = [(str(step), rule, message) for step, rule, message in zip(found["step"], found["rule"], found["message"], strict=True)]
    grid = Grid(("step", "rule", "message"), lines, frozenset({"rule", "message"})) if lines else None
    said = () if lines else ("none",)
    return Section("findings", "Findings", said, grid, found.to_dict("records"))


SECTIONS: Sequence[SectionOf] = (watched, totals, ties, uses, layers, skipped, nonfinite, findings)
"""In the order in which they are shown."""


# ---- words and lines ------------------------------------------------------------------------


def _first_lines(section: Section, shown: int) -> Section:
    grid = section.grid
    if grid is None or len(grid.lines) <= shown:
        return section
    less = Grid(grid.header, grid.lines[:shown], grid.left, f"… and {len(grid.lines) - shown:,} more")
    return Section(section.key, section.title, section.said, less, section.data)


def _judged(layers: Sequence[Layer], found: Standing) -> Iterator[tuple[str, ...]]:
    ratios = found.ratios
    for layer in layers:
        at = ratios.names.index(layer.name)
        drawn = sparkline(ratios.steps, ratios.values[:, at], ratios.spoilt[:, at], 12)
        yield layer.name, layer.verdict, number(layer.update_ratio), drawn, number(layer.grad_norm)


def _plain(layer: Layer) -> Mapping[str, Any]:
    return {
        "layer": layer.name,
        "update_ratio": layer.update_ratio,
        "grad_norm": layer.grad_norm,
        "nonfinite_steps": layer.nonfinite,
        "verdict": layer.verdict,
    }


def _listed(names: Sequence[str], between: str, shown: int = _NAMES) -> str:
    more = len(names) - shown
    return between.join(names) if more <= 0 else f"{between.join(names[:shown])} and {more:,} more"


def _span(steps: Array) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
