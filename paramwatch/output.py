"""A file that appears under its name only when it is whole: what the command line writes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from paramwatch.guard import ParamWatchError

STANDARD_OUTPUT = "standard output"

_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What writing fails with, and the system does not say where."""


@contextmanager
def writing(name: str, instead: Path | None = None) -> Iterator[None]:
    """What cannot be written in here is called by this name.

    Args:
        name: What someone asked for.
        instead: What is written first.

    Raises:
        OSError: As it was, with a name.
    """
    try:
        yield
    except OSError as error:
        if (error.errno in _LOST and error.filename is None) or (instead and error.filename == str(instead)):
            raise OSError(error.errno, os.strerror(error.errno or 0), name) from error
        raise


@contextmanager
def opened(target: Path | None, force: bool) -> Iterator[IO[bytes]]:
    """A file to write to; left by an exception, nothing of it stays.

    Args:
        target: Its name, None for standard output.
        force: Replace a file that is there.

    Raises:
        ParamWatchError: As `check`.
        OSError: It cannot be written.
    """
    if target is None:
        with writing(STANDARD_OUTPUT):
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        return
    check(target, force)
    # behind a link is what is meant; a device or a pipe has to stay what it is
    target = target.resolve()
    if target.exists() and not target.is_file():
        with writing(str(target)), open(target, "wb") as file:
            yield file
        return
    part = target.with_name(f".{target.name[:200]}.{os.getpid()}.part")
    try:
        with writing(str(target), part):
            with open(part, "xb") as file:
                yield file
            check(target, force)
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def check(target: Path, force: bool) -> None:
    """Whether a file may be written.

    Raises:
        ParamWatchError: There is one, and it is not to be replaced; or it is a folder, or in one that is not there.
    """
    try:
        # behind a link is what is meant
        folder = target.resolve().parent
    except (OSError, RuntimeError) as error:
        # up to Python 3.12 links in a circle are a RuntimeError
        raise ParamWatchError(f"{target} cannot be written: it is a link to itself, or cannot be followed") from error
    if not folder.is_dir():
        raise ParamWatchError(f"{target} cannot be written: there is no folder {folder}")
    if target.is_dir():
        raise ParamWatchError(f"{target} is a folder; name a file")
    if not force and target.is_file():
        raise ParamWatchError(f"{target} exists; --force replaces it")
