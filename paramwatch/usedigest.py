"""Gradients by use in a few lines: which tied parameters are pulled apart, and by whom. Behind `digest` and the report.

One step says little, since the uses of a layer agree and disagree as training goes: parameters are judged by medians over split steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from paramwatch.agreement import UNATTRIBUTED
from paramwatch.columns import Array
from paramwatch.grid import Grid, number
from paramwatch.run import Run
from paramwatch.span import sparkline

FIGHT, AGREE = -0.3, 0.3
"""Medians of the agreement from which it has a name."""

HEADER = ("parameter", "uses", "agreement", "trend", "verdict", "pulls most", "horizon")


@dataclass(frozen=True)
class Pull:
    """The uses of one parameter over a run."""

    parameter: str
    use_count: int
    """The most in one step."""
    steps: Array
    """int64 [n]: those at which it was split."""
    agreement: Array
    """float64 [n]"""
    strongest: str
    """The use with the largest median `use_norm`, "" where none is known."""
    strength: float
    """How many times the median `use_norm` of the weakest."""
    horizon: float
    """Median over the steps."""
    unattributed: int
    """Steps at which something of the gradient was found in no use."""

    @property
    def median(self) -> float:
        """Median of the agreement, NaN where it is never known."""
        known = self.agreement[~np.isnan(self.agreement)]
        return float(np.median(known)) if len(known) else np.nan

    @property
    def verdict(self) -> str:
        """In a word."""
        if np.isnan(self.median):
            return "not known"
        return "fight" if self.median <= FIGHT else "agree" if self.median >= AGREE else "go their own ways"


def pulls(run: Run) -> list[Pull]:
    """Of each parameter that was split, those that fight first; empty where nothing was split."""
    if not run.has_uses:
        return []
    found = run.agreement().reset_index()
    norms = run.uses()["use_norm"].reset_index()
    missing = norms[norms["use"] == UNATTRIBUTED].groupby("parameter").size()
    known = norms[norms["use"] != UNATTRIBUTED].groupby(["parameter", "use"], sort=False)["use_norm"].median().reset_index("parameter")
    out = [
        _pull(str(name), lines, known.loc[known["parameter"] == name, "use_norm"].dropna(), int(missing.get(name, 0)))
        for name, lines in found.groupby("parameter", sort=False)
    ]
    return sorted(out, key=lambda pull: (np.isnan(pull.median), pull.median))


def lines_of(found: Sequence[Pull]) -> Grid:
    """As a table."""
    lines = []
    for pull in found:
        drawn = sparkline(pull.steps, pull.agreement, np.zeros(len(pull.steps), bool), 12)
        horizon = number(pull.horizon) if pull.use_count > 2 else ""
        lines.append((pull.parameter, f"{pull.use_count:,}", number(pull.median), drawn, pull.verdict, _most(pull), horizon))
    return Grid(HEADER, lines, frozenset({"trend", "verdict", "pulls most"}))


def said_of(found: Sequence[Pull]) -> list[str]:
    """Sentences above the table."""
    said = ["medians over the split steps; agreement: +1 the uses pull the same way, 0 unrelated, -1 they fight"]
    spoilt = [pull.parameter for pull in found if pull.unattributed]
    if spoilt:
        said.append(f"part of the gradient was found in no use, at some steps: {', '.join(spoilt[:4])}{' ...' * (len(spoilt) > 4)}")
    return said


def data_of(found: Sequence[Pull]) -> list[dict[str, Any]]:
    """The same for a script."""
    return [
        {
            "parameter": pull.parameter,
            "use_count": pull.use_count,
            "split_steps": len(pull.steps),
            "agreement_median": pull.median,
            "agreement_last": float(pull.agreement[-1]),
            "verdict": pull.verdict,
            "strongest": pull.strongest,
            "strength": pull.strength,
            "horizon": pull.horizon,
            "steps_with_unattributed": pull.unattributed,
        }
        for pull in found
    ]


def _pull(name: str, lines: pd.DataFrame, norms: pd.Series, missing: int) -> Pull:
    strongest = str(norms.idxmax()) if len(norms) else ""
    weakest = float(norms.min()) if len(norms) else np.nan
    return Pull(
        parameter=name,
        use_count=int(lines["use_count"].max()),
        steps=lines["step"].to_numpy(np.int64),
        agreement=lines["agreement"].to_numpy(np.float64),
        strongest=strongest,
        strength=float(norms.max()) / weakest if weakest > 0 else np.nan,
        horizon=float(lines["horizon"].astype("Float64").median(skipna=True)) if lines["horizon"].notna().any() else np.nan,
        unattributed=missing,
    )


def _most(pull: Pull) -> str:
    times = "" if np.isnan(pull.strength) else f", {pull.strength:.3g}x the weakest"
    return f"{pull.strongest}{times}"
