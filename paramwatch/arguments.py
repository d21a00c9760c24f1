"""What users pass to `attach`, checked once at the edge; it is trusted from there on."""

from __future__ import annotations

import operator
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from paramwatch.columns import Detail
from paramwatch.folder import is_remote
from paramwatch.guard import ParamWatchError, logger
from paramwatch.record import Sink
from paramwatch.table import as_patterns
from paramwatch.updates import UpdateMode

_LAST_STEP = 2**62
"""Step numbers are stored in 64 bits; this leaves as many again for the run."""


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `attach`, checked."""

    name: str
    every: int
    include: list[str]
    exclude: list[str]
    detail: Detail
    update: UpdateMode
    histograms: int
    uses: int
    uses_of: list[str]
    raw_gradients: bool
    max_bytes: int
    first_step: int
    sinks: list[Sink]

    @property
    def recording(self) -> dict[str, Any]:
        """The keyword arguments of `Recorder`."""
        own = {"first_step": self.first_step, "every": self.every, "update": self.update}
        return {**own, "full": self.detail == "full", "raw": self.raw_gradients, "histograms": self.histograms}

    @property
    def long(self) -> list[str]:
        """The long streams of the store that have something to take."""
        return ["histograms"] * (self.histograms > 0) + ["uses"] * (self.uses > 0)


def check_options(
    *,
    name: str,
    every: int,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    detail: Detail,
    update: UpdateMode,
    histograms: int,
    uses: int,
    uses_of: str | Sequence[str],
    raw_gradients: bool,
    max_bytes: int,
    first_step: int,
    sinks: Sequence[Sink],
) -> Options:
    """The options in their plain types.

    Raises:
        ParamWatchError: A value makes no sense.
    """
    if not isinstance(raw_gradients, bool):
        raise ParamWatchError(f"raw_gradients must be True or False, not {raw_gradients!r}")
    options = Options(
        name=_folder_name(name),
        every=_whole("every", every, 1),
        include=as_patterns("include", include),
        exclude=as_patterns("exclude", exclude),
        detail=_choice("detail", detail, get_args(Detail)),
        update=_choice("update", update, get_args(UpdateMode)),
        histograms=_whole("histograms", histograms, 0),
        uses=_whole("uses", uses, 0),
        uses_of=as_patterns("uses_of", uses_of),
        raw_gradients=raw_gradients,
        max_bytes=_whole("max_bytes", max_bytes, 1),
        first_step=_whole("first_step", first_step, 0),
        sinks=_sinks(sinks),
    )
    if options.first_step > _LAST_STEP:
        raise ParamWatchError(f"first_step must be at most 2**62, not {first_step!r}")
    if not options.uses and options.uses_of != ["tied"]:
        logger.warning(
            "paramwatch: uses_of=%r chooses rows, but with uses=0 no gradient is split; uses=100 splits each 100th step", uses_of
        )
    return options


def check_path(log_dir: str | os.PathLike[str]) -> str:
    """The path of a local folder, as it was given.

    Raises:
        ParamWatchError: It is empty, remote, or not a path at all.
    """
    given = os.fspath(log_dir) if isinstance(log_dir, str | os.PathLike) else log_dir
    if not isinstance(given, str):
        raise ParamWatchError(f"log_dir must be the path of a folder (str or pathlib.Path), not {log_dir!r}")
    if not given:
        raise ParamWatchError("log_dir is empty; pass '.' for the working folder, or None to keep the records in memory")
    if "\0" in given:
        raise ParamWatchError(f"log_dir {given!r} contains a null byte, which no folder's name can")
    if is_remote(given):
        raise ParamWatchError(f"log_dir must be a local folder, not {given!r}; write locally and copy the folder")
    return given


def check_folder(log_dir: str | os.PathLike[str], name: str) -> Path:
    """The folder of a run, made if it is not there, as an absolute path.

    Raises:
        ParamWatchError: It is no local folder, or cannot be written.
    """
    given = check_path(log_dir)
    try:
        folder = Path(given).expanduser().absolute() / "paramwatch" / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    # a home that is not known is a RuntimeError, a name that no file system takes a UnicodeError
    except (OSError, RuntimeError, UnicodeError) as error:
        raise ParamWatchError(f"log_dir {given!r} cannot be written: {error}") from error
    return folder


def _whole(argument: str, given: Any, least: int) -> int:
    """A whole number of any type, such as NumPy's."""
    try:
        value = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        value = -1
    if value < least:
        raise ParamWatchError(f"{argument} must be a whole number of at least {least}, not {given!r}")
    return value


def _choice(argument: str, given: Any, choices: tuple[Any, ...]) -> Any:
    if not isinstance(given, str) or given not in choices:
        raise ParamWatchError(f"{argument} must be one of {', '.join(map(repr, choices))}, not {given!r}")
    return given


def _folder_name(given: Any) -> str:
    if not isinstance(given, str):
        raise ParamWatchError(f"name must be a plain folder name, not {given!r}; leave it out for the only model in a folder")
    if given and (given in (".", "..") or given != Path(given).name or "\\" in given or "\0" in given):
        raise ParamWatchError(f"name must be a plain folder name, not {given!r}")
    return given


def _sinks(given: Any) -> list[Sink]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ParamWatchError(f"sinks must be a list of sinks, not {given!r}; leave it out for none")
    for sink in given:
        if isinstance(sink, type) or not isinstance(sink, Sink):
            raise ParamWatchError(f"sinks holds {sink!r}, which is no sink: a sink is an object with the methods write(record) and close()")
    return list(given)


def without_groups(optimizer: object) -> ParamWatchError:
    """What is said of an optimizer that `Watch.step` cannot know the parameters of."""
    return ParamWatchError(
        f"{type(optimizer).__name__} has no param_groups, so its parameters are not known; "
        "`with watch.step():` stands for all trainable parameters"
    )


def not_a_loss(loss: object) -> ParamWatchError:
    """What to say of something that `Watch.root` cannot look below, since it is no tensor."""
    return ParamWatchError(f"root takes the loss, a tensor, not {type(loss).__name__}")
