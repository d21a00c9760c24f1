"""The address of a good first view in TensorBoard, which a folder of runs cannot choose by itself."""

from __future__ import annotations

from urllib.parse import quote

FIRST_TAGS = r"(grad_norm|update_ratio)/\("
"""Of these two statistics the total, the heat map and the distribution, whatever else was logged."""


def first_view(server: str = "http://localhost:6006/") -> str:
    """Where to look first: nothing smoothed, which would hide a spike of one step, and what shows a whole model at once."""
    return f"{server}?smoothing=0&tagFilter={quote(FIRST_TAGS, safe='')}#timeseries"
