"""Which parameters of a large model share a curve: modules, and runs of neighbours where modules are too many.

Beside `curves`. A model is taken apart where most of its parameters are: a stack of 12 layers into its layers, and one of 96, beside
which there are an embedding and a head, into runs of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from paramwatch.record import Inventory

LEAST_SHARE = 8
"""What of a model would have fewer curves than this stays in one piece: a few layers in halves are of no use to anybody."""

_Names: TypeAlias = Sequence[tuple[tuple[str, ...], int]]
"""The components of some names, and the rows that bear them."""


def blocks_of(inventory: Inventory, most: int) -> dict[str, tuple[int, ...]]:
    """The rows of at most so many blocks, in order; a tied row is in each block in which it has a name.

    A block has the name of what is below it, or of the first and the last of a run: `layers.0..1`, which no module can be called.
    """
    names = [(tuple(name.split(".")), row) for name, row in inventory.names]
    return {block: tuple(dict.fromkeys(row for _, row in members)) for block, members in _apart(names, 0, most).items()}


def _apart(names: _Names, depth: int, most: int) -> dict[str, _Names]:
    """Some names, alike in so many components, in at most so many pieces."""
    found: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    for each in names:
        found.setdefault(".".join(each[0][: depth + 1]), []).append(each)
    if len(found) > most:
        return _runs(found, -(-len(found) // most))
    pieces: dict[str, _Names] = {}
    for name, members in found.items():
        share = 1 + (most - len(found)) * len(members) // len(names)
        pieces |= _apart(members, depth + 1, share) if len(members) > 1 and share >= LEAST_SHARE else {name: members}
    return pieces


def _runs(found: dict[str, list[tuple[tuple[str, ...], int]]], length: int) -> dict[str, _Names]:
    """So many neighbours each taken together."""
    names, runs = list(found), dict[str, _Names]()
    for i in range(0, len(names), length):
        first, *others = names[i : i + length]
        name = f"{first}..{others[-1].rpartition('.')[2]}" if others else first
        runs[name] = [each for member in (first, *others) for each in found[member]]
    return runs
