"""An exported run reads back as the frame, to the bit; a file is whole or not there; no cell is taken for a formula."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from written import HOSTILE, write

from paramwatch import export as exporting
from paramwatch import frames
from paramwatch.block import Block
from paramwatch.columns import Array, Statistic
from paramwatch.export import export
from paramwatch.guard import ParamWatchError
from paramwatch.output import check
from paramwatch.run import Run
from paramwatch.terminal import Progress, Terminal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write(
        tmp_path_factory.mktemp("run"), spoilt=lambda step: [1] if step == 4 else [], states={2: "none"}, tied={"2.weight": ["4.weight"]}
    )


def frame_of(file: Path) -> pd.DataFrame:
    """As `Run.frame` has it."""
    table = pd.read_parquet(file)
    return table.astype({"parameter": table["parameter"].dtype}).sort_values(["step", "parameter"]).set_index(["step", "parameter"])


@pytest.mark.parametrize("lines", [3, 50, 1 << 19])
def test_parquet_holds_the_frame_to_the_bit_in_pieces_of_any_size(run: Run, tmp_path: Path, lines: int) -> None:
    expected = run.frame()

    assert export(run, tmp_path / "run.parquet", "parquet", lines=lines) == len(expected)

    found = frame_of(tmp_path / "run.parquet")
    assert [*found.index] == [*expected.index]
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True), check_exact=True)
    for name in expected.columns[expected.dtypes == np.float64]:
        np.testing.assert_array_equal(found[name].to_numpy().view(np.int64), expected[name].to_numpy().view(np.int64))
    metadata = pq.read_metadata(tmp_path / "run.parquet")
    largest = max(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    assert largest <= max(lines, 40)


def test_parquet_is_sorted_by_parameter_and_compressed_byte_by_byte(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "run.parquet", "parquet")

    group = pq.read_metadata(tmp_path / "run.parquet").row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert "BYTE_STREAM_SPLIT" in columns["grad_norm"].encodings
    table = pd.read_parquet(tmp_path / "run.parquet")
    assert list(dict.fromkeys(table["parameter"])) == list(run.parameters.index)
    assert all(steps.is_monotonic_increasing for _, steps in table.groupby("parameter", observed=True)["step"])


def test_only_what_is_asked_for_is_computed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: set[str] = set()
    compute = frames.compute

    def counted(block: Block, asked: Sequence[Statistic], finite: bool) -> dict[str, Array]:
        # the empty frame that gives the columns their order costs nothing
        computed.update(each.name for each in asked if len(block.step))
        return compute(block, asked, finite)

    monkeypatch.setattr(frames, "compute", counted)
    export(run, tmp_path / "some.csv", "csv", statistics=["lr", "grad_norm"])

    assert computed == {"grad_norm"}


def test_columns_rows_and_steps_are_chosen(run: Run, tmp_path: Path) -> None:
    chosen = {"parameters": ["*.bias", "4.weight"], "steps": slice(10, 30, 5), "statistics": ["lr", "grad_norm"]}
    export(run, tmp_path / "some.csv", "csv", lines=3, **chosen)  # type: ignore[arg-type]

    found = pd.read_csv(tmp_path / "some.csv")
    assert list(found.columns) == ["step", "parameter", "grad_norm", "lr"]
    assert sorted(set(found["parameter"])) == ["0.bias", "2.weight", "6.bias"]
    assert sorted(set(found["step"])) == [10, 15, 20, 25]
    expected = run.frame("grad_norm")
    for line in found.itertuples():
        assert line.grad_norm == pytest.approx(expected.loc[line.step, line.parameter], rel=1e-15, nan_ok=True)


def test_what_is_not_there_is_said_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ParamWatchError, match="no statistic 'grad_nrom' here; nearest: 'grad_norm'"):
        export(run, tmp_path / "a.csv", "csv", statistics=["grad_nrom"])
    with pytest.raises(ParamWatchError, match="no parameter fits"):
        export(run, tmp_path / "a.csv", "csv", parameters="nobody")
    assert list(tmp_path.iterdir()) == []


def test_a_step_range_without_steps_gives_a_header_alone(run: Run, tmp_path: Path) -> None:
    assert export(run, tmp_path / "none.csv", "csv", steps=slice(1000, None), statistics=["lr"]) == 0
    assert (tmp_path / "none.csv").read_text() == '"step","parameter","lr"\n'
    export(run, tmp_path / "none.parquet", "parquet", steps=slice(1000, None))
    assert len(pd.read_parquet(tmp_path / "none.parquet")) == 0


@pytest.mark.parametrize("raw", [False, True])
def test_names_in_csv_come_back_and_are_no_formulas(tmp_path: Path, raw: bool) -> None:
    signs = "=+-@\uff1d\uff0b\uff0d\uff20\t\r\n"
    hidden = [" =1+1", "\ufeff@a", "  \ufeff -1"]
    names = [*HOSTILE, *(f"{sign}1+1" for sign in signs), *hidden]
    run = write(tmp_path / "run", names, range(2))
    export(run, tmp_path / "names.csv", "csv", raw_names=raw, statistics=["lr"])

    with open(tmp_path / "names.csv", newline="", encoding="utf-8") as file:
        found = list(dict.fromkeys(line["parameter"] for line in csv.DictReader(file)))
    if raw:
        assert found == names
    else:
        assert found[-len(hidden) :] == [f"'{name}" for name in hidden]
        plain = found[: -len(hidden)]
        assert [name.removeprefix("'") if name[:2] in {f"'{c}" for c in signs} else name for name in plain] == names[: -len(hidden)]
        assert not any(name.startswith(tuple(signs)) for name in found)


def test_names_in_parquet_are_what_they_are(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [*HOSTILE, "m" * 1_000_000], range(2))
    export(run, tmp_path / "names.parquet", "parquet", statistics=["lr"])
    assert list(dict.fromkeys(pd.read_parquet(tmp_path / "names.parquet")["parameter"])) == [*HOSTILE, "m" * 1_000_000]


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.csv"
    file.write_text("mine")
    with pytest.raises(ParamWatchError, match="exists; --force replaces it"):
        export(run, file, "csv")
    with pytest.raises(ParamWatchError, match="is a folder"):
        export(run, tmp_path, "csv", force=True)
    assert file.read_text() == "mine"
    export(run, file, "csv", force=True)
    assert file.read_text().startswith('"step"')
    assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]


def test_what_is_left_in_the_middle_leaves_no_file(run: Run, tmp_path: Path) -> None:
    def interrupted(share: float) -> None:
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "run.parquet", "parquet", lines=40, progress=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_a_device_stays_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("there.csv")
    export(run, tmp_path / "link.csv", "csv", force=True)
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "there.csv").read_text().startswith('"step"')
    export(run, Path("/dev/null"), "csv")
    assert Path("/dev/null").is_char_device()


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_after_two_seconds_and_wiped_at_the_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERM", raising=False)
    screen, now = Screen(), [0.0]
    shares: list[float] = []

    def at(share: float) -> None:
        shares.append(share)
        now[0] += 0.5
        progress.at(share)

    with Progress("exporting", clock=lambda: now[0], terminal=Terminal(screen)) as progress:
        export(run, tmp_path / "run.csv", "csv", lines=20, progress=at)
    drawn = screen.getvalue().split("\r")[1:]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(drawn) == len(shares) - 3 + 1
    assert "exporting" in drawn[0]
    assert "left" in drawn[0]
    assert drawn[-1] == "\x1b[K"


def test_without_a_terminal_there_is_no_progress() -> None:
    stream, now = io.StringIO(), [0.0]
    with Progress("exporting", clock=lambda: now[0], terminal=Terminal(stream)) as progress:
        now[0] = 60.0
        progress.at(0.5)
    assert stream.getvalue() == ""


def test_a_piece_is_no_longer_than_it_may_be() -> None:
    assert exporting.LINES * 32 * 8 <= 150_000_000


def test_a_folder_that_is_missing_and_a_link_to_itself_are_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ParamWatchError, match=r"there is no folder .*missing"):
        check(tmp_path / "missing" / "report.html", False)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "report.html")
    with pytest.raises(ParamWatchError, match=r"there is no folder .*gone"):
        check(tmp_path / "dangling", True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    if sys.version_info < (3, 13):
        with pytest.raises(ParamWatchError, match="a link to itself"):
            check(tmp_path / "loop", False)
