"""The parameters that no optimizer holds: measured at the first step, at step numbers that are powers of two, and at close.

A frozen base must cost what its adapters cost, so at all other steps it is not read.
"""

from __future__ import annotations

import torch

from paramwatch.inventory import LiveInventory
from paramwatch.measure import measure
from paramwatch.measure.histograms import histograms
from paramwatch.rounds import Measured


class Others:
    """Measures them when they are due, for the next round that is opened.

    Args:
        live: The rows.
        first_step: Number of the first step.
    """

    def __init__(self, live: LiveInventory, first_step: int) -> None:
        self.measured: list[Measured] = []
        self._live = live
        self.due = first_step
        """The number of the step at which they are measured next."""

    def look(self, number: int, binned: bool) -> None:
        """Measure if it is time.

        Args:
            number: Of the step that is entered.
            binned: With histograms.
        """
        if number >= self.due:
            with torch.no_grad():
                self.measure(number, binned)

    def measure(self, number: int, binned: bool = False) -> None:
        """Measure now."""
        self._live.refresh(number)
        tensors = self._live.tensors(number)
        idle = [i for i, row in enumerate(self._live.current.rows) if not row.owned]
        self.due = 1 << number.bit_length()
        if idle and tensors:
            names, chosen = [self._live.current.rows[i].name for i in idle], [tensors[i] for i in idle]
            self.measured = [Measured("param", names, measure(chosen), histograms(chosen) if binned else None)]

    def take(self) -> list[Measured]:
        """What was measured since it was last taken."""
        taken, self.measured = self.measured, []
        return taken
