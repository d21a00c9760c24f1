"""The command line: what may be asked of a run that was written, or is being written, without a line of Python.

The outermost reader. Here are the arguments, the errors and the exit codes; what each command says is made by the module it names. They are
loaded when a command is chosen, so that `--help` answers at once, and none of them loads torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramwatch.guard import ParamWatchError
from paramwatch.output import STANDARD_OUTPUT, check, opened, writing
from paramwatch.usage import parsed

if TYPE_CHECKING:
    import argparse

    from paramwatch.run import Run

FINE, NOTHING, INTERRUPTED, BROKEN_PIPE = 0, 1, 130, 141
_LONGEST = 1000
"""Characters of an error, or of a finding."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code.
    """
    closed = sys.stdout is None
    if closed:
        # what is printed there fails when it is flushed; a command that prints nothing does not notice
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        with writing(STANDARD_OUTPUT):
            try:
                given = parsed(_COMMANDS, arguments)
                code: int = given.command(given)
            finally:
                # also after `--help`: at exit it would be too late to say that it failed
                sys.stdout.flush()
    except ParamWatchError as error:
        return _failed(str(error))
    except BrokenPipeError:
        # whoever read has seen enough; the interpreter would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if closed and error.errno == errno.EBADF:
            sys.stdout = None  # as it was
            return _failed("standard output is closed")
        return _failed(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _failed(message: str) -> int:
    from paramwatch.lettering import visible
    from paramwatch.terminal import Terminal

    said = visible(" ".join(message[: 2 * _LONGEST].split()))
    Terminal(sys.stderr).print([f"paramwatch: {said if len(said) <= _LONGEST else said[:_LONGEST] + '…'}"])
    return NOTHING


# ---- the commands ---------------------------------------------------------------------------


def _summary(given: argparse.Namespace) -> int:
    from paramwatch.digest import SECTIONS, sections
    from paramwatch.lettering import visible
    from paramwatch.terminal import Progress, Terminal

    found = []
    with Progress("reading") as progress:
        for section in sections(_run(given.run).still()):
            found.append(section)
            progress.at(len(found) / len(SECTIONS))
    if given.json:
        return _print_json({section.key: section.data for section in found})
    terminal = Terminal()
    for i, section in enumerate(found):
        terminal.print([""] * (i > 0) + [terminal.paint(section.title, "bold")])
        terminal.print(f"  {visible(said)}" for said in section.said)
        if section.grid:
            terminal.print(f"  {line}" for line in section.grid.text(terminal.width - 2, terminal.paint))
    return FINE


def _show(given: argparse.Namespace) -> int:
    from paramwatch.listing import grid_of, listing
    from paramwatch.terminal import Progress, Terminal

    terminal = Terminal()
    chosen = {"parameters": given.parameters, "steps": given.steps, "by": given.by, "finite": given.finite, "order": given.sort}
    # drawing a million lines would take minutes
    drawn = None if given.json or not given.limit else given.limit
    # in a narrow terminal the course is short, so that there is room for numbers
    width = 8 if terminal.width < 60 and not given.json else 24
    with Progress("reading"):
        lines = listing(_run(given.run).still(), given.statistic, **chosen, drawn=drawn, width=width)
    if given.json:
        return _print_json({"statistic": given.statistic, "lines": lines})
    terminal.print(grid_of(given.statistic, given.by, lines, given.limit or len(lines)).text(terminal.width, terminal.paint))
    return FINE


def _findings(given: argparse.Namespace) -> int:
    from paramwatch.lettering import shortened, visible
    from paramwatch.terminal import Terminal

    found = _run(given.run).findings.to_dict("records")
    if given.json:
        return _print_json(found)
    said = (visible(f"step {finding['step']}, {finding['rule']}: {finding['message']}") for finding in found)
    Terminal().print(shortened(line, _LONGEST) for line in said)
    return FINE


def _tail(given: argparse.Namespace) -> int:
    from paramwatch.tail import follow
    from paramwatch.terminal import Terminal

    run = _run(given.run)
    try:
        follow(run, Terminal(), seconds=given.every, lines=given.lines, once=given.once)
    except KeyboardInterrupt:
        return FINE
    return FINE


def _export(given: argparse.Namespace) -> int:
    from paramwatch.export import export
    from paramwatch.lettering import visible
    from paramwatch.terminal import Progress, Terminal

    run, to = _run(given.run).still(), given.to
    target = Path(given.output) if given.output else Path(f"{_title(run)}.{to}")
    to_stdout = given.output == "-"
    if to_stdout and sys.stdout.isatty() and to == "parquet":
        raise ParamWatchError("Parquet is not for the eyes: name a file with -o, or send standard output to one")
    if not to_stdout:
        check(target, given.force)
    chosen = {"parameters": given.parameters, "steps": given.steps, "statistics": given.statistics or ()}
    with Progress("exporting") as progress:
        lines = export(run, None if to_stdout else target, to, **chosen, force=given.force, raw_names=given.raw_names, progress=progress.at)
    if not to_stdout:
        Terminal(sys.stderr).print([visible(f"{target}: {lines:,} lines, {target.stat().st_size:,} bytes")])
    return FINE


def _report(given: argparse.Namespace) -> int:
    from paramwatch.lettering import visible
    from paramwatch.report import report
    from paramwatch.terminal import Progress, Terminal

    run, target = _run(given.run).still(), None if given.output == "-" else Path(given.output)
    if target:
        check(target, given.force)
    with Progress("reading") as progress:
        page = report(run, progress=progress.at)
    with opened(target, given.force) as file:
        file.write(page.encode())
    if target:
        Terminal(sys.stderr).print([visible(f"{target}: {target.stat().st_size:,} bytes")])
    return FINE


def _run(path: str) -> Run:
    from paramwatch.loading import load

    runs = list(load([path]))
    if len(runs) > 1:
        listed = ", ".join(str(run.path) for run in runs[:8])
        raise ParamWatchError(f"{path} holds {len(runs)} runs, name one: {listed}{', ...' if len(runs) > 8 else ''}")
    return runs[0]


def _title(run: Run) -> str:
    """What a file of this run is called: the folder that was given to `attach`."""
    parts = [part for part in (run.path or Path()).absolute().parts[1:] if part != "paramwatch"]
    return parts[-1].lstrip(".-") or "run" if parts else "run"


def _print_json(data: Any) -> int:
    print(json.dumps(_plain(data), indent=2))
    return FINE


def _plain(data: Any) -> Any:
    """The same, as JSON has it: its numbers cannot be infinite or NaN."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


_COMMANDS = {"summary": _summary, "show": _show, "findings": _findings, "tail": _tail, "export": _export, "report": _report}
