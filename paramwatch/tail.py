"""A run while it trains: its latest steps as lines, or as a table that is drawn again (`paramwatch tail`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from paramwatch.absence import counted
from paramwatch.grid import Grid, number
from paramwatch.guard import ParamWatchError
from paramwatch.lettering import cut, visible
from paramwatch.run import Run
from paramwatch.series import latest
from paramwatch.span import sparkline
from paramwatch.standing import standing
from paramwatch.terminal import Terminal, duration

_COLUMNS = ("grad_norm", "update_norm", "param_norm", "lr")
_IDLE_SHARE = 4
"""Reading may take one part in so many of the time, however long the run is."""


def follow(run: Run, terminal: Terminal, *, seconds: float, lines: int, once: bool) -> None:
    """Show a run until the keyboard interrupts.

    Args:
        run: Read anew each time.
        terminal: Where to: a table where it can be drawn again, else a line for each new step.
        seconds: How long to wait between two looks.
        lines: So many earlier steps are shown first.
        once: Print those, and return.

    Raises:
        ParamWatchError: With `once`, where nothing whole was written yet.
        KeyboardInterrupt: At the user's wish.
    """
    if once or not terminal.live:
        _print(run, terminal, seconds, lines, once)
        return
    terminal.begin()
    try:
        while True:
            begun = time.monotonic()
            terminal.redraw(screen(run, terminal))
            _wait(begun, seconds)
    finally:
        terminal.end()


def _print(run: Run, terminal: Terminal, seconds: float, lines: int, once: bool) -> None:
    said = -1
    while True:
        begun = time.monotonic()
        steps = run.steps if once else _steps_or_none(run)
        if steps is not None:
            # a session that began again hides the steps after its first
            again = said < 0 or (len(steps) > 0 and steps.index[-1] < said)
            fresh = steps.iloc[max(len(steps) - lines, 0) :] if again else steps[steps.index > said]
            terminal.print(line_of(step, values) for step, values in zip(fresh.index, fresh.to_dict("records"), strict=True))
            said = steps.index[-1] if len(steps) else said
        if once:
            return
        _wait(begun, seconds)


def line_of(step: int, values: dict[Any, Any]) -> str:
    """One step as a line: `name value` pairs, which other programs can read."""
    out = [f"step {step}", f"time {values['time']:%Y-%m-%dT%H:%M:%SZ}"]
    out += [f"{name} {values[name]:.6g}" for name in _COLUMNS if not pd.isna(values[name]) or _was_measured(values)]
    if not pd.isna(values["nonfinite"]) and values["nonfinite"]:
        out.append(f"nonfinite {values['nonfinite']:,}")
    if not pd.isna(values["skipped"]) and values["skipped"]:
        out.append("skipped")
    return "  ".join(out)


def screen(run: Run, terminal: Terminal) -> list[str]:
    """What the terminal shows: the run, its totals, and its layers from worst to best, as many as fit."""
    width, room = terminal.width, terminal.height - 1
    steps = _steps_or_none(run)
    if steps is None or not len(steps):
        return [cut(visible(f"waiting for the first steps of {run.path}"), width), "", terminal.paint(_HOW_TO_END, "dim")]
    numbers = steps.index.to_numpy(np.int64)
    window = latest(numbers, len(run.parameters), 100)
    recent = steps.loc[window.start :]
    head = f"{run.model}  step {numbers[-1]}  {_rate(recent)}{_age(recent)}  {run.path}"
    out = [terminal.paint(cut(visible(head), width), "bold"), ""]
    out += Grid(("total", "trend", "last"), list(_totals(recent)), frozenset({"trend"})).text(width, terminal.paint)
    found = run.findings
    said = [f"step {line.step}  {line.rule}: {line.message}" for line in found.tail(3).itertuples()]
    said = [terminal.paint(cut(visible(line), width), "red") for line in said]
    out += ["", *said] if said else []
    judged = standing(run, window)
    left = max(room - len(out) - 4, 1)
    lines = []
    for layer in judged.layers[:left]:
        at = judged.ratios.names.index(layer.name)
        drawn = sparkline(judged.ratios.steps, judged.ratios.values[:, at], judged.ratios.spoilt[:, at], 24)
        lines.append((layer.name, layer.verdict, number(layer.update_ratio), drawn, number(layer.grad_norm)))
    grid = Grid(("layer, worst first", "verdict", "update_ratio", "trend", "grad_norm"), lines, frozenset({"trend", "verdict"}))
    out += ["", *grid.text(width, terminal.paint), ""]
    rest = len(judged.layers) - len(lines)
    out.append(terminal.paint(f"… and {counted(rest, 'more layer')}. {_HOW_TO_END}" if rest > 0 else _HOW_TO_END, "dim"))
    return out[:room]


_HOW_TO_END = "Ctrl-C ends this; the training goes on"


def _totals(steps: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    numbers = steps.index.to_numpy(np.int64)
    spoilt = steps["nonfinite"].fillna(0).to_numpy(np.int64) > 0
    for name in _COLUMNS:
        values = steps[name].to_numpy(np.float64)
        if not np.isnan(values).all() or spoilt.any():
            finite = np.isfinite(values)
            crossed = ~finite & (spoilt if name != "lr" else np.zeros(len(values), bool))
            yield name, sparkline(numbers, np.where(finite, values, np.nan), crossed, 24), _plain(values[-1])


def _plain(value: float) -> str:
    return "NaN" if np.isnan(value) else f"{value:.4g}"


def _rate(steps: pd.DataFrame) -> str:
    seconds = (steps["time"].iloc[-1] - steps["time"].iloc[0]).total_seconds()
    return f"{(steps.index[-1] - steps.index[0]) / seconds:.3g} steps/s" if seconds > 0 else ""


def _age(steps: pd.DataFrame) -> str:
    seconds = (pd.Timestamp.now("UTC") - steps["time"].iloc[-1]).total_seconds()
    # a batch is written when it is five seconds old
    return f", the last {duration(seconds)} ago" if seconds > 10 else ""


def _was_measured(values: dict[Any, Any]) -> bool:
    return bool(not pd.isna(values["nonfinite"]) and values["nonfinite"])


def _steps_or_none(run: Run) -> pd.DataFrame | None:
    """None where nothing whole was written yet."""
    try:
        return run.steps
    except ParamWatchError:
        return None


def _wait(begun: float, seconds: float) -> None:
    took = time.monotonic() - begun
    time.sleep(max(seconds - took, (_IDLE_SHARE - 1) * took))
