"""The command line says what the frames say, ends as people expect, and shows no name as anything but a name."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from records import inventory
from written import HOSTILE, record_of, write

from paramwatch.cli import main
from paramwatch.grid import Grid
from paramwatch.record import Finding
from paramwatch.run import Run
from paramwatch.store import DiskFolder, Store
from paramwatch.tail import screen
from paramwatch.terminal import Progress, Terminal, duration

COMMAND = (sys.executable, "-m", "paramwatch")
DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write(
        tmp_path_factory.mktemp("run"),
        steps=range(60),
        tied={"2.weight": ["4.weight"]},
        spoilt=lambda step: [1] if step == 40 else [],
        states={3: "none"},
        skipped=[7],
        findings=[Finding(40, "first_nonfinite", "0.bias", "the first NaN")],
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    names = [*HOSTILE, "m" * 1_000_000 + "\x1b[31m"]
    findings = [Finding(1, "rule\x1b[2J", name, f"look at {name}") for name in names]
    tied = {HOSTILE[0]: [HOSTILE[5]], names[-1]: [HOSTILE[6]]}
    return write(
        tmp_path_factory.mktemp("hostile"), names, range(3), findings=findings, tied=tied, model="<b>\x1b[31mNet" + "t" * 1_000_000
    )


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "30")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


# ---- what is said ---------------------------------------------------------------------------


def test_summary_says_what_was_watched_and_how_it_stands(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "summary", run.path)
    for expected in (
        "Net: 5 rows (6 names), 20 elements",
        "60 recorded steps (0 to 59)",
        "2.weight = 4.weight",
        "not finite in 1 step",
        "1 step of 60 skipped by the GradScaler: 7",
        "the first NaN",
    ):
        assert expected in said
    assert max(map(len, said.splitlines())) <= 110


def test_summary_in_json_has_the_numbers_of_the_frames(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "summary", run.path, "--json"))
    assert found["totals"]["grad_norm"]["last"] == run.steps["grad_norm"].iloc[-1]
    assert found["watched"]["steps"] == 60
    assert found["findings"] == run.findings.to_dict("records")


def test_show_has_a_line_for_each_row_with_the_numbers_of_the_frame(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "show", run.path, "grad_norm", "--json"))
    frame = run.frame("grad_norm")

    assert [line["name"] for line in found["lines"]] == list(frame.columns)
    for line in found["lines"]:
        values = frame[line["name"]].to_numpy(np.float64)
        known = values[np.isfinite(values)]
        if len(known):
            assert [line["last"], line["min"], line["max"]] == [known[-1], known.min(), known.max()]
            assert line["median"] == pytest.approx(np.median(known), rel=1e-12)
            assert line["change"] == pytest.approx(np.nanmedian(values[-15:]) / np.nanmedian(values[:15]), rel=1e-12)
        else:
            assert line["last"] is line["median"] is line["change"] is None
        assert line["nonfinite_steps"] == (line["name"] == "0.bias")


def test_a_narrow_terminal_has_room_for_numbers_and_a_pipe_for_all_columns(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert printed(capsys, "show", run.path, "grad_norm").split("\n")[0].split()[:3] == ["parameter", "trend", "last"]
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "__stdout__", None)
    assert printed(capsys, "show", run.path, "grad_norm").split("\n")[0].endswith("change  not finite")


def test_what_is_said_of_names_of_a_megabyte_are_short_lines(hostile: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("findings", "summary"):
        assert max(map(len, printed(capsys, command, hostile.path).splitlines())) <= 1000


def test_a_bar_goes_on_while_nobody_says_how_far_it_is() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    with Progress("reading", clock=iter(range(1000)).__next__, terminal=Terminal(screen)):
        while "reading" not in screen.getvalue():
            time.sleep(0.01)
    assert screen.getvalue().endswith("\r\x1b[K")


def test_show_chooses_rows_steps_groups_and_order(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--parameters", "?.weight", "--steps", "10:20", "--by", "layer", "--sort", "max")
    found = json.loads(printed(capsys, "show", run.path, "param_norm", *chosen, "--json"))["lines"]
    expected = run.frame("param_norm", parameters="?.weight", steps=slice(10, 20), by="layer").max().sort_values(ascending=False)
    assert [line["name"] for line in found] == list(expected.index)
    assert [line["max"] for line in found] == list(expected)

    lines = printed(capsys, "show", run.path, "param_norm", "--limit", "2").splitlines()
    assert lines[0].split() == ["parameter", "trend", "last", "median", "min", "max", "change"]
    assert lines[1].startswith("0.weight")
    assert lines[3:] == ["… and 3 more lines; --limit 0 shows all"]
    alias = printed(capsys, "show", run.path, "param_norm", "--parameters", "4.weight", "--steps", "5")
    assert alias.splitlines()[1].startswith("2.weight")


def test_show_of_states_counts_them(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "show", run.path, "grad_state").splitlines()
    assert [line.split() for line in lines[1:]] == [
        [name, state, state, "60"] for name, state in zip(run.parameters.index, ["used"] * 3 + ["none", "used"], strict=True)
    ]


def test_findings_are_a_line_each(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "findings", run.path) == "step 40, first_nonfinite: the first NaN\n"
    assert json.loads(printed(capsys, "findings", run.path, "--json"))[0]["parameter"] == "0.bias"


def test_export_and_report_write_files_and_say_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run.path), "--to", "csv"]) == 0
    assert main(["report", str(run.path)]) == 0
    said = capsys.readouterr()
    name = run.path.parent.name if run.path else ""
    assert said.out == ""
    assert f"{name}.csv: 300 lines" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{name}.csv", "report.html"])
    assert main(["report", str(run.path)]) == 1
    assert capsys.readouterr().err == "paramwatch: report.html exists; --force replaces it\n"


# ---- while it trains ------------------------------------------------------------------------


def test_tail_once_prints_the_latest_steps(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "tail", run.path, "--once", "-n", "3").splitlines()
    assert [line.split()[1] for line in lines] == ["57", "58", "59"]
    pairs = dict(re.findall(r"(\w+) (\S+)", lines[-1]))
    assert float(pairs["grad_norm"]) == pytest.approx(run.steps["grad_norm"].iloc[-1], rel=1e-5)
    assert "nonfinite 3" not in lines[-1]
    assert printed(capsys, "tail", run.path, "--once", "-n", "0") == ""


def test_tail_follows_a_run_that_grows_until_it_is_interrupted(tmp_path: Path) -> None:
    inv = inventory("a.w", "b.w")
    store = Store(DiskFolder(tmp_path / "paramwatch"), max_bytes=10**9)
    store.write(record_of(0, inv))
    store.flush()
    following = subprocess.Popen(
        [*COMMAND, "tail", str(tmp_path), "--every", "0.05"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert following.stdout is not None
        for step in range(4):
            assert following.stdout.readline().startswith(f"step {step} ")
            store.write(record_of(step + 1, inv))
            store.flush()
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=DEADLINE_SECONDS)
    finally:
        following.kill()
        following.wait()
        store.close()
    assert (following.returncode, errors) == (0, "")


def test_tail_in_a_terminal_draws_a_table_and_gives_the_screen_back(run: Run) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
    following = subprocess.Popen(
        [*COMMAND, "tail", str(run.path), "--every", "0.1"], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    seen, deadline = "", time.monotonic() + DEADLINE_SECONDS
    try:
        while seen.count("Ctrl-C") < 2 and time.monotonic() < deadline:
            seen += os.read(ours, 65536).decode(errors="replace")
        following.send_signal(signal.SIGINT)
        while following.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        seen += os.read(ours, 65536).decode(errors="replace")
    finally:
        following.kill()
        following.wait()
        os.close(ours)
    assert following.returncode == 0
    assert seen.startswith("\x1b[?1049h\x1b[?25l")
    assert seen.rstrip().endswith("\x1b[?25h\x1b[?1049l")
    assert "layer, worst first" in seen
    assert "Traceback" not in seen


def test_tail_waits_for_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "s.0.rows.arrow").touch()
    assert "waiting for the first steps" in screen(Run(tmp_path), Terminal(io.StringIO()))[0]


def test_the_table_of_tail_fits_the_screen(run: Run, hostile: Run) -> None:
    for each in (run, hostile):
        lines = screen(each, Terminal(io.StringIO()))
        assert len(lines) < 30
        assert all(line.isprintable() for line in lines)


# ---- how it ends ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["summary", "nowhere"], 1, "nowhere does not exist"),
        (["summary", "\x1b[31m"], 1, "no run matches \\x1b[31m"),
        (["summary", ""], 1, "load takes the path of a folder"),
        (["summary", "."], 1, "there is no run in ."),
        (["show", "RUN", "grad_nrom"], 1, "there is no statistic 'grad_nrom' here; nearest: 'grad_norm'"),
        (["show", "RUN", "lr", "--parameters", "7.*"], 1, "no parameter fits '7.*'"),
        (["export", "RUN", "-o", "/nowhere/run.csv"], 1, "there is no folder /nowhere"),
        (["export", "RUN", "-o", "/dev/full", "--to", "csv"], 1, "No space left on device: /dev/full"),
        (["report", "RUN", "-o", "/dev/full"], 1, "No space left on device: /dev/full"),
        (["report", "RUN", "-o", "/proc/x.html"], 1, "No such file or directory: /proc/x.html"),
        (["summary", "s3://bucket/run"], 1, "s3://bucket/run is no local folder: copy the run here"),
        (["show", "RUN", "lr", "--steps", "-3:"], 2, "one that begins with - is written with =, as in --steps=-3:"),
        (["show", "RUN", "lr", "--steps=-3:"], 2, "none is negative"),
        (["export", "RUN"], 2, "which format?"),
        (["show", "RUN", "lr", "--steps", "a:b"], 2, "'a:b' is no range of step numbers"),
        (["show", "RUN", "lr", "--steps", "1:9:0"], 2, "the stride must be 1 or more"),
        (["show", "RUN", "lr", "--by", "0"], 2, "say parameter, layer, or how many"),
        (["tail", "RUN", "--every", "nan"], 2, "say how many seconds"),
        (["show", "RUN", "lr", "--steps", "99:"], 1, "none of those steps is recorded: the run has steps 0 to 59"),
        (["show", "RUN", "lr", "--limit", "-1"], 2, "'-1': say how many, a whole number of 0 or more"),
        (["tail", "RUN", "-n", "-1"], 2, "'-1': say how many"),
        (["export", "RUN", "--to", "x\x1b[2J\ny"], 2, "invalid choice"),
        (["show", "RUN"], 2, "STATISTIC"),
        (["dance"], 2, "invalid choice: 'dance'"),
        ([], 2, "COMMAND"),
    ],
    ids=str,
)
def test_an_error_is_one_line_and_a_code(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        ended: Any = main([str(run.path) if argument == "RUN" else argument for argument in arguments])
    except SystemExit as exit_:
        ended = exit_.code
    out, errors = capsys.readouterr()
    assert (ended, out) == (code, "")
    assert errors.startswith("paramwatch: ")
    assert said in errors
    assert errors.endswith("\n")
    assert errors[:-1].isprintable()


def test_several_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, steps=[0])
    assert main(["summary", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"paramwatch: {tmp_path} holds 2 runs, name one: {tmp_path}/a/paramwatch, {tmp_path}/b/paramwatch\n"


@pytest.mark.parametrize("command", ["summary", "show", "findings", "tail", "export", "report"])
def test_each_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert re.search(rf"examples?:\n  paramwatch {command} runs/first", said)


def test_whoever_reads_may_stop_reading(run: Run) -> None:
    done = subprocess.run(
        f"{sys.executable} -m paramwatch export {run.path} --to csv -o - | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith('"step"')
    assert done.stdout.splitlines()[-1] in ("0", "141")
    assert done.stderr == ""


def test_output_that_is_closed_is_an_error_and_does_not_matter_where_nothing_is_printed(run: Run, tmp_path: Path) -> None:
    command = f"{sys.executable} -m paramwatch"
    lines = f"{command} findings {run.path} >&-; echo $?; {command} export {run.path} -o {tmp_path}/run.csv >&- 2>&-; echo $?"
    lines += f"; {command} --help >&-; echo $?; {command} --version > /dev/full; echo $?"
    done = subprocess.run(lines, shell=True, capture_output=True, text=True, check=True)

    assert done.stdout == "1\n0\n1\n1\n"
    closed = "paramwatch: standard output is closed\n"
    assert done.stderr == f"{closed}{closed}paramwatch: No space left on device: standard output\n"
    assert (tmp_path / "run.csv").stat().st_size > 1000


@pytest.mark.parametrize("command", ["export", "report"])
def test_control_c_ends_with_its_code_and_leaves_no_half_file(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "at", lambda self, share: signal.raise_signal(signal.SIGINT))

    assert main([command, str(run.path), "-o", str(tmp_path / "out.csv")]) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_help_loads_nothing_and_no_command_loads_torch(run: Run, tmp_path: Path) -> None:
    code = f"""
