"""How long a Watch lives, what it says, what it refuses, and that it reads live what `load` reads from its folder."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from loops import loss_of, mlp, sgd
from models import shared_mlp
from pandas.testing import assert_frame_equal
from torch import nn

import paramwatch
from paramwatch import ParamWatchError, Record, Run, Watch, attached, store, worker
from paramwatch.handover import Handover
from paramwatch.measure import sampled
from paramwatch.testing import ListSink

TESTS = Path(__file__).parent


pytestmark = pytest.mark.usefixtures("nothing_open")


def train(net: nn.Module, steps: int = 3, first: int = 0) -> None:
    optimizer = sgd(net)
    for i in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        optimizer.step()


def steps_of(run: Run) -> list[int]:
    return list(run.steps.index)


def frames_of(run: Run) -> list[pd.DataFrame]:
    return [run.frame(), run.frame("grad_norm"), run.steps, run.parameters, run.findings]


def script(body: str, *args: object) -> str:
    """What a fresh interpreter says when it runs a script."""
    lines = ["import logging, os, sys", "logging.basicConfig(level=logging.INFO)", "import torch, paramwatch"]
    lines += ["torch.set_num_threads(1)", "from loops import loss_of, mlp, sgd", "from test_watch import train, steps_of"]
    source = "\n".join(lines) + "\n" + textwrap.dedent(body)
    command = [sys.executable, "-c", source, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=TESTS)
    return f"{done.stdout}{done.stderr}exit {done.returncode}"


# ---- lifetime -------------------------------------------------------------------------------


def test_a_watch_need_not_be_kept(tmp_path: Path) -> None:
    net = mlp()
    paramwatch.attach(net, tmp_path)
    gc.collect()
    train(net)
    attached.opened[0].flush()

    assert steps_of(paramwatch.load(tmp_path)) == [0, 1, 2]


def test_a_watch_ends_with_its_model_and_what_it_saw_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net = mlp()
    paramwatch.attach(net, tmp_path)
    train(net)
    del net
    gc.collect()
    worker.wait_for_all()

    assert steps_of(paramwatch.load(tmp_path)) == [0, 1, 2]
    assert not attached.opened
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert "3 optimizer steps of Sequential seen" in caplog.text


def test_a_watch_does_not_keep_its_model() -> None:
    net = mlp()
    gone = weakref.ref(net)
    watch = paramwatch.attach(net)
    train(net)
    watch.frame()
    del net
    gc.collect()

    assert gone() is None


@pytest.mark.parametrize("end", ["close", "wait"])
def test_a_step_that_raised_does_not_keep_the_model(end: str) -> None:
    def leave_a_step() -> tuple[weakref.ref[nn.Module], paramwatch.Watch]:
        net = mlp()
        optimizer = sgd(net)
        watch = paramwatch.attach(net)
        optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        return weakref.ref(net), watch

    gone, watch = leave_a_step()
    if end == "close":
        watch.close()
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)

    assert gone() is None
    watch.close()


def test_a_closure_that_raised_does_not_keep_the_model() -> None:
    net = mlp()
    gone = weakref.ref(net)
    paramwatch.attach(net)

    def step_of(net: nn.Module) -> None:
        with pytest.raises(ZeroDivisionError):
            sgd(net).step(lambda: 1 / 0)

    step_of(net)
    del net
    gc.collect()

    assert gone() is None


@pytest.mark.parametrize("log_dir", [None, "run"])
@pytest.mark.parametrize("end", ["close", "collect"])
def test_a_watch_answers_after_its_end_as_before(end: str, log_dir: str | None, tmp_path: Path) -> None:
    net = shared()
    watch = paramwatch.attach(net, None if log_dir is None else tmp_path / log_dir)
    train(net)
    before, ties, said = frames_of(watch), watch.ties, repr(watch)
    if end == "close":
        watch.close()
    else:
        del net
        gc.collect()

    for old, new in zip(before, frames_of(watch), strict=True):
        assert_frame_equal(old, new)
    assert (watch.ties, repr(watch)) == (ties, said)


def test_a_watch_answers_as_before_after_another_model_was_attached_to_its_folder(tmp_path: Path) -> None:
    one, other = mlp(), nn.Sequential(nn.Linear(3, 1, dtype=torch.float64))
    first = paramwatch.attach(one, tmp_path)
    train(one, steps=4)
    first.close()
    second = paramwatch.attach(one, tmp_path, first_step=4)
    train(one, steps=2)
    second.close()
    before = frames_of(second)
    third = paramwatch.attach(other, tmp_path, first_step=1)
    train(other)

    assert steps_of(third) == [0, 1, 2, 3]
    assert steps_of(second) == [0, 1, 2, 3, 4, 5]
    for old, new in zip(before, frames_of(second), strict=True):
        assert_frame_equal(old, new)


class SlowSink(ListSink):
    def write(self, record: Record) -> None:
        time.sleep(0.05)
        super().write(record)


def test_reading_after_the_model_is_gone_waits_for_what_is_still_being_written() -> None:
    net = mlp()
    watch = paramwatch.attach(net, sinks=[SlowSink()])
    train(net, steps=5)
    del net
    gc.collect()

    assert len(watch.steps) == 5


def test_closing_after_the_model_is_gone_waits_for_what_is_still_being_written() -> None:
    net, sink = mlp(), SlowSink()
    watch = paramwatch.attach(net, sinks=[sink])
    train(net, steps=5)
    del net
    gc.collect()
    watch.close()

    assert (len(sink.records), sink.closed) == (5, True)


def test_attaching_a_model_again_closes_its_earlier_watch() -> None:
    net, sink = mlp(), ListSink()
    first = paramwatch.attach(net, sinks=[sink])
    train(net)
    second = paramwatch.attach(net)
    train(net, steps=1)

    assert sink.closed
    assert (len(first.steps), len(second.steps)) == (3, 1)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == 1


def test_attaching_again_to_the_same_folder_replaces_what_is_there(tmp_path: Path) -> None:
    net = mlp()
    paramwatch.attach(net, tmp_path)
    train(net, steps=5)
    paramwatch.attach(net, tmp_path)
    train(net, steps=2)

    assert steps_of(attached.opened[0]) == [0, 1]
    assert steps_of(paramwatch.load(tmp_path)) == [0, 1]


def test_a_folder_that_is_written_for_another_model_is_refused_unless_named(tmp_path: Path) -> None:
    one, other = mlp(0), mlp(1)
    first = paramwatch.attach(one, tmp_path)
    with pytest.raises(ParamWatchError, match=r"being written by another Watch; pass name="):
        paramwatch.attach(other, tmp_path)
    second = paramwatch.attach(other, tmp_path, name="other")
    train(one, steps=2)
    train(other, steps=3)

    assert (len(first.steps), len(second.steps)) == (2, 3)
    assert second.path == tmp_path / "paramwatch" / "other"


def test_a_refused_attach_leaves_the_earlier_watch_of_the_model_alone(tmp_path: Path) -> None:
    one, other = mlp(0), mlp(1)
    paramwatch.attach(one, tmp_path)
    watch = paramwatch.attach(other)
    with pytest.raises(ParamWatchError):
        paramwatch.attach(other, tmp_path)
    train(other)

    assert len(watch.steps) == 3


def test_the_folder_of_a_model_that_is_gone_is_free(tmp_path: Path) -> None:
    net = mlp()
    paramwatch.attach(net, tmp_path)
    train(net, steps=5)
    del net
    gc.collect()
    net = mlp()
    watch = paramwatch.attach(net, tmp_path)
    train(net, steps=2)

    assert steps_of(watch) == [0, 1]


def test_a_with_block_closes_also_when_it_raises(tmp_path: Path) -> None:
    net = mlp()

    def interrupted() -> None:
        with paramwatch.attach(net, tmp_path):
            train(net)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    train(net)

    assert steps_of(paramwatch.load(tmp_path)) == [0, 1, 2]
    assert not torch_optimizer._global_optimizer_pre_hooks


class CountingSink(ListSink):
    closes = 0

    def close(self) -> None:
        self.closes += 1


def test_close_may_be_called_again_and_flush_after_it() -> None:
    net, sink = mlp(), CountingSink()
    watch = paramwatch.attach(net, sinks=[sink])
    train(net)
    for _ in range(2):
        watch.close()
        watch.flush()

    assert sink.closes == 1
    assert len(sink.records) == 3


ENDS = {"with_an_error": "raise SystemError('mine')", "without_the_models": "del one, two", "as_it_is": ""}


def test_what_was_seen_is_written_when_the_interpreter_exits(tmp_path: Path) -> None:
    """The last end is that of the interpreter itself, the others are those of its children."""
    body = f"""
        for name, end in {ENDS}.items():
            if end and (child := os.fork()):
                os.waitpid(child, 0)
                continue
            one, two = mlp(0), mlp(1)
            for i, net in enumerate((one, two)):
                paramwatch.attach(net, f"{{sys.argv[1]}}/{{name}}/{{i}}")
                train(net, steps=50)
            del net
            exec(end)
            sys.exit()
        """
    said = script(body, tmp_path)

    for name in ENDS:
        assert [len(paramwatch.load(tmp_path / name / net).steps) for net in "01"] == [50, 50], said
    assert said.count("50 optimizer steps of Sequential seen") == 2 * len(ENDS)
    assert said.count("SystemError: mine") == 1
    assert "paramwatch failed" not in said


def test_a_forked_child_is_left_alone_and_may_attach_for_itself(tmp_path: Path) -> None:
    body = """
        net = mlp()
        watch = paramwatch.attach(net, f"{sys.argv[1]}/parent", raw_gradients=True)
        train(net)
        watch.flush()
        child = os.fork()
        if not child:
            train(net)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            print("the child sees", len(watch.steps), "and says", watch, flush=True)
            own = paramwatch.attach(net, f"{sys.argv[1]}/child")
            train(net, steps=2)
            print("its own sees", len(own.steps), flush=True)
            sys.exit()
        print("the child ended with", os.waitpid(child, 0)[1])
        train(net)
        """
    said = script(body, tmp_path)

    assert re.search(r"the child sees 3 and says <Watch .+: Sequential, 4 rows, 3 steps \(0 to 2\)>\n", said)
    assert "its own sees 2\n" in said
    assert "the child ended with 0\n" in said
    assert sorted(re.findall(r"(\d+) optimizer steps of Sequential seen", said)) == ["2", "6"]
    assert [len(paramwatch.load(tmp_path / name).steps) for name in ("parent", "child")] == [6, 2], said


# ---- what is written ------------------------------------------------------------------------


def shared() -> nn.Sequential:
    """A net with a layer at two places and a frozen one, in float64 as `loss_of` takes it."""
    net = mlp()
    layer = nn.Linear(4, 4, dtype=torch.float64)
    frozen = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)
    return nn.Sequential(net[0], layer, nn.Tanh(), layer, frozen, net[2])


def test_live_and_loaded_frames_are_equal(tmp_path: Path) -> None:
    net = shared()
    watch = paramwatch.attach(net, tmp_path, detail="full")
    train(net, steps=4)
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    train(net, steps=2)
    watch.flush()

    loaded = paramwatch.load(tmp_path)
    for live, written in zip(frames_of(watch), frames_of(loaded), strict=True):
        assert_frame_equal(live, written)
    assert watch.ties == loaded.ties
    assert [tie.names for tie in watch.ties] == [("1.weight", "3.weight"), ("1.bias", "3.bias")]
    assert list(watch.findings["rule"]) == ["first_nonfinite", "changed_outside"]


def test_memory_and_folder_hold_the_same(tmp_path: Path) -> None:
    nets = shared(), shared()
    watches = paramwatch.attach(nets[0]), paramwatch.attach(nets[1], tmp_path)
    for net in nets:
        train(net)

    assert_frame_equal(watches[0].frame(), watches[1].frame())


def test_a_resumed_run_goes_on_where_it_is_told_to(tmp_path: Path) -> None:
    net = mlp()
    with paramwatch.attach(net, tmp_path):
        train(net, steps=5)
    with paramwatch.attach(net, tmp_path, first_step=3) as watch:
        train(net, steps=4)

    assert steps_of(paramwatch.load(tmp_path)) == list(range(7))
    resumed = watch.frame("grad_norm", steps=slice(3, 7))
    assert len(resumed) == 4


def test_steps_reach_the_disk_while_more_are_coming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH_SECONDS", 0.05)
    monkeypatch.setattr(worker, "PERIOD_SECONDS", 0.3)
    net = mlp()
    paramwatch.attach(net, tmp_path)
    steps = 0
    while not list(tmp_path.glob("**/*.rows.arrow")):
        assert steps < store.BATCH_STEPS - 1, "it was the full batch that was written, not the old one"
        train(net, steps=1)
        time.sleep(0.005)
        steps += 1


# ---- sinks ----------------------------------------------------------------------------------


class ThreadSink(ListSink):
    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()

    def write(self, record: Record) -> None:
        super().write(record)
        self.threads.add(threading.current_thread().name)

    def close(self) -> None:
        super().close()
        self.threads.add(threading.current_thread().name)


def test_sinks_get_records_in_step_order_on_one_thread_of_ours() -> None:
    net, sink = mlp(), ThreadSink()
    with paramwatch.attach(net, sinks=[sink]):
        train(net, steps=40)

    assert [record.step for record in sink.records] == list(range(40))
    assert sink.closed
    assert sink.threads == {"paramwatch"}


class FailingSink(ListSink):
    def write(self, record: Record) -> None:
        super().write(record)
        if record.step == 2:
            raise OSError("no space left")


def test_a_failing_sink_is_switched_off_by_name_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    net, failing, sound = mlp(), FailingSink(), ListSink()
    watch = paramwatch.attach(net, sinks=[failing, sound])
    train(net, steps=6)

    assert len(watch.steps) == 6
    assert (len(failing.records), len(sound.records)) == (3, 6)
    assert [record.message for record in caplog.records if "FailingSink" in record.message] == [
        "paramwatch failed while writing step 2 to FailingSink (OSError: no space left). "
        "FailingSink is switched off; recording and training go on."
    ]


def test_a_full_disk_switches_the_store_off_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    net, sink = mlp(), ListSink()
    watch = paramwatch.attach(net, tmp_path, sinks=[sink])
    monkeypatch.setattr(store.Store, "flush", full)
    train(net)
    watch.flush()
    train(net)
    watch.close()

    assert len(sink.records) == 6
    assert caplog.text.count("Store is switched off") == 1


# ---- messages -------------------------------------------------------------------------------


def test_the_closing_report_says_what_was_seen_and_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paramwatch")
    net = mlp()
    with paramwatch.attach(net, tmp_path):
        train(net)

    ((name, level, said),) = caplog.record_tuples
    assert (name, level) == ("paramwatch", logging.INFO)
    path = str(tmp_path / "paramwatch")
    where = re.escape(f"{path} (to look at: paramwatch summary {path})")
    took = r"watching took at least \d+(\.\d+)? % of the time"
    assert re.fullmatch(rf"paramwatch: 3 optimizer steps of Sequential seen, 4 rows, written to {where}; {took}", said)


def replaced(net: nn.Module) -> None:
    train(mlp(seed=5))


def left_by_exceptions(net: nn.Module) -> None:
    def failing() -> float:
        raise RuntimeError("of the loop")

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        with contextlib.suppress(RuntimeError):
            optimizer.step(failing)


REASONS = {
    "left": (left_by_exceptions, "2 optimizer steps began, and none came to its end: an exception left it"),
    "no_step": (lambda net: None, "No torch optimizer stepped while it was attached; for one that torch's hooks cannot see use"),
    "other_tensors": (replaced, "3 optimizer steps were made, but of tensors that are not in this model: was it replaced"),
}


@pytest.mark.parametrize(("loop", "reason"), REASONS.values(), ids=REASONS)
def test_no_step_seen_is_a_warning_with_the_likely_reason(
    loop: Callable[[nn.Module], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = mlp()
    with paramwatch.attach(net):
        loop(net)

    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert said.message.startswith(f"paramwatch: 0 optimizer steps of Sequential seen. {reason}")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "paramwatch: the Watch of Sequential was closed before its first step, because its model was attached again"),
        (1, "paramwatch: 1 optimizer step of Sequential seen, 4 rows; closed because its model was attached again"),
        (2, "paramwatch: 2 optimizer steps of Sequential seen, 4 rows; closed because its model was attached again"),
    ],
)
def test_a_watch_whose_model_is_attached_again_says_so(steps: int, message: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paramwatch")
    net = mlp()
    paramwatch.attach(net)
    train(net, steps)
    paramwatch.attach(net)

    ((name, level, said),) = caplog.record_tuples
    assert (name, level) == ("paramwatch", logging.INFO)
    assert re.sub(r"; watching took at least \S+ % of the time", "", said) == message
    assert ("watching took" in said) == (steps > 1)


def test_one_step_of_another_model_is_said_in_the_singular(caplog: pytest.LogCaptureFixture) -> None:
    net = mlp()
    with paramwatch.attach(net):
        train(mlp(seed=5), 1)

    assert "1 optimizer step was made, but of tensors" in caplog.text


def test_a_finding_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    with torch.no_grad():
        net[2].bias.fill_(float("nan"))
    train(net, steps=3)

    assert list(watch.findings["parameter"]) == ["2.bias"]
    assert [record.message for record in caplog.records] == [f"step 0: {watch.findings['message'][0]}"]


def test_a_repr_says_where_of_what_and_how_much(tmp_path: Path) -> None:
    net = shared()
    watch = paramwatch.attach(net, tmp_path)
    assert repr(watch) == f"<Watch {tmp_path / 'paramwatch'}: Sequential, 8 rows (10 names, 2 frozen), no steps yet>"
    train(net)
    assert repr(watch) == f"<Watch {tmp_path / 'paramwatch'}: Sequential, 8 rows (10 names, 2 frozen), 3 steps (0 to 2)>"


@pytest.mark.parametrize("every", [1, 2])
def test_a_repr_waits_for_nothing_and_reads_nothing(every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = shared()
    watch = paramwatch.attach(net, tmp_path, every=every, first_step=10)
    train(net, 5)
    watch.close()
    run = repr(paramwatch.load(tmp_path)).replace("Run", "Watch", 1)
    for owner, method in ((Watch, "flush"), (Handover, "give"), (Watch, "_read"), (Run, "_read")):
        monkeypatch.delattr(owner, method)

    assert repr(watch) == run


def test_frames_of_a_lazy_model_are_empty_before_its_first_step() -> None:
    watch = paramwatch.attach(nn.Sequential(nn.LazyLinear(4)))

    assert watch.frame().empty
    assert "grad_norm" in watch.frame()
    for by in ("parameter", "layer", 1):
        assert watch.frame("grad_norm", by=by).shape == watch.frame("grad_state", by=by).shape == (0, 0)  # type: ignore[arg-type]
        assert watch.frame(by=by).empty  # type: ignore[arg-type]
    assert watch.steps.empty
    assert "1 rows" not in watch._repr_html_()
    with pytest.raises(ParamWatchError, match=r"no parameter fits '0\.\*'; there are none"):
        watch.frame(parameters="0.*")


def test_frames_are_there_before_the_first_step() -> None:
    watch = paramwatch.attach(shared_mlp())

    assert watch.frame().empty
    assert "grad_norm" in watch.frame()
    assert list(watch.parameters.loc["2.weight", "aliases"]) == ["4.weight"]


# ---- misuse ---------------------------------------------------------------------------------

MISUSE: dict[str, tuple[dict[str, Any], str]] = {
    "include": ({"include": "layer*"}, r"no row matches include=\['layer\*'\].*the names are '0.weight', '0.bias'"),
    "exclude": ({"exclude": ["0.*", "2.*"]}, r"no row matches include=\['\*'\] with exclude="),
    "every": ({"every": 0}, "every must be a whole number of at least 1, not 0"),
    "every_float": ({"every": 1.5}, "every must be a whole number of at least 1, not 1.5"),
    "uses": ({"uses": -1}, "uses must be a whole number of at least 0, not -1"),
    "histograms": ({"histograms": -1}, "histograms must be a whole number of at least 0, not -1"),
    "first_step": ({"first_step": -1}, "first_step must be a whole number of at least 0, not -1"),
    "max_bytes": ({"max_bytes": 0}, "max_bytes must be a whole number of at least 1, not 0"),
    "detail": ({"detail": "more"}, "detail must be one of 'cheap', 'default', 'full', not 'more'"),
    "update": ({"update": "some"}, "update must be one of 'auto', 'exact', 'sampled', 'off', not 'some'"),
    "remote": ({"log_dir": "s3://bucket/run"}, "log_dir must be a local folder, not 's3://bucket/run'; write locally"),
    "remote_without_a_slash": ({"log_dir": Path("gs://bucket/run")}, "log_dir must be a local folder, not 'gs:/bucket/run'; write locally"),
    "no_path": ({"log_dir": ""}, "log_dir is empty; pass '.' for the working folder, or None to keep"),
    "path_number": ({"log_dir": 5}, r"log_dir must be the path of a folder \(str or pathlib.Path\), not 5"),
    "path_bytes": ({"log_dir": b"run"}, r"log_dir must be the path of a folder \(str or pathlib.Path\), not b'run'"),
    "path_null": ({"log_dir": "run\0"}, r"log_dir 'run\\x00' contains a null byte"),
    "path_of_nobody": ({"log_dir": "~nobody-of-that-name/run"}, "log_dir '~nobody-of-that-name/run' cannot be written: "),
    "name_number": ({"name": 5}, "name must be a plain folder name, not 5; leave it out"),
    "include_none": ({"include": None}, r"include must be a glob pattern such as '\*.weight', or a list of them, not None"),
    "include_number": ({"include": 5}, "include must be a glob pattern .* not 5"),
    "exclude_none": ({"exclude": None}, "exclude must be a glob pattern .* not None"),
    "exclude_numbers": ({"exclude": [5]}, r"exclude must be a glob pattern .* not \[5\]"),
    "uses_of": ({"uses_of": 5}, "uses_of must be a glob pattern .* not 5"),
    "sinks_none": ({"sinks": None}, "sinks must be a list of sinks, not None; leave it out for none"),
    "sinks_one": ({"sinks": ListSink()}, "sinks must be a list of sinks, not ListSink"),
    "sinks_number": (
        {"sinks": [5]},
        r"sinks holds 5, which is no sink: a sink is an object with the methods write\(record\) and close\(\)",
    ),
    "sinks_class": ({"sinks": [ListSink]}, "sinks holds <class .*ListSink'>, which is no sink"),
    "raw_gradients": ({"raw_gradients": 1}, "raw_gradients must be True or False, not 1"),
    "every_true": ({"every": True}, "every must be a whole number of at least 1, not True"),
    "every_text": ({"every": "2"}, "every must be a whole number of at least 1, not '2'"),
    "first_step_beyond": ({"first_step": 2**63}, r"first_step must be at most 2\*\*62, not 9223372036854775808"),
    "detail_list": ({"detail": ["full"]}, r"detail must be one of .* not \['full'\]"),
    "name_with_a_slash": ({"log_dir": "run", "name": "a/b"}, "name must be a plain folder name, not 'a/b'"),
    "name_above": ({"log_dir": "run", "name": ".."}, "name must be a plain folder name, not '..'"),
}


@pytest.mark.parametrize(("options", "message"), MISUSE.values(), ids=MISUSE)
def test_arguments_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamWatchError, match=message):
        paramwatch.attach(mlp(), **options)

    assert not list(tmp_path.iterdir())
    assert not attached.opened
    assert not torch_optimizer._global_optimizer_pre_hooks


@pytest.mark.parametrize("options", MISUSE.values(), ids=MISUSE)
def test_a_refused_attach_closes_nothing(options: tuple[dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = mlp()
    watch = paramwatch.attach(net)
    with pytest.raises(ParamWatchError):
        paramwatch.attach(net, **options[0])

    assert attached.opened == [watch]


def test_a_resumed_loop_passes_on_the_number_it_read() -> None:
    net = mlp()
    watch = paramwatch.attach(net)
    train(net)
    again = paramwatch.attach(net, every=np.int32(2), first_step=watch.steps.index[-1] + 1, max_bytes=torch.tensor(10**6))  # type: ignore[arg-type]
    train(net)

    assert steps_of(again) == [3, 5]


def test_what_is_no_module_or_has_no_parameters_is_refused() -> None:
    with pytest.raises(ParamWatchError, match=r"attach takes an nn\.Module, not SGD"):
        paramwatch.attach(sgd(mlp()))  # type: ignore[arg-type]
    with pytest.raises(ParamWatchError, match="Tanh has no parameters, so there is nothing to watch"):
        paramwatch.attach(nn.Tanh())


def test_a_log_dir_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ParamWatchError, match=r"log_dir '.*/file/run' cannot be written: .*Not a directory"):
        paramwatch.attach(mlp(), tmp_path / "file" / "run")


def test_an_unknown_statistic_is_refused_with_the_nearest_ones() -> None:
    watch = paramwatch.attach(mlp())
    with pytest.raises(ParamWatchError, match="there is no statistic 'grad_nrm' here; nearest: 'grad_norm'"):
        watch.frame("grad_nrm")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamWatchError, match=r"there is no run in .*: a run is a folder with"):
        paramwatch.load(tmp_path)


def test_a_step_of_what_holds_no_parameters_is_refused_and_recording_goes_on() -> None:
    net = mlp()
    watch: Watch = paramwatch.attach(net)
    with pytest.raises(ParamWatchError, match="Sequential has no param_groups"), watch.step(net):  # type: ignore[arg-type]
        pass
    train(net)

    assert len(watch.steps) == 3


def test_the_last_watch_gives_back_what_is_kept_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "opened", [])
    one, other = nn.Linear(2, 1), nn.Linear(2, 1)
    first, second = paramwatch.attach(one), paramwatch.attach(other)
    sampled.positions(5000, 4096, torch.device("cpu"), 0)
    first.close()
    assert sampled.positions.cache_info().currsize > 0
    second.close()
    assert sampled.positions.cache_info().currsize == 0
