"""Rounds that are alike, put together into a batch: for many at once what `assemble` does for one, and it is the specification.

Alike are rounds in which the same optimizers stepped the same rows of one inventory, and the same was measured of them; nearly all rounds
of most runs are. Then what differs are numbers alone, and they are put into arrays for all rounds at once: for a small model the cost of a
record is the number of operations, not of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from paramwatch.alike import Form, Handed
from paramwatch.batch import Batch
from paramwatch.record import Inventory
from paramwatch.rounds import Round

MOST = 512
"""Rounds in a batch."""
MOST_BYTES = 4_000_000
"""Of readings in a batch, as many as a processor's caches hold: more at once would be no quicker."""

_FORMS = 8


class Batching:
    """Finds what can be put together. It is shown every round, in order."""

    def __init__(self) -> None:
        self._inventory: Inventory | None = None
        self._last = -1
        self._forms: list[Form] = []

    def alike(self, rounds: Sequence[Handed]) -> int:
        """How many of these, from the first on, make a batch; 0 if the first one does not, and has to be assembled by itself.

        The first round of an inventory never does, nor do the further parts of a step that came in several. To be asked once for each.
        """
        first = rounds[0][0]
        known, last = first.inventory is self._inventory, self._last
        self._inventory, self._last = first.inventory, first.step
        if not known or first.step <= last:
            return 0
        form = self._form(first)
        if form is None:
            return 0
        n = 1
        for done, _ in rounds[1 : at_once(first.inventory)]:
            if done.step <= self._last or not form.fits(done):
                break
            self._last = done.step
            n += 1
        return n

    def batch(self, rounds: Sequence[Handed]) -> Batch:
        """Put together what is alike."""
        return self._forms[0].batch(rounds)

    def _form(self, done: Round) -> Form | None:
        """The form of a round, which becomes the first in the list."""
        for i, form in enumerate(self._forms):
            if form.fits(done):
                if i:
                    self._forms.insert(0, self._forms.pop(i))
                return form
        form = Form(done)
        if not form.fits(done):
            return None
        self._forms = [form, *(other for other in self._forms if other.inventory is done.inventory)][:_FORMS]
        return form


def at_once(inventory: Inventory) -> int:
    """How many rounds make a batch at most."""
    return max(1, min(MOST, MOST_BYTES // (inventory.bytes_a_round or 1)))
