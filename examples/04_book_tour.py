"""A walk through the textbook's chapter on parameters, with paramwatch looking on: access, initialisation, tying, exercises.

Run one stop with `--stop access` (or `initialisation`, `tying`, `exercises`); without it all four are made.
"""

from __future__ import annotations

import argparse

from book_access import access
from book_exercises import exercises
from book_initialisation import initialisation
from book_tying import tying

STOPS = {"access": access, "initialisation": initialisation, "tying": tying, "exercises": exercises}


def main() -> None:
    parser = argparse.ArgumentParser(description="Walk through the chapter on parameters.")
    parser.add_argument("--stop", choices=STOPS, help="make this stop only")
    only = parser.parse_args().stop
    for name, stop in STOPS.items():
        if only in (None, name):
            stop()


if __name__ == "__main__":
    main()
