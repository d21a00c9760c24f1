"""Splits to pandas: the frames of a run about gradients by use. Numbers are derived by `agreement` alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from paramwatch import agreement
from paramwatch.globs import text
from paramwatch.guard import ParamWatchError
from paramwatch.record import Split
from paramwatch.table import Source, chosen_steps, labels_of, nearest
from paramwatch.uselines import splits_of

_ASK = (
    "no gradient was split by use in this run. attach(net, uses=N), or ParamWatch(uses=N) in Lightning, splits those of tied parameters at "
    "steps 0, N, 2N, ...; uses_of='*' also those of parameters that are used several times in one backward pass. If that was asked for, "
    "no gradient came, the model used each of them once in a pass and nothing else did, or the log says what was in the way"
)


def uses_frame(
    blocks: Sequence[Source], lines: Any, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False
) -> pd.DataFrame:
    """Index (`step`, `parameter`, `use`), columns `use_norm`, `use_share` (float64), `mode` (str) and `backwards` (int64).

    A use called `(unattributed)` is what the others leave of the gradient, where that is more than rounding.

    Args:
        blocks: At least one, in order: which names are which rows.
        lines: The lines of the long stream `uses`.
        parameters: As for `frames.frame`.
        steps: As for `frames.frame`.
        aliases: As for `frames.frame`.

    Raises:
        ParamWatchError: Nothing was split; patterns that fit no row, or an argument that makes no sense.
    """
    keys: list[tuple[int, str, str]] = []
    norm: list[float] = []
    share: list[float] = []
    told: list[tuple[str, int]] = []
    for step, name, split in _chosen(blocks, lines, parameters, steps, aliases):
        names, values, parts = split.uses, agreement.norms(split).tolist(), agreement.shares(split).tolist()
        if not agreement.is_explained(split):
            names = (*names, agreement.UNATTRIBUTED)
            values.append(agreement.missing_norm(split))
            parts.append(agreement.statistics(split)["unattributed"])
        keys += [(step, name, use) for use in names]
        norm, share, told = norm + values, share + parts, told + [(split.mode, split.backwards)] * len(names)
    index = _index(keys, ["step", "parameter", "use"])
    columns = {"mode": pd.Series([mode for mode, _ in told], index, "str"), "backwards": np.array([n for _, n in told], np.int64)}
    return pd.DataFrame({"use_norm": np.array(norm), "use_share": np.array(share), **columns}, index=index)


def agreement_frame(
    blocks: Sequence[Source], lines: Any, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False
) -> pd.DataFrame:
    """Index (`step`, `parameter`), a column for each of `agreement.statistics`; `horizon` and `use_count` are whole numbers.

    Args and errors as for `uses_frame`.
    """
    found = [(step, name, agreement.statistics(split)) for step, name, split in _chosen(blocks, lines, parameters, steps, aliases)]
    index = _index([(step, name) for step, name, _ in found], ["step", "parameter"])
    columns: dict[str, Any] = {name: np.array([statistics[name] for _, _, statistics in found], np.float64) for name in agreement.NAMES}
    for whole in ("horizon", "use_count"):
        values = columns[whole]
        unknown = np.isnan(values)
        columns[whole] = pd.arrays.IntegerArray(np.where(unknown, 0, values).astype(np.int64), unknown)
    return pd.DataFrame(columns, index=index).astype({"use_count": np.int64})


def cosines_frame(blocks: Sequence[Source], lines: Any, parameter: str, step: int) -> pd.DataFrame:
    """The cosine of every two uses of one row at one step: index and columns `use`.

    Raises:
        ParamWatchError: There is no such row, or it was not split at that step (the nearest one is named), or pairs were not multiplied.
    """
    if not isinstance(step, (int, np.integer)):
        raise ParamWatchError(f"step has to be the number of a step, as in use_cosines({parameter!r}, 0), not {step!r}")
    found = {at: split for at, _, split in _chosen(blocks, lines, parameter, None, False)}
    if step not in found:
        if not found:
            split_rows = dict.fromkeys(name for _, name, _ in _chosen(blocks, lines, "*", None, False))
            raise ParamWatchError(f"{parameter!r} was not split by use{nearest(parameter, split_rows)}")
        at = min(found, key=lambda known: abs(known - step))
        raise ParamWatchError(
            f"{parameter!r} was not split by use at step {step!r}; it was at {len(found)} steps, the nearest of them {at}"
        )
    split = found[step]
    if not split.uses:
        raise ParamWatchError(
            f"no use of {parameter!r} was found at step {step} (mode {split.mode!r}); the log, and watch.findings, say why"
        )
    if not split.mode.startswith("full"):
        raise ParamWatchError(
            f"the uses of {parameter!r} were not kept at step {step} (mode {split.mode!r}: they did not fit the budget of memory): "
            "their cosines are not known; agreement() has their weighted mean"
        )
    if len(split.uses) > agreement.MOST_PAIRS:
        raise ParamWatchError(
            f"{parameter!r} has {len(split.uses)} uses at step {step}; of more than {agreement.MOST_PAIRS} pairs are not multiplied. "
            "agreement() has the weighted mean of their cosines"
        )
    names = pd.Index(split.uses, name="use")
    return pd.DataFrame(agreement.cosines(split), names, names)


def _chosen(
    blocks: Sequence[Source], lines: Any, parameters: str | Sequence[str], steps: slice | None, aliases: bool
) -> Iterator[tuple[int, str, Split]]:
    """Step, name and split, in the order of steps and of the model; what was recorded last of a step counts."""
    if not lines.num_rows:
        raise ParamWatchError(_ASK)
    names: dict[str, str] = {}
    for block, known in zip(reversed(blocks), reversed(labels_of(blocks, parameters, aliases)), strict=True):
        for name, i in zip(known.names, known.rows, strict=True):
            names.setdefault(name, text(block.inventory.rows[i].name))
    chosen = lines.filter(chosen_steps(lines["step"].to_numpy(), steps))
    found: dict[int, dict[str, Split]] = {}
    for step, row, split in splits_of(chosen):
        found.setdefault(step, {})[row] = split
    for step in sorted(found):
        for name, row in names.items():
            if row in found[step]:
                yield step, name, found[step][row]


def _index(keys: Sequence[tuple[Any, ...]], names: Sequence[str]) -> pd.MultiIndex:
    """Levels in the order in which they come, so that pandas finds lines of it quickly."""
    levels = [list(dict.fromkeys(key[i] for key in keys)) for i in range(len(names))]
    # what is missing comes after the uses of every row
    levels[-1].sort(key=lambda name: name == agreement.UNATTRIBUTED)
    codes: list[Any] = []
    for i, level in enumerate(levels):
        position = {value: j for j, value in enumerate(level)}
        codes.append([position[key[i]] for key in keys])
    return pd.MultiIndex(levels, codes, names=list(names))
