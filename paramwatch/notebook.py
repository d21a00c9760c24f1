"""What a notebook shows of a run: its latest step, its ties, what the rules said. Everything is escaped: names are data."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd

from paramwatch import frames
from paramwatch.epoch import Epoch
from paramwatch.lettering import visible
from paramwatch.record import Finding, TieGroup
from paramwatch.table import span_of

SHOWN = 60
"""Lines of a table, at most."""

_NOTHING = "-"

_COLUMNS = {"param_norm": "param", "grad_norm": "grad", "update_ratio": "update"}
"""What is shown of a row, and the kind that must have been measured for it."""


class Ties(tuple[TieGroup, ...]):
    """The tie groups of a model: a tuple, which a notebook shows as a table and `frame` gives as one."""

    __slots__ = ()

    @property
    def frame(self) -> pd.DataFrame:
        """A line for each group: `names` (a tuple), `kind`, `numel`, `bytes_saved`."""
        columns = {
            "names": pd.Series([tie.names for tie in self], dtype="object"),
            "kind": pd.Series([tie.kind for tie in self], dtype="object"),
            "numel": pd.Series([tie.numel for tie in self], dtype="int64"),
            "bytes_saved": pd.Series([tie.bytes_saved for tie in self], dtype="int64"),
        }
        return pd.DataFrame(columns)

    def _repr_html_(self) -> str:
        if not self:
            return "<p>No ties.</p>"
        shown = self.frame.assign(names=[", ".join(map(visible, tie.names)) for tie in self])
        return _table(shown, index=False)


def run_html(said: str, latest: Epoch | None, ties: Sequence[TieGroup], findings: Sequence[Finding]) -> str:
    """A run in a notebook.

    Args:
        said: Its `repr`.
        latest: The last epoch.
        ties: The tie groups.
        findings: What the rules said.
    """
    parts = [f"<p><code>{html.escape(visible(said))}</code></p>"]
    if latest is not None and len(latest.step):
        parts += [f"<p>Step {latest.step[-1]}:</p>", _table(_last_step(latest))]
    if ties:
        parts += ["<p>Ties:</p>", Ties(ties)._repr_html_()]
    if findings:
        table = frames.findings_frame(findings)
        parts += [
            "<p>Findings:</p>",
            _table(table.assign(parameter=table["parameter"].map(visible), message=table["message"].map(visible)), False),
        ]
    return "\n".join(parts)


def _last_step(epoch: Epoch) -> pd.DataFrame:
    last = slice(int(epoch.step[-1]), None)
    frame = frames.frame([epoch], steps=last).droplevel("step")
    block = epoch.block([(kind, "count") for kind in _COLUMNS.values()], span=span_of(last), per_row=(), keys=())
    shown = {}
    for column, kind in _COLUMNS.items():
        known = (
            block.values["count"][-1, block.inventory.kinds.index(kind)] >= 0
            if kind in block.inventory.kinds
            else np.zeros(len(frame), bool)
        )
        # a value that is no number was measured all the same
        shown[column] = [f"{value:.6g}" if seen else _NOTHING for value, seen in zip(frame[column], known, strict=True)]
    shown["grad_state"] = [_NOTHING if state is None or state != state else str(state) for state in frame["grad_state"]]
    return pd.DataFrame(shown, index=frame.index.map(visible))


def _table(frame: pd.DataFrame, index: bool = True) -> str:
    return str(frame.to_html(index=index, max_rows=SHOWN))
