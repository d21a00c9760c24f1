"""The code in the README and in docs runs, prints what it is said to print, and the tables agree with the code."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from paramwatch.cli import main
from paramwatch.columns import EXTRA_COLUMNS, LAYOUTS, STATISTICS, statistics_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if any(kind == "python" for kind, _ in blocks(page))], ids=lambda page: page.name)
def test_code_blocks_run_and_print_what_follows_them(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # tables fit the terminal, whatever it is here
    monkeypatch.setenv("COLUMNS", "80")
    names: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for kind, text in blocks(page):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec"), names)
            printed = out.getvalue()
        elif kind == "console":
            run_console(text)
        elif kind == "text" and printed:
            assert_same_output(printed, text)
            printed = ""


def run_console(text: str) -> None:
    """The commands after `$`, in this process; each prints what follows it."""
    for command, shown in re.findall(r"^\$ paramwatch (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            assert main(shlex.split(command)) == 0, out.getvalue()
        assert_same_output(still(out.getvalue()), still(shown))


def still(text: str) -> str:
    """Without what differs from run to run: times, sizes, and bars that stand between two heights."""
    for changing in (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:Z| UTC)", r"[\d.,]+(?= (?:s|µs|bytes)\b)", r"[▁-█]+"):
        text = re.sub(changing, "#", text)
    return text


def assert_same_output(printed: str, shown: str) -> None:
    """The same words; the same numbers but for the last digit, which may differ from one processor to another."""
    assert words(printed) == words(shown), printed
    assert numbers(printed) == pytest.approx(numbers(shown), rel=2e-3, abs=1e-9)


def words(text: str) -> list[str]:
    return NUMBER.sub("#", text).split()


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


def test_comparison_of_output_can_fail() -> None:
    with pytest.raises(AssertionError):
        assert_same_output("norm 1.25", "norm 1.35")


def test_every_statistic_is_explained_with_its_formula_and_unit() -> None:
    page = (ROOT / "docs" / "statistics.md").read_text()
    for statistic in STATISTICS.values():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{statistic.name}` |"))
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        detail = next(detail for detail, layout in LAYOUTS.items() if statistic in statistics_of(layout))
        assert cells == [f"`{statistic.name}`", statistic.formula, statistic.unit, detail]
    for column in EXTRA_COLUMNS:
        assert f"| `{column}` |" in page


def test_file_tree_in_the_readme_is_the_real_one() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## Where things are")[1].split("```")[1]
    modules = {path.name for path in (ROOT / "paramwatch").glob("*.py")} | {"measure/", "report/", "tensorboard/", "uses/"}
    shown = {line.split()[0] for line in tree.splitlines() if line.startswith("    ") and line.strip()}
    assert shown == modules


def test_version_is_in_the_changelog() -> None:
    import paramwatch

    assert f"## {paramwatch.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_what_a_page_says_is_tried_in_a_test_is_there() -> None:
    for page in PAGES:
        for file, name in re.findall(r"`([a-z_]+): ([a-z_]+)`", page.read_text(encoding="utf-8")):
            assert f"\ndef {name}(" in (ROOT / "tests" / f"test_{file}.py").read_text(encoding="utf-8"), f"{page.name}: {file}: {name}"
    assert "`truth_plain: accumulated`" in (ROOT / "docs" / "steps.md").read_text(encoding="utf-8")