import sys
from paramwatch.cli import main
try:
    main(["--help"])
except SystemExit:
    assert not {{"numpy", "pandas", "pyarrow", "torch"}} & set(sys.modules), "help"
path = {str(run.path)!r}
for arguments in (["summary", path], ["show", path, "lr"], ["findings", path], ["tail", path, "--once"],
                  ["export", path, "-o", {str(tmp_path / "a.parquet")!r}], ["report", path, "-o", {str(tmp_path / "a.html")!r}]):
    assert main(arguments) == 0
    assert not {{"torch", "lightning", "pytorch_lightning", "matplotlib", "tensorboard"}} & set(sys.modules), arguments
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"paramwatch \d+\.\d+\.\d+\n", version)


# ---- names and terminals --------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["summary"], ["show", "grad_norm", "--limit", "0"], ["show", "grad_state"], ["findings"], ["tail", "--once"]], ids=str
)
def test_no_name_moves_the_cursor_breaks_a_line_or_turns_the_text(
    hostile: Run, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    said = printed(capsys, arguments[0], hostile.path, *arguments[1:])
    assert not [c for c in set(said) - {"\n"} if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    if arguments[0] == "show":
        assert len(said.splitlines()) == len(hostile.parameters) + 1
        assert max(map(len, said.splitlines())) <= 80


def test_names_in_json_come_back_as_they_are(hostile: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "show", hostile.path, "lr", "--json")
    assert said.isascii()
    assert [line["name"] for line in json.loads(said)["lines"]] == list(hostile.parameters.index)


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Terminal(Screen()).paint("a", "red") == "\x1b[31ma\x1b[0m"
    assert Terminal(io.StringIO()).paint("a", "red") == "a"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Terminal(Screen()).paint("a", "red") == "a"
    assert Terminal(Screen()).live
    monkeypatch.setenv("TERM", "dumb")
    assert not Terminal(Screen()).live


def test_a_terminal_without_the_signs_gets_plain_ones() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Terminal(stream).print(["▁█× … 重"])
    assert raw.getvalue() == b"_#x ~ \\u91cd\n"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_grid_is_never_wider_than_the_terminal_and_drops_the_last_columns_first(width: int) -> None:
    grid = Grid(
        ("name", "a", "words", "b"),
        [("encoder.layer.11.attention.weight", "1.234e-05", "much to say of it " * 4, "2")],
        frozenset({"words"}),
    )
    lines = grid.text(width)
    assert max(map(len, lines)) <= width
    assert "1.234e-05" in lines[1]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.84, "0.8 s"), (12, "12 s"), (59.8, "60 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (273600, "3 d 4 h")]
)
def test_durations_are_in_units_that_people_use(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_thousand_rows_are_a_hundred_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = write(tmp_path, [f"blocks.{i}.weight" for i in range(1000)], range(3))
    said = printed(capsys, "show", many.path, "grad_norm").splitlines()
    assert len(said) == 102
    assert said[-1] == "… and 900 more lines; --limit 0 shows all"
    assert pd.Series(said).str.len().max() <= 80
