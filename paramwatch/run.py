"""A run to read: `load` finds what was written, `Run` gives it as pandas frames.

The reading half of what `attach` returns. It also reads a run that is going on: every question looks at the files anew.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
import pandas as pd

from paramwatch import frames
from paramwatch.absence import Absence, Tally, counted
from paramwatch.epoch import NoSteps
from paramwatch.folder import DiskFolder, Folder, MemoryFolder
from paramwatch.guard import ParamWatchError
from paramwatch.notebook import Ties, run_html
from paramwatch.record import Inventory
from paramwatch.store import Contents, read
from paramwatch.table import By, Source

PathLike: TypeAlias = str | os.PathLike[str]


@overload
def load(path: PathLike) -> Run: ...
@overload
def load(path: list[str] | list[Path] | tuple[PathLike, ...]) -> Runs: ...
def load(path: PathLike | list[str] | list[Path] | tuple[PathLike, ...]) -> Run | Runs:
    """Read a run that was written, or is still being written.

    Args:
        path: The `log_dir` of a run, the folder in it that holds the run, or any folder with one run below it. A list of such paths, or
            a glob pattern such as "runs/*", gives `Runs`: every run below any of them.

    Raises:
        ParamWatchError: There is no run; or there are several below a path that was to be one.
    """
    if isinstance(path, Iterable) and not isinstance(path, str | bytes | os.PathLike):
        return Runs({label: run for each in path for label, run in _labelled(Path(_checked(each))).items()})
    where = _checked(path)
    if glob.has_magic(where) and not os.path.lexists(where):
        found = {label: run for match in sorted(glob.glob(where)) if _below(Path(match)) for label, run in _labelled(Path(match)).items()}
        if not found:
            raise ParamWatchError(f"no run matches {where}: {_LOOKED_FOR}")
        return Runs(found)
    runs = list(_labelled(Path(where)).values())
    if len(runs) > 1:
        listed = "\n".join(f"  {run.path}" for run in runs)
        raise ParamWatchError(f"{where} holds {len(runs)} runs. Load one of these, or all of them with load([{where!r}]):\n{listed}")
    return runs[0]


class Run:
    """What was recorded of one run.

    Args:
        path: The folder that holds it. None for a run that holds nothing, or keeps its records elsewhere and overrides `_read`.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        # shown as it was given, read where it was then
        self._folder: Folder = MemoryFolder() if path is None else DiskFolder(path.absolute())

    @property
    def path(self) -> Path | None:
        """The folder that holds the run, None for a run in memory."""
        return self._path

    def frame(
        self,
        statistic: str | None = None,
        *,
        parameters: str | Sequence[str] = "*",
        steps: slice | None = None,
        aliases: bool = False,
        by: By = "parameter",
        finite: bool = False,
    ) -> pd.DataFrame:
        """All statistics of each step and parameter, or one of them with a column for each parameter.

        Statistics are float64, NaN where nothing was measured; counts are nullable Int64, `grad_state` is categorical. Rows come in the
        order of the model. By default a statistic is what torch would say: NaN if any element is NaN, and so on.

        Args:
            statistic: A column of the tidy frame, such as "grad_norm". None for all.
            parameters: Glob patterns over names and aliases: an alias finds its row.
            steps: By step number, end excluded: `slice(100, 200)`.
            aliases: Show a tied row under each of its names.
            by: "layer" merges the rows of one module, a number those that share so many name components.
            finite: Leave non-finite elements out.

        Returns:
            Index (`step`, `parameter`) and a column for each statistic, `lr` and `grad_state`; or index `step` and a column for each
            row. With `by`, `parameter` is called `layer` or `block`.

        Raises:
            ParamWatchError: An unknown statistic (the nearest are named), patterns that fit no row, an argument that makes no sense.
        """
        return frames.frame(self._epochs(), statistic, parameters=parameters, steps=steps, aliases=aliases, by=by, finite=finite)

    def histograms(self, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False) -> pd.DataFrame:
        """How many elements were in each bin, where `attach(..., histograms=N)` asked for it: a line for each bin that is not empty.

        The bins are one for each sign and power of two, and zero: a positive one holds what is at least `low` and below `high`, a negative
        one mirrors it. The outermost have no end, and what is not finite is in none. Histograms add up: over rows, steps and runs.

        Args:
            parameters: As for `frame`.
            steps: As for `frame`.
            aliases: As for `frame`.

        Returns:
            Index (`step`, `parameter`, `kind`: param, grad, update), columns `low`, `high` and `count`, from the lowest bin to the highest.

        Raises:
            ParamWatchError: As for `frame`.
        """
        contents = self._read()
        epochs: Sequence[Source] = contents.epochs or [NoSteps(self._inventory())]
        return frames.histograms_frame(epochs, contents.lines["histograms"], parameters=parameters, steps=steps, aliases=aliases)

    @property
    def parameters(self) -> pd.DataFrame:
        """The rows of the model as it is, or was last: index `parameter`."""
        return frames.parameters_frame(self._inventory())

    @property
    def model(self) -> str:
        """Class name of the watched module."""
        return self._inventory().model

    @property
    def steps(self) -> pd.DataFrame:
        """What is known of each step as a whole, with totals over its rows: index `step`."""
        return frames.steps_frame(self._epochs())

    @property
    def ties(self) -> Ties:
        """The names that share a tensor, or memory: a tuple, with a `frame`."""
        return Ties(self._inventory().ties)

    @property
    def findings(self) -> pd.DataFrame:
        """What the rules said: step, rule, parameter, message."""
        return frames.findings_frame(self._read().findings)

    def __repr__(self) -> str:
        """Where it is, what was recorded of it, and what was missing: rows without a gradient or an optimizer, skipped steps.

        A long run is thinned when it is stored, and what is said is of the steps that are. Of these no number is read.
        """
        epochs = self._read().epochs
        try:
            inventory = epochs[-1].inventory if epochs else self._inventory()
        except ParamWatchError:
            return f"<{type(self).__name__} {self.path or 'in memory'}: no steps yet>"
        numbers = np.unique(np.concatenate([epoch.step for epoch in epochs])) if epochs else np.zeros(0, np.int64)
        tally = Tally()
        for epoch in epochs:
            tally.add(epoch.block((), per_row=("stepped", "grad_state"), keys=("skipped",)))
        first, last = (int(numbers[0]), int(numbers[-1])) if len(numbers) else (0, 0)
        return self._described(tally.absence(inventory), len(numbers), first, last, "stored")

    def _described(self, absence: Absence, steps: int, first: int, last: int, which: str, failed: bool = False) -> str:
        rows, names, frozen = len(absence.inventory.rows), len(absence.inventory.names), len(absence.frozen)
        more = ", ".join([f"{names:,} names"] * (names > rows) + [f"{frozen:,} frozen"] * (frozen > 0))
        span = f" ({first} to {last})" if steps > 1 else ""
        said = [absence.inventory.model, counted(rows, "row") + (f" ({more})" if more else "")]
        said += [f"{counted(steps, 'step')}{span}" if steps else "no steps yet"]
        said += [f"{absence.skipped:,} skipped ({absence.skipped_steps()})"] * (absence.skipped > 0)
        # what came after a failure of ours nobody knows
        remarks = ["recording stopped after a failure"] if failed else absence.wrong(which) if steps else []
        return f"<{type(self).__name__} {self.path or 'in memory'}: {'; '.join([', '.join(said), *remarks])}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the latest step, the ties, and what the rules said."""
        contents = self._read()
        return run_html(repr(self), contents.epochs[-1] if contents.epochs else None, self.ties, contents.findings)

    def _read(self) -> Contents:
        """Everything that was recorded until now."""
        return read(self._folder)

    def _inventory(self) -> Inventory:
        """The model as it is now."""
        epochs = self._read().epochs
        if not epochs and self.path is None:
            raise ParamWatchError("a copy of a Watch without a log_dir holds nothing: its records stayed with the Watch itself")
        if not epochs:
            raise ParamWatchError(
                f"{self.path} holds no whole step: its writer was stopped before the first was on disk, or is about to write it"
            )
        return epochs[-1].inventory

    def _epochs(self) -> Sequence[Source]:
        return self._read().epochs or [NoSteps(self._inventory())]


