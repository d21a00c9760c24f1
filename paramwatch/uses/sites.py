"""Where uses were found, in which order they come, and what they are called in the frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple


class Site(NamedTuple):
    """Where a use was found."""

    kind: Literal["call", "recompute", "loss"]
    turn: int
    """Which outermost call it was, in the order in which they were made; of recomputed segments, in that of the backward pass."""
    outer: str
    """What was called there."""
    number: int
    """Of the operation, in the order of the forward pass."""
    label: str
    origin: int = -1
    """The run of the engine that recomputes it."""
    within: int = 0
    """Of a recomputed segment: which of its calls it was."""


def forward_order(site: Site) -> tuple[int, int, int, int]:
    """Sorts sites in the order of the forward pass; segments are recomputed in the reverse order."""
    if site.kind == "recompute":
        return 1, -site.turn, site.within, site.number
    return 0 if site.kind == "call" else 2, site.turn, 0, site.number


def names_of(sites: Sequence[Site]) -> list[str]:
    """The names of uses. Calls of one module are numbered within a backward pass, so that further micro-batches have the same names."""
    turns: dict[str, list[int]] = {}
    for site in sites:
        if site.kind == "call" and site.turn not in turns.setdefault(site.outer, []):
            turns[site.outer].append(site.turn)
    found, taken = [], Counter[str]()
    for site in sites:
        name = site.label
        if site.kind == "recompute":
            name = f"recompute{site.turn}:{name}"
        elif site.kind == "call" and len(turns[site.outer]) > 1:
            turn = turns[site.outer].index(site.turn)
            name = f"{name}@{turn}" if name == site.outer else f"call{turn}:{name}"
        taken[name] += 1
        found.append(name if taken[name] == 1 else f"{name}#{taken[name] - 1}")
    return found
