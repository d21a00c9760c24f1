"""A trainer's loggers: the folder of the first, where the records go, and the totals of a step, which go to each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from paramwatch.folder import is_remote
from paramwatch.guard import Guard, logger


def folder_of(trainer: Any) -> str | None:
    """Where the first logger of a trainer writes; None: nowhere."""
    loggers = [each for each in trainer.loggers if type(each).__name__ != "DummyLogger"]
    if not loggers or getattr(trainer, "barebones", False):
        return None
    first = loggers[0]
    log_dir: str | os.PathLike[str] | None = getattr(first, "log_dir", None)
    if log_dir:
        return os.fspath(log_dir)
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    save_dir = first.save_dir if first.save_dir is not None else trainer.default_root_dir
    # as text, since a path object takes a slash from an address
    return os.path.join(save_dir, str(first.name), version)


def local(trainer: Any, folder: str | None) -> str | None:
    """The folder, unless it is an address, where nothing can be written."""
    if folder is None or not is_remote(folder):
        return folder
    if trainer.is_global_zero:
        logger.warning(
            "paramwatch: the logger's folder %s is not a local one, so nothing is written and the records stay in memory; "
            "pass ParamWatch(log_dir=...) a local folder to keep them",
            folder,
        )
    return None


class Outlets:
    """Each logger under a guard of its own: what one of them cannot take is no matter of the others."""

    def __init__(self) -> None:
        self._guards: dict[int, Guard] = {}

    def log(self, trainer: Any, metrics: Mapping[str, float], step: int) -> None:
        """Give these to every logger of a trainer."""
        for each in trainer.loggers:
            name = type(each).__name__
            guard = self._guards.setdefault(id(each), Guard(f"No more totals go to {name}; recording and training go on.", _nothing))
            if not guard.failed:
                with guard.contain(f"logging totals to {name}"):
                    each.log_metrics(dict(metrics), step=step)


def _nothing() -> None:
    pass
