"""The inventory as markdown, for TensorBoard's text tab: which parameters there are, and which names share one tensor.

Names come from the user's model and may hold anything, so every character that markdown or HTML reads as more than itself is written as
an entity, and what cannot be seen (a newline, a direction mark) as its escape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from paramwatch.record import Inventory
from paramwatch.schedule import Schedule
from paramwatch.tensorboard.budget import Budget
from paramwatch.tensorboard.digest import Digest
from paramwatch.tensorboard.tugs import MOST_TUGS, MOST_USES

MOST_ROWS = 500
"""Rows shown of a table; a text tab that holds more is not read, and is slow to draw."""


def ties_text(inventory: Inventory) -> str:
    """The tie groups as a markdown table, or the sentence that there are none."""
    ties = inventory.ties
    if not ties:
        return "No ties: no two names lead to the same tensor or the same memory."
    parts = [
        _table(
            ("names", "kind", "elements", "bytes saved"),
            ((" = ".join(map(_text, tie.names)), tie.kind, f"{tie.numel:,}", f"{tie.bytes_saved:,}") for tie in ties[:MOST_ROWS]),
        )
    ]
    if len(ties) > MOST_ROWS:
        parts.append(f"{len(ties) - MOST_ROWS:,} of {len(ties):,} tie groups are left out.")
    if any(tie.kind == "storage" for tie in ties):
        parts.append(
            "`storage`: separate parameters on one piece of memory. This is not tying: their gradients are not summed, and an optimizer "
            "that holds them updates that memory once for each."
        )
    return "\n\n".join(parts)


def inventory_text(inventory: Inventory) -> str:
    """The rows as a markdown table, one line for each distinct tensor."""
    rows = inventory.rows
    numel, names = sum(row.numel for row in rows), len(inventory.names)
    parts = [
        f"{_text(inventory.model)}: {len(rows):,} parameters under {names:,} names, {numel:,} elements, tied ones counted once.",
        _table(
            ("parameter", "also known as", "module type", "shape", "dtype", "elements", "trainable"),
            (
                (
                    _text(row.name),
                    ", ".join(map(_text, row.aliases)),
                    _text(row.module_type),
                    " x ".join(map(str, row.shape)) or "scalar",
                    _text(row.dtype),
                    f"{row.numel:,}",
                    "yes" if row.trainable else "no",
                )
                for row in rows[:MOST_ROWS]
            ),
        ),
    ]
    if len(rows) > MOST_ROWS:
        parts.append(f"{len(rows) - MOST_ROWS:,} of {len(rows):,} parameters are left out.")
    return "\n\n".join(parts)


def contents_text(digest: Digest, budget: Budget) -> str:
    """What the file beside this text shows, and what it leaves out."""
    what, rare = "every parameter under each of its names", digest.schedules["histograms"]
    if digest.curves.blocks:
        what = (
            "blocks of parameters, those below one name or from one neighbour to another (`layers.0..1`); a tied parameter is counted in "
            "each block in which it has a name"
        )
    parts = [
        f"Curves are of all parameters together, `(all)`, and of {what}. {_points(digest.schedules['curves'])}",
        "What is not a number is drawn as triangles, what is infinite as a gap; zero has no update ratio and no curve of it.",
        "`(log10 of each)` is over the parameters that stepped, each counted once: the decimal logarithm of what the curves show. It "
        "leaves out those of which that is zero or not finite, which have no logarithm. " + _points(digest.schedules["distributions"]),
        "`(heat map)` has a line for each parameter, or for neighbouring ones where there are many, and covers every step since this "
        "session began or the names last changed. Of what shares a line or a column the greatest is shown, and before all else what is "
        "not finite. It is drawn anew ever less often, and when the run ends.",
        "Histograms of elements, where they were asked for, are of the same parameters or blocks as the curves: `param/...`, `grad/...` "
        f"and `update/...`, the first {2 * rare.base}, then ever fewer. A tensor without a finite element has none.",
        "`agreement/...` and `use_share/...`, where `uses=N` asked for them, say whether the uses of a parameter pull the same way (+1), "
        f"are unrelated (0) or fight (-1), and the share of each: of {MOST_TUGS} parameters at most, and of at most {MOST_USES} uses.",
        *(f"**{kind.capitalize()} end before step {step:,}: their share of this file is full.**" for kind, step in budget.ended.items()),
        "Everything is in the store beside this file: `paramwatch.load` reads it.",
    ]
    return "\n\n".join(parts)


def _points(schedule: Schedule) -> str:
    return (
        f"A point for every step below {2 * schedule.base:,}; from there on the distance between points doubles each time the step number "
        "doubles."
    )


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _text(name: str) -> str:
    visible = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
    # A space beside another space or at an end would be lost in HTML.
    return re.sub(r"[^\w. ]|_|(?<= ) |^ | $", lambda found: f"&#{160 if found[0] == ' ' else ord(found[0])};", visible)
