"""`load` finds what was written: one run, or several side by side."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, overload

import pandas as pd

from paramwatch.folder import is_remote
from paramwatch.guard import ParamWatchError
from paramwatch.run import Run
from paramwatch.table import By

PathLike: TypeAlias = str | os.PathLike[str]


@overload
def load(path: PathLike) -> Run: ...
@overload
def load(path: list[str] | list[Path] | tuple[PathLike, ...]) -> Runs: ...
def load(path: PathLike | list[str] | list[Path] | tuple[PathLike, ...]) -> Run | Runs:
    """Read a run that was written, or is still being written.

    Args:
        path: The `log_dir` of a run, the folder in it that holds the run, or any folder with one run below it. A list of such paths, or
            a glob pattern such as "runs/*", gives `Runs`: every run below any of them. A type checker, which cannot tell a pattern from a
            path, takes a str for one run; write `load(["runs/*"])` for it.

    Raises:
        ParamWatchError: There is no run; or there are several below a path that was to be one.
    """
    if isinstance(path, Iterable) and not isinstance(path, str | bytes | os.PathLike):
        return Runs({label: run for each in path for label, run in _all(_checked(each)).items()})
    where = _checked(path)
    if _is_pattern(where):
        return Runs(_all(where))
    runs = list(_labelled(Path(where)).values())
    if len(runs) > 1:
        listed = "\n".join(f"  {run.path}" for run in runs)
        raise ParamWatchError(f"{where} holds {len(runs)} runs. Load one of these, or all of them with load([{where!r}]):\n{listed}")
    return runs[0]


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

    def uses(self, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False) -> pd.DataFrame:
        """As `Run.uses`; each run must have some."""
        return self._joined(lambda run: run.uses(parameters=parameters, steps=steps, aliases=aliases))

    def agreement(self, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False) -> pd.DataFrame:
        """As `Run.agreement`; each run must have some."""
        return self._joined(lambda run: run.agreement(parameters=parameters, steps=steps, aliases=aliases))

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
    if is_remote(given) and not os.path.lexists(given):
        raise ParamWatchError(f"{given} is no local folder: copy the run here, and load the copy")
    return given


def _is_pattern(where: str) -> bool:
    return glob.has_magic(where) and not os.path.lexists(where)


def _all(where: str) -> dict[str, Run]:
    """The runs below a path, or below whatever a pattern matches."""
    if not _is_pattern(where):
        return _labelled(Path(where))
    found = {label: run for match in sorted(glob.glob(where)) if _below(Path(match)) for label, run in _labelled(Path(match)).items()}
    if not found:
        raise ParamWatchError(f"no run matches {where}: {_LOOKED_FOR}")
    return found


def _labelled(path: Path) -> dict[str, Run]:
    runs = _below(path)
    if not runs:
        raise ParamWatchError(f"there is no run in {path}: {_LOOKED_FOR}" if path.exists() else f"{path} does not exist")
    return {str(path) if len(runs) == 1 else str(run.path): run for run in runs}


def _below(path: Path) -> list[Run]:
    """The run in a folder, or else those in the folders below."""
    found = [Run(Path(folder)) for folder, _, files in sorted(os.walk(path)) if any(file.endswith(".rows.arrow") for file in files)]
    return found[:1] if found and found[0].path == path else found
