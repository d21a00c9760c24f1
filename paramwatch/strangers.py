"""Optimizers of other models: every step in the process comes by here, and most of what is asked of one's own is not asked of theirs.

Beside `plan`, which does the same for the optimizers of this model.
"""

from __future__ import annotations

import weakref

from torch.optim import Optimizer

from paramwatch.inventory import LiveInventory


class Strangers:
    """Those that were seen to hold nothing of a model.

    Args:
        live: The model.
    """

    def __init__(self, live: LiveInventory) -> None:
        self._live = live
        self._known: dict[int, tuple[weakref.ref[Optimizer], tuple[int, ...], int]] = {}

    def know(self, optimizer: Optimizer, ids: tuple[int, ...]) -> bool:
        """Whether it holds nothing of the model now: it holds the same as then, and the model is as it was.

        Args:
            optimizer: About to step.
            ids: The identities of what it holds.
        """
        known = self._known.get(id(optimizer))
        if known is None or known[0]() is not optimizer or known[1] != ids or known[2] != self._live.readings:
            return False
        # that one of the model's tensors changes its shape makes this optimizer no less a stranger
        return not self._live.sight.waits and self._live.sight.is_there()

    def add(self, optimizer: Optimizer, ids: tuple[int, ...]) -> None:
        """It holds nothing of the model, which has just been looked at."""
        self._known = {key: known for key, known in self._known.items() if known[0]() is not None}
        self._known[id(optimizer)] = weakref.ref(optimizer), ids, self._live.readings
