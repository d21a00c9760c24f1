"""What each kind of content may take of an event file, so that none crowds out another and all together stay below the bound."""

from __future__ import annotations

from collections.abc import Mapping

SHARES: Mapping[str, float] = {
    "curves": 1 / 2,
    "histograms": 1 / 4,
    "heat maps": 1 / 8,
    "distributions": 1 / 16,
    "texts": 1 / 32,
    "uses": 1 / 64,
}
"""The rest is left for the text that says what came to its end."""


class Budget:
    """Counts bytes by kind of content.

    Args:
        max_bytes: What the file may take.
    """

    def __init__(self, max_bytes: float) -> None:
        self.of = {kind: share * max_bytes for kind, share in SHARES.items()}
        """Kind -> the bytes it may take."""
        self.ended: dict[str, int] = {}
        """Kind -> the first step of which it was left out."""
        self._spent = dict.fromkeys(SHARES, 0)

    def spend(self, kind: str, size: int, step: int) -> bool:
        """Whether so many bytes may be written. Once they may not, none of this kind may any more: what is left out is the end."""
        if kind in self.ended or self._spent[kind] + size > self.of[kind]:
            self.ended.setdefault(kind, step)
            return False
        self._spent[kind] += size
        return True
