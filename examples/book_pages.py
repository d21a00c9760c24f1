"""How the stops of the tour print: a heading, a sentence on what one learns, then what there is to see."""

from __future__ import annotations

import textwrap


def lesson(title: str, learned: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")
    print(textwrap.fill(learned, 96), end="\n\n")


def say(what: str, value: object) -> None:
    print(f"{what:44} {value}")
