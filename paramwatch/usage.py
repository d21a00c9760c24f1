"""What may be typed after `paramwatch`: the commands, their arguments, and the texts of `--help`.

Beside `cli`, which does what was asked. It loads nothing but `argparse`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import paramwatch

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

Command: TypeAlias = Callable[[argparse.Namespace], int]

FORMATS = ("parquet", "csv")
ORDERS = ("model", "name", "last", "median", "min", "max", "change")
"""What lines of a listing can be sorted by: their order in the model, their name, or a number, the largest first."""

_ABOUT = """\
See what every parameter and gradient of a PyTorch model did, at every optimizer step.

RUN is the folder that was given to paramwatch.attach(net, "runs/first"), or a folder above it
that holds one run. It can be read while it is being written."""

_EXAMPLES = """\
examples:
  paramwatch summary runs/first
  paramwatch show runs/first grad_norm --parameters 'encoder.*' --steps 1000:
  paramwatch tail runs/first
  paramwatch report runs/first -o report.html
  paramwatch export runs/first -o first.parquet --statistics grad_norm update_ratio

exit codes: 0 fine; 1 no such run, or nothing in it matches; 2 a wrong argument."""


def parsed(commands: Mapping[str, Command], arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was typed; `command` in it is the function to call with it.

    Raises:
        SystemExit: With 0 after `--help` and `--version`, with 2 after an error, which is said in one line.
    """
    parser = _parser(commands)
    given = parser.parse_args(arguments)
    if hasattr(given, "to"):
        ending = PurePath(given.output or "").suffix[1:].lower()
        given.to = given.to or (ending if ending in FORMATS else None)
        if given.to is None:
            given.parser.error("which format? Say --to parquet, --to csv, or -o with a file name that ends so")
    return given


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        # argparse lets pass that it fails
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        if message.endswith(("expected one argument", "expected at least one argument")):
            message += "; one that begins with - is written with =, as in --steps=-3:"
        said = " ".join(ascii(message[:1000])[1:-1].replace("\\'", "'").split())
        self.exit(2, f"paramwatch: {said} (see {self.prog} --help)\n")


def _parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = _Parser(
        "paramwatch", description=_ABOUT, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"paramwatch {paramwatch.__version__}")
    added = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, about: str, more: str, *examples: str) -> argparse.ArgumentParser:
        epilog = "\n".join(["example:" if len(examples) == 1 else "examples:", *(f"  paramwatch {name} {example}" for example in examples)])
        made = added.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}. {more}",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.add_argument("run", metavar="RUN", help="folder of a run")
        made.set_defaults(command=commands[name], parser=made)
        return made

    made = command("summary", "what was watched, and how it stands", _SUMMARY, "runs/first", "runs/first --json")
    made.add_argument("--json", action="store_true", help="print everything as JSON")

    made = command("show", "one statistic of every parameter, with its course", _SHOW, *_SHOW_EXAMPLES)
    made.add_argument("statistic", metavar="STATISTIC", help="such as grad_norm, param_std, update_ratio, lr, grad_state")
    _which(made)
    made.add_argument("--by", type=_by, default="parameter", metavar="WHAT", help="layer: merge each module's rows; 2: first two names")
    made.add_argument("--finite", action="store_true", help="leave NaN and infinite elements out")
    made.add_argument("--sort", choices=ORDERS, default="model", help="order of the lines; numbers come largest first")
    made.add_argument("--limit", type=_natural, default=100, metavar="N", help="lines to print, 0 for all (default: 100)")
    made.add_argument("--json", action="store_true", help="print all lines as JSON")

    made = command("findings", "what was noticed, a line each", "Nothing is printed where there was nothing.", "runs/first")
    made.add_argument("--json", action="store_true", help="print them as JSON")

    made = command("tail", "a run while it trains", _TAIL, "runs/first", "runs/first --once -n 1")
    made.add_argument("--once", action="store_true", help="print the latest steps and end")
    made.add_argument("--every", type=_seconds, default=1.0, metavar="SECONDS", help="how often to look (default: 1)")
    made.add_argument("-n", "--lines", type=_natural, default=10, metavar="N", help="earlier steps to begin with (default: 10)")

    made = command("export", "a run as one Parquet or CSV file", _EXPORT, *_EXPORT_EXAMPLES)
    made.add_argument("--to", choices=FORMATS, help="format (default: as the name of the file ends)")
    made.add_argument("-o", "--output", metavar="FILE", help="- is standard output (default: the run's name, in this folder)")
    _which(made)
    made.add_argument("--statistics", nargs="+", metavar="NAME", help="columns (default: all)")
    made.add_argument("--raw-names", action="store_true", help="CSV: no apostrophe before names that begin with = + - @")
    made.add_argument("--force", action="store_true", help="replace a file that is there")

    made = command("report", "a run as one page to look at", _REPORT, "runs/first -o report.html")
    made.add_argument("-o", "--output", metavar="FILE", default="report.html", help="- is standard output (default: report.html)")
    made.add_argument("--force", action="store_true", help="replace a file that is there")
    return parser


