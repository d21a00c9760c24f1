"""The curves of gradients that were split by use: whether the uses of a parameter agree, and the share of each.

Beside `curves`, for the few steps at which something is split.
"""

from __future__ import annotations

from collections.abc import Mapping

from paramwatch import agreement
from paramwatch.record import Split

MOST_TUGS, MOST_USES = 64, 16
"""Parameters with curves, and uses with curves of their own: a cell that is called at a hundred times has its agreement alone."""


def tugs_of(uses: Mapping[str, Split]) -> dict[str, float]:
    """Tag -> value, as in the frames; what is not known is not drawn.

    Args:
        uses: As in `Record.uses`.
    """
    found: dict[str, float] = {}
    for name, split in list(uses.items())[:MOST_TUGS]:
        found[f"agreement/{name}"] = agreement.statistics(split)["agreement"]
        if len(split.uses) <= MOST_USES:
            shares = zip(split.uses, agreement.shares(split).tolist(), strict=True)
            found |= {f"use_share/{name}/{use}": share for use, share in shares}
    known = {tag: value for tag, value in found.items() if value == value}
    return {tag.encode(errors="backslashreplace").decode(): value for tag, value in known.items()}
