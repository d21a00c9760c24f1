"""All tables of benchmarks/README.md: runs the tests of the timed code, then the benchmarks, and writes the tables between the markers.

python benchmarks/all.py [--only NAME ...] [--skip-tests] [--print] [--tiny]

While one of those tests is red nothing is timed. Where there is no GPU its last table stays as it is. It takes half an hour; on a machine
where nothing else runs.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path

from reporting import arguments, heading, refuse_if_red

README = Path(__file__).parent / "README.md"

TABLES = (
    *("monitored_step", "contestants", "kernel", "growth", "store", "frames", "event_file", "uses", "summary_rows"),
    *("gpu_bandwidth", "gpu_step"),
)


def put(name: str, lines: list[str], text: str) -> str:
    """The text with these lines between the markers of a table."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"{README.name} has no place marked {start.strip()}")
    return pattern.sub(lambda _: start + "\n".join(lines) + "\n" + end, text)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", choices=TABLES)
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    benchmarks = {name: importlib.import_module(name) for name in options.only or TABLES}
    tested = not (options.skip_tests or options.tiny)
    if tested:
        refuse_if_red(dict.fromkeys(test for benchmark in benchmarks.values() for test in benchmark.TESTS))
    for name, benchmark in benchmarks.items():
        started = time.monotonic()
        print(f"{name} ...", flush=True)
        found = benchmark.table(tiny=options.tiny)
        if found is None:
            print("not run: no GPU")
            continue
        lines = [*heading(tested), *found]
        print("\n".join(lines), f"\n({time.monotonic() - started:.0f} s)", flush=True)
        if not (options.print or options.tiny):
            README.write_text(put(name, lines, README.read_text()))


if __name__ == "__main__":
    main()