class Runs:
    """Several runs side by side: the frames of `Run`, with `run` as first index level. Iterates over the runs.

    Args:
        runs: Label -> run. `load` labels a run with the path that was asked for, or with its own where that path holds several.

    Raises:
        ParamWatchError: There are no runs.
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        if not runs:
            raise ParamWatchError("no runs were named")
        self._runs = dict(runs)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the runs are called in the index."""
        return tuple(self._runs)

    def frame(
        self,
        statistic: str | None = None,
        *,
        parameters: str | Sequence[str] = "*",
        steps: slice | None = None,
        aliases: bool = False,
        by: By = "parameter",
        finite: bool = False,
    ) -> pd.DataFrame:
        """As `Run.frame`; a row or statistic that a run does not have is NaN in it."""
        return self._joined(lambda run: run.frame(statistic, parameters=parameters, steps=steps, aliases=aliases, by=by, finite=finite))

    def histograms(self, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False) -> pd.DataFrame:
        """As `Run.histograms`."""
        return self._joined(lambda run: run.histograms(parameters=parameters, steps=steps, aliases=aliases))

    @property
    def parameters(self) -> pd.DataFrame:
        """As `Run.parameters`."""
        return self._joined(lambda run: run.parameters)

    @property
    def steps(self) -> pd.DataFrame:
        """As `Run.steps`."""
        return self._joined(lambda run: run.steps)

    @property
    def findings(self) -> pd.DataFrame:
        """As `Run.findings`."""
        return self._joined(lambda run: run.findings)

    def __getitem__(self, label: str) -> Run:
        return self._runs[label]

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        return f"<Runs: {len(self)} runs>\n" + "\n".join(f"  {label}: {run!r}" for label, run in self._runs.items())

    def _joined(self, read: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        return pd.concat({label: read(run) for label, run in self._runs.items()}, names=["run"])


_LOOKED_FOR = "a run is a folder with files called *.rows.arrow, as paramwatch.attach(net, log_dir) writes them under log_dir/paramwatch"


def _checked(path: object) -> str:
    """A path as users give it, as text."""
    given = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(given, str):
        raise ParamWatchError(f"load takes a path (str or pathlib.Path) or a list of paths, not {path!r}")
    if not given or "\0" in given:
        raise ParamWatchError(f"load takes the path of a folder, not {given!r}; load('.') reads the run below the working folder")
    return given


def _labelled(path: Path) -> dict[str, Run]:
    runs = _below(path)
    if not runs:
        raise ParamWatchError(f"there is no run in {path}: {_LOOKED_FOR}" if path.exists() else f"{path} does not exist")
    return {str(path) if len(runs) == 1 else str(run.path): run for run in runs}


def _below(path: Path) -> list[Run]:
    """The run in a folder, or else those in the folders below."""
    found = [Run(Path(folder)) for folder, _, files in sorted(os.walk(path)) if any(file.endswith(".rows.arrow") for file in files)]
    return found[:1] if found and found[0].path == path else found
