"""How the stops of the tour print: a heading, a sentence on what one learns, then what there is to see."""

from __future__ import annotations

import shutil
import textwrap

WIDTH = min(shutil.get_terminal_size().columns, 96)


def lesson(title: str, learned: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")
    print(textwrap.fill(learned, WIDTH), end="\n\n")


def say(what: str, value: object) -> None:
    print(f"{what:44} {value}")
