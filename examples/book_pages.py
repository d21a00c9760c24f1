"""How the stops of the tour print: a heading, a sentence on what one learns, then what there is to see.

Everything fits the terminal; its width is asked for each time, and taken for 60 at least and 100 at most.
"""

from __future__ import annotations

import shutil
import textwrap

import pandas as pd


def width() -> int:
    return min(max(shutil.get_terminal_size().columns, 60), 100)


def lesson(title: str, learned: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")
    tell(learned)
    print()


def tell(text: object, indent: str = "") -> None:
    """A paragraph."""
    print(textwrap.fill(str(text), width(), initial_indent=indent, subsequent_indent=indent and indent + "  ", break_on_hyphens=False))


def say(what: str, value: object, column: int | None = None) -> None:
    """A name and what there is to see under it, from a column on; what does not fit goes on below."""
    line = f"{what:{column or width() // 2 + 4}} {value}"
    print(textwrap.fill(line, width(), subsequent_indent="    ", break_on_hyphens=False))


def show(table: pd.DataFrame, digits: int = 4) -> None:
    """A table; if it is too wide, its last columns come below the first ones."""
    lines = table.to_string(float_format=f"{{:.{digits}g}}".format, line_width=width()).splitlines()
    print(*(line.rstrip() for line in lines), sep="\n")