_SUMMARY = """Model, steps and time; totals; ties; the
worst layers and the best; skipped steps; NaN and infinities; findings."""

_SHOW = """A line for each parameter, or
for each layer: last, median, least and greatest value over the recorded steps, and the change from
the first quarter of them to the last. A bar is the largest value of its steps; × stands for NaN or
infinity. Names are matched by glob patterns, and an alias finds its tensor."""

_SHOW_EXAMPLES = (
    "runs/first grad_norm",
    "runs/first update_ratio --by layer --sort max --limit 10",
    "runs/first param_std --parameters 'encoder.*' '*.bias' --steps 1000:2000 --finite",
)

_TAIL = """In a terminal a table of totals and layers, the worst
first, that is drawn anew; elsewhere a line for each new step. Ctrl-C ends it, and not the training."""

_EXPORT = """The lines of Run.frame(), sorted by
parameter and step. The file appears when it is whole. In CSV a name that a spreadsheet would take
for a formula gets an apostrophe before it."""

_EXPORT_EXAMPLES = ("runs/first --to parquet", "runs/first -o gradients.csv --statistics grad_norm grad_state --steps :1000")

_REPORT = """Heat maps, charts, ties, inventory and
findings in one HTML file that needs no network, no script and nothing beside it."""


def _which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parameters", nargs="+", default="*", metavar="GLOB", help="patterns over names and aliases, such as 'encoder.*'")
    parser.add_argument("--steps", type=_steps, metavar="A:B", help="by step number, end excluded: 100:200, 1000:, :50, 0:1000:10, 7")


def _steps(text: str) -> slice:
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not all(part == "" or _is_whole(part) for part in parts) or text == "":
        counted = "; steps go by their number, and none is negative" if "-" in text else ""
        raise argparse.ArgumentTypeError(f"{_quoted(text)} is no range of step numbers, such as 100:200, 1000:, :50 or 7{counted}")
    if len(parts) == 1:
        return slice(int(text), int(text) + 1)
    start, stop, stride = (int(part) if part else None for part in [*parts, ""][:3])
    if stride == 0:
        raise argparse.ArgumentTypeError(f"{_quoted(text)}: the stride must be 1 or more")
    return slice(start, stop, stride)


def _by(text: str) -> str | int:
    if text in ("parameter", "layer"):
        return text
    if _is_whole(text) and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{_quoted(text)}: say parameter, layer, or how many leading components of a name (1 or more)")


def _natural(text: str) -> int:
    if _is_whole(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{_quoted(text)}: say how many, a whole number of 0 or more")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if 0.05 <= seconds <= 86400:
        return seconds
    raise argparse.ArgumentTypeError(f"{_quoted(text)}: say how many seconds, 0.05 or more")


def _is_whole(text: str) -> bool:
    # longer ones are no step numbers
    return text.isascii() and text.isdigit() and len(text) <= 18


def _quoted(text: str) -> str:
    return ascii(text[:100])
