"""The round that is open: opened by the first of its steps that is measured, published when it is complete, or closed.

Between `recorder`, which measures, and whoever takes the rounds. Apart from steps a round takes what else was noticed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paramwatch.inventory import LiveInventory
from paramwatch.others import Others
from paramwatch.outside import Outside
from paramwatch.rounds import Round


class OpenRound:
    """At most one at a time.

    Args:
        live: The rows, and what became of them.
        others: The rows that no optimizer steps.
        publish: Takes it once nothing is added any more.
    """

    def __init__(self, live: LiveInventory, others: Others, publish: Callable[[Round], None]) -> None:
        self._live, self._others, self._publish = live, others, publish
        self._changed = Outside().changed
        self._now: Round | None = None

    def at(self, number: int, entered: float, context: Mapping[str, Any]) -> Round:
        """That of this step; opened, if there is none.

        Args:
            number: Of the step.
            entered: When it was.
            context: What Lightning knows of it.
        """
        if self._now is None:
            self._now = Round(number, entered, self._live.current, dict(context), self._changed)
        else:
            self._now.inventory = self._live.current
            self._now.steps.update(context)
        if self._live.changed.apart or self._live.changed.lost:
            apart, lost = self._live.changed.take()
            self._now.apart, self._now.lost = [*self._now.apart, *apart], [*self._now.lost, *lost]
        if self._others.measured:
            self._now.take(self._others.take())
        return self._now

    def close(self, but: int | None = None) -> None:
        """Publish what was measured of it; the rest will be added to the same step.

        Args:
            but: Leave it open if it is that of this step.
        """
        opened = self._now
        if opened is not None and opened.step != but:
            self._now = None
            self._publish(opened)
