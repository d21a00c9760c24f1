"""What is drawn of a step, and of which steps: its curves, the distributions over the parameters, the histograms of their elements.

Between the batches and the event file, for one inventory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paramwatch import bins
from paramwatch.batch import Batch
from paramwatch.columns import ABSENT, Array
from paramwatch.merging import merge
from paramwatch.record import Inventory, Split
from paramwatch.schedule import Schedule
from paramwatch.tensorboard import messages
from paramwatch.tensorboard.budget import Budget
from paramwatch.tensorboard.curves import DISTRIBUTION, Curves
from paramwatch.tensorboard.histograms import MOST_BUCKETS, of_elements, of_magnitudes
from paramwatch.tensorboard.norms import Norms, among_of
from paramwatch.tensorboard.tugs import tugs_of

MAX_BASES = {"curves": 512, "distributions": 32, "histograms": 32, "uses": 512}
"""The schedules' bases are at most these: every step is drawn up to twice the number. Loaders keep 1000 samples of a curve and at least 100
of a histogram."""

_FORMS = 16
_BUCKET, _BUCKETS = 16, 50
"""Bytes, and how many a histogram of elements has, about."""
_USES = 2000
"""Bytes of what is drawn of a split, about."""


class Digest:
    """What is drawn of the steps of one inventory.

    Args:
        inventory: What is drawn.
        budget: What is left for it.
        before: What was drawn until now: histograms and splits are counted on.
    """

    def __init__(self, inventory: Inventory, budget: Budget, before: Digest | None = None) -> None:
        self.curves = Curves.of(inventory)
        self.sizes = {
            "curves": self.curves.event_bytes(),
            "distributions": len(self.curves.lines) * (MOST_BUCKETS * _BUCKET + 100),
            "histograms": 3 * sum(_BUCKETS * _BUCKET + len(name.encode()) for name in self.curves.names),
            "uses": _USES,
        }
        """Of what one step may have, in bytes: at most, or about for histograms."""
        # a power of two so small keeps of anything a few
        self.schedules = {kind: Schedule(size, budget.of[kind], MAX_BASES[kind], min_base=4) for kind, size in self.sizes.items()}
        """Of histograms and splits by their number, since not every step has any; of the others by the step's."""
        self._forms: dict[bytes, messages.Form] = {}
        self._numbered: dict[str, tuple[int, int]] = before._numbered if before else dict.fromkeys(("histograms", "uses"), (-1, -1))

    def of(
        self, batch: Batch, norms: Norms, histograms: Mapping[str, Array], uses: Mapping[str, Split]
    ) -> dict[int, list[tuple[str, bytes]]]:
        """Of each step that any schedule keeps, by its position in the batch: the parts of its event, and of which kind each is.

        Args:
            batch: The steps.
            norms: Of its rows.
            histograms: Those of the batch's only step, as in `Record.histograms`.
            uses: The same, as in `Record.uses`.
        """
        found: dict[int, list[tuple[str, bytes]]] = {}
        for kind, draw in (("curves", self._curves), ("distributions", self._distributions)):
            if which := self.schedules[kind].chosen(batch.step):
                for i, part in zip(which, draw(batch.at(which), norms.at(which)), strict=True):
                    if part:
                        found.setdefault(i, []).append((kind, part))
        at = batch.step[0], batch.time[0]
        if histograms and self._is_due("histograms", at[0]) and (part := messages.histograms(*at, self._histograms(batch, histograms))):
            found.setdefault(0, []).append(("histograms", part))
        if uses and self._is_due("uses", at[0]) and (part := messages.scalars(*at, tugs_of(uses))):
            found.setdefault(0, []).append(("uses", part))
        return found

    def _curves(self, batch: Batch, norms: Norms) -> list[bytes]:
        """Of each step the event of its curves. Most steps draw the same ones: these are made at once."""
        values, drawn = self.curves.values(batch, norms)
        if (drawn == drawn[0]).all():
            return self._form(drawn[0]).filled(batch.step, batch.time, values[:, drawn[0]])
        alike: dict[bytes, list[int]] = {}
        for i, shown in enumerate(drawn):
            alike.setdefault(shown.tobytes(), []).append(i)
        events = [b""] * len(batch)
        for which in alike.values():
            shown = drawn[which[0]]
            steps, times = [batch.step[i] for i in which], [batch.time[i] for i in which]
            for i, event in zip(which, self._form(shown).filled(steps, times, values[np.ix_(which, shown)]), strict=True):
                events[i] = event
        return events

    def _form(self, drawn: Array) -> messages.Form:
        """For events in which these of the curves are drawn."""
        key = drawn.tobytes()
        if key not in self._forms:
            if len(self._forms) == _FORMS:
                self._forms.clear()
            self._forms[key] = messages.Form([tag for tag, shown in zip(self.curves.tags(), drawn.tolist(), strict=True) if shown])
        return self._forms[key]

    def _distributions(self, batch: Batch, norms: Norms) -> list[bytes]:
        """Of each step the event of its distributions over the rows."""
        among, lines = among_of(batch), norms.lines
        found = of_magnitudes(
            np.concatenate([value for value, _ in lines.values()]), np.concatenate([known & among for _, known in lines.values()])
        )
        # line by line, and in each step by step
        n, tags = len(batch), [f"{name}/{DISTRIBUTION}" for name in lines]
        values = messages.histogram_values([tag for tag in tags for _ in range(n)], found)
        return [messages.histograms(*at, values[i::n]) for i, at in enumerate(zip(batch.step, batch.time, strict=True))]

    def _is_due(self, kind: str, step: int) -> bool:
        """Whether what not every step has is drawn: that goes by how many there were before."""
        number, last = self._numbered[kind]
        if step > last:
            self._numbered[kind] = number + 1, step
        return self.schedules[kind].keeps(self._numbered[kind][0])

    def _histograms(self, batch: Batch, found: Mapping[str, Array]) -> list[bytes]:
        """The histograms of the rows or blocks that have curves: `kind/name`."""
        out: list[bytes] = []
        for kind, counts in found.items():
            axis = batch.inventory.kinds.index(kind)
            parts = {part: array[0, axis] for part, array in batch.values.items()}
            if self.curves.blocks:
                parts = merge(parts | {"count": np.where(counts[:, 0] < 0, ABSENT, parts["count"])}, self.curves.blocks)
                counts = bins.merged(counts, *self.curves.in_blocks)
            named = self.curves.positions
            low, high, mean, rms = (parts[part][named].astype(np.float64) for part in ("min", "max", "mean", "rms"))
            if (kind, "mean") not in batch.inventory.layout:
                mean = np.full(len(named), np.nan)
            tags = (f"{kind}/{name}" for name in self.curves.names)
            out += messages.histogram_values(tags, of_elements(counts[named], low, high, mean, rms))
        return out
