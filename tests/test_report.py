"""The page: its numbers are those of the frames, its size is bounded, nothing in it is more than text, and a browser shows it."""

from __future__ import annotations

import io
import re
import shutil
import socket
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from written import HOSTILE, write

from paramwatch.heatmap import INFINITE, MISSING
from paramwatch.record import Finding
from paramwatch.report import report
from paramwatch.report.axes import Scale, rounds, written
from paramwatch.report.chart import Line, chart
from paramwatch.report.maps import COLUMNS, LINES, grouping, heatmaps
from paramwatch.run import Run
from paramwatch.series import recorded_steps

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# what a browser does by itself otherwise
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


class Page(HTMLParser):
    """The elements of a page, and what does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write(
        tmp_path_factory.mktemp("run"),
        steps=range(50),
        tied={"2.weight": ["4.weight"]},
        spoilt=lambda step: [1] if 20 <= step < 25 else [],
        states={3: "none"},
        findings=[Finding(20, "first_nonfinite", "0.bias", "the first NaN")],
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    names = [*HOSTILE, "m" * 1_000_000]
    findings = [Finding(1, "rule", name, f"look at {name}") for name in HOSTILE]
    return write(tmp_path_factory.mktemp("hostile"), names, range(4), findings=findings, model="</title><script>alert(1)</script>")


@pytest.fixture(scope="module")
def hostile_page(hostile: Run) -> str:
    return report(hostile)


# ---- the heat map ---------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["parameter", "layer"])
@pytest.mark.parametrize("statistic", ["grad_norm", "update_ratio"])
def test_a_heat_map_of_a_short_run_has_a_cell_for_each_number(run: Run, statistic: str, by: str) -> None:
    (found,) = heatmaps(run, [statistic], by, recorded_steps(run))  # type: ignore[arg-type]  # `by` is one of two words

    frame = run.frame(statistic, by=by).to_numpy(np.float64)  # type: ignore[call-overload]
    measured = ~np.isnan(run.frame("grad_norm", by=by, finite=True).to_numpy(np.float64))  # type: ignore[call-overload]
    expected = np.where(measured, np.where(np.isfinite(frame), frame, INFINITE), MISSING)
    np.testing.assert_allclose(found.levels.T, expected.astype(np.float32))
    known = np.where(np.isfinite(frame), frame, np.nan)
    some = ~np.isnan(known).all(0)
    np.testing.assert_array_equal(found.high[some], np.nanmax(known[:, some], 0))
    np.testing.assert_array_equal(found.low[some], np.nanmin(known[:, some], 0))
    np.testing.assert_array_equal(found.last[some], known[-1, some])
    assert np.isnan(found.high[~some]).all()
    assert found.spoilt_steps.sum() == 5


def test_a_heat_map_of_many_rows_and_steps_is_small_and_loses_no_spike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramwatch.report.maps._CELLS", 100_000)
    many = write(tmp_path, [f"p{i}" for i in range(700)], range(0, 2 * COLUMNS, 3), spoilt=lambda step: [333] if step == 600 else [])
    assert grouping(many) == "parameter"

    (found,) = heatmaps(many, ["grad_norm"], "parameter", recorded_steps(many))

    assert found.levels.shape == (LINES, 400)
    assert [name for names in found.names for name in names] == [f"p{i}" for i in range(700)]
    frame, starts = many.frame("grad_norm").to_numpy(np.float64), [int(names[0][1:]) for names in found.names]
    expected = np.maximum.reduceat(np.where(np.isnan(frame), INFINITE, frame), starts, axis=1).T
    np.testing.assert_allclose(found.levels, expected.astype(np.float32))
    assert (found.levels == INFINITE).sum() == 1


def test_lines_are_what_fits(tmp_path: Path) -> None:
    deep = write(tmp_path, [f"h.{i}.{part}.{w}" for i in range(60) for part in "abcde" for w in ("weight", "bias")], range(2))
    assert grouping(deep) == 2


# ---- the page -------------------------------------------------------------------------------


def test_the_page_has_every_part_and_its_numbers(run: Run) -> None:
    page = Page(report(run))

    assert page.open == []
    for heading in ("Watched", "Totals over all rows", "Ties", "Findings", "The layers that do worst", "Inventory", "Gradient norm"):
        assert heading in page.text
    assert "2.weight = 4.weight" in page.text
    assert f"{run.steps['grad_norm'].iloc[-1]:.4g}" in page.text
    assert page.tags.count("figure") >= 9


def test_every_picture_has_words_beside_it(run: Run) -> None:
    text = report(run)
    pictures = re.findall(r"<svg[^>]*>", text)
    assert pictures
    assert all('role="img" aria-label="' in picture or 'aria-hidden="true"' in picture for picture in pictures)
    assert text.count("<details>") == 3
    assert '<html lang="en">' in text
    assert text.count("<caption>") == text.count("<table>")


def test_names_are_nothing_but_text(hostile: Run, hostile_page: str) -> None:
    page = Page(hostile_page)

    assert page.open == []
    assert not {"script", "img", "iframe", "object", "link", "b", "base", "form", "a"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for tag, name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert (tag, value[:22]) == ("image", "data:image/png;base64,")
    assert "<script>alert(1)</script>.w" in page.text
    assert all(c == "\n" or c.isprintable() for c in page.text)


def test_the_page_forbids_everything_it_does_not_need(hostile_page: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', hostile_page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'")
    assert "script" not in policy[1]
    assert not re.search(r"https?://|@import|url\(", hostile_page)


def test_the_page_of_a_long_wide_run_is_bounded(tmp_path: Path, hostile_page: str) -> None:
    many = write(tmp_path, [f"blocks.{i}.{part}.weight" for i in range(125) for part in "abcd"], range(COLUMNS + 100))
    assert len(report(many)) < 1_500_000
    # a name of a megabyte is in it five times or more
    assert len(hostile_page) < 500_000


def test_a_run_of_one_step_and_of_none_can_be_looked_at(tmp_path: Path) -> None:
    for steps in ([0], [5]):
        assert Page(report(write(tmp_path / str(steps[0]), steps=steps))).open == []


def test_progress_rises_to_the_end(run: Run) -> None:
    shares: list[float] = []
    report(run, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] <= 1


# ---- charts and scales ----------------------------------------------------------------------


def test_a_line_breaks_where_there_is_no_number_and_marks_what_is_not_finite() -> None:
    steps, values = np.arange(10), np.arange(10.0)
    values[4:6] = np.nan
    drawn = chart("norm", [Line("a", steps, values, np.arange(10) == 4)])
    assert drawn.count("M") >= 2
    assert drawn.count('class="spoilt"') == 1
    assert len(re.findall(r'class="line" d="([^"]*)"', drawn)[0].split("M")) == 3
    assert chart("norm", [Line("a", steps, np.full(10, np.nan), np.zeros(10, bool))]) == ""


@pytest.mark.parametrize(
    "values", [[1e-300, 1e300], [0.0, 0.0], [-5.0, 5.0], [3.0, 3.0], [5e-324, 1e-320], [0.0, 1e4], [1.7e308, 1.0]], ids=str
)
def test_any_numbers_have_a_scale_with_ticks_on_it(values: list[float]) -> None:
    scale = Scale.of(np.array(values))
    shares = scale.share(np.array(values))
    assert np.isfinite(shares).all()
    assert ((shares >= 0) & (shares <= 1)).all()
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 7
    assert all(scale.low * 0.99 <= tick * 1.0001 and tick <= scale.high * 1.01 + 1e-12 for tick in ticks if scale.low > 0)


def test_round_numbers_are_round() -> None:
    assert rounds(0, 300, 8) == [0, 50, 100, 150, 200, 250, 300]
    assert [written(value) for value in (0, 0.05, 1500, 1e-7, 2.5e12)] == ["0", "0.05", "1,500", "1e-7", "2.5e12"]


# ---- in a browser ---------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to look at the page with")
def test_a_browser_shows_it_and_asks_nobody_for_anything(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            try:
                while True:
                    connection, _ = server.accept()
                    with connection:
                        asked.append(connection.recv(1000))
            except OSError:
                return

        threading.Thread(target=answer, daemon=True).start()
        lure = [f'"><img src=http://127.0.0.1:{port}/a>', f"</style><link rel=stylesheet href=http://127.0.0.1:{port}/b>.w"]
        names = [*HOSTILE, *lure, f"<script>document.title='gone';fetch('http://127.0.0.1:{port}/c')</script>.w"]
        page = tmp_path / "report.html"
        page.write_text(report(write(tmp_path / "run", names, range(40), spoilt=lambda step: [2] if step > 30 else [])), encoding="utf-8")
        own = (f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1060,2600", "--enable-logging=stderr")
        command = [str(CHROMIUM), *FLAGS, *own, f"--screenshot={tmp_path / 'page.png'}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        server.shutdown(socket.SHUT_RDWR)

    assert asked == []
    assert b"CONSOLE" not in done.stderr
    picture = Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB")
    pixels = np.asarray(picture).reshape(-1, 3)
    # the heat map's own colours are on the screen: what is not finite, and the bright end of the scale
    assert (np.abs(pixels.astype(int) - [255, 32, 64]).sum(1) < 6).sum() > 500
    assert (np.abs(pixels.astype(int) - [253, 231, 37]).sum(1) < 60).sum() > 500
