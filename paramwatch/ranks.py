"""Which of several processes this is, where a model is trained by several."""

from __future__ import annotations

from torch import distributed


def rank() -> int:
    """0 where there is one process."""
    return distributed.get_rank() if _has_begun() else 0


def is_one_of_several() -> bool:
    """Whether other processes train the same model."""
    return _has_begun() and distributed.get_world_size() > 1


def _has_begun() -> bool:
    return distributed.is_available() and distributed.is_initialized()
