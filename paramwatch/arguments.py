"""What users pass to `attach`, checked once at the edge; it is trusted from there on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import get_args

from paramwatch.columns import Detail
from paramwatch.guard import ParamWatchError
from paramwatch.recorder import UpdateMode

_NOT_YET = {"histograms": "histograms are", "uses": "splitting tied gradients by use is"}


def check_options(*, every: int, detail: str, update: str, histograms: int, uses: int, max_bytes: int, first_step: int) -> None:
    """Raise `ParamWatchError` for a value that makes no sense."""
    for name, value, least in (
        ("every", every, 1),
        ("histograms", histograms, 0),
        ("uses", uses, 0),
        ("first_step", first_step, 0),
        ("max_bytes", max_bytes, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ParamWatchError(f"{name} must be a whole number of at least {least}, not {value!r}")
    for name, value in (("histograms", histograms), ("uses", uses)):
        if value:
            raise ParamWatchError(f"{_NOT_YET[name]} not in this version; leave {name}=0")
    for name, choice, choices in (("detail", detail, get_args(Detail)), ("update", update, get_args(UpdateMode))):
        if choice not in choices:
            raise ParamWatchError(f"{name} must be one of {', '.join(map(repr, choices))}, not {choice!r}")


def check_folder(log_dir: str | os.PathLike[str], name: str) -> Path:
    """The folder of a run, made if it is not there, as an absolute path.

    Raises:
        ParamWatchError: It is remote, or cannot be written; or `name` is not a plain folder name.
    """
    given = os.fspath(log_dir)
    if "://" in given:
        raise ParamWatchError(f"log_dir must be a local folder, not {given!r}; write locally and copy the folder")
    if name and (name in (".", "..") or name != Path(name).name or "\\" in name or "\0" in name):
        raise ParamWatchError(f"name must be a plain folder name, not {name!r}")
    folder = Path(given).expanduser().absolute() / "paramwatch" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ParamWatchError(f"log_dir {given!r} cannot be written: {error}") from error
    return folder
