"""A run to read: `load` finds what was written, `Run` gives it as pandas frames.

The reading half of what `attach` returns. It also reads a run that is going on: every question looks at the files anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from paramwatch import frames, useframes
from paramwatch.absence import Absence, Tally, counted
from paramwatch.epoch import NoSteps
from paramwatch.folder import DiskFolder, Folder, MemoryFolder
from paramwatch.guard import ParamWatchError
from paramwatch.lettering import shortened, visible
from paramwatch.notebook import Ties, run_html
from paramwatch.record import Inventory
from paramwatch.store import Contents, read
from paramwatch.table import By, Source


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
        return frames.histograms_frame(*self._with("histograms"), parameters=parameters, steps=steps, aliases=aliases)

    @property
    def has_uses(self) -> bool:
        """Whether a gradient was split by use in this run."""
        return bool(self._with("uses")[1].num_rows)

    def uses(self, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False) -> pd.DataFrame:
        """What each use of a parameter contributed to its gradient, where `attach(..., uses=N)` asked for it.

        Args:
            parameters: As for `frame`.
            steps: As for `frame`.
            aliases: As for `frame`.

        Returns:
            Index (`step`, `parameter`, `use`), uses in the order of the forward pass; columns `use_norm` (in units of the gradient as the
            optimizer used it), `use_share` (signed; those of a split sum to 1), `mode` (what was kept to tell by) and `backwards` (passes
            summed over). A use called `(unattributed)` is what the others leave of the gradient, where that is more than rounding.

        Raises:
            ParamWatchError: As for `frame`, and where nothing was split.
        """
        return useframes.uses_frame(*self._with("uses"), parameters=parameters, steps=steps, aliases=aliases)

    def agreement(self, *, parameters: str | Sequence[str] = "*", steps: slice | None = None, aliases: bool = False) -> pd.DataFrame:
        """Whether the uses of a parameter pull the same way; arguments and errors as for `uses`.

        Returns:
            Index (`step`, `parameter`), columns `agreement` (mean cosine of all pairs, weighted by their norms: -1 they fight, 0 unrelated,
            +1 they agree), `coherence`, `imbalance`, `horizon`, `residual`, `unattributed` and `use_count`: docs/tied-gradients.md.
        """
        return useframes.agreement_frame(*self._with("uses"), parameters=parameters, steps=steps, aliases=aliases)

    def use_cosines(self, parameter: str, step: int) -> pd.DataFrame:
        """The cosine of every two uses of one parameter at one step: index and columns `use`.

        Raises:
            ParamWatchError: That parameter was not split at that step (the nearest is named), or its uses were not kept.
        """
        return useframes.cosines_frame(*self._with("uses"), parameter, step)

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

    def still(self) -> Run:
        """This run as it is now, for many questions at once: what is written later is not seen, and the files are looked through once."""
        return _Still(self)

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
        said = [shortened(absence.inventory.model, 80), counted(rows, "row") + (f" ({more})" if more else "")]
        said += [f"{counted(steps, 'step')}{span}" if steps else "no steps yet"]
        said += [f"{absence.skipped:,} skipped ({absence.skipped_steps()})"] * (absence.skipped > 0)
        # what came after a failure of ours nobody knows
        remarks = ["recording stopped after a failure"] if failed else absence.wrong(which) if steps else []
        return visible(f"<{type(self).__name__} {self.path or 'in memory'}: {'; '.join([', '.join(said), *remarks])}>")

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

    def _with(self, stream: str) -> tuple[Sequence[Source], Any]:
        """The epochs, and the lines of a long stream."""
        contents = self._read()
        return contents.epochs or [NoSteps(self._inventory())], contents.lines[stream]

    def _epochs(self) -> Sequence[Source]:
        return self._read().epochs or [NoSteps(self._inventory())]


class _Still(Run):
    """A run that was read."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.path)
        self._contents = run._read()

    @property
    def parameters(self) -> pd.DataFrame:
        return self._parameters.copy()

    @property
    def steps(self) -> pd.DataFrame:
        return self._steps.copy()

    @cached_property
    def _parameters(self) -> pd.DataFrame:
        return super().parameters

    @cached_property
    def _steps(self) -> pd.DataFrame:
        return super().steps

    def _read(self) -> Contents:
        return self._contents
