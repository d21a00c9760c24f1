"""What was not there is said: rows without a gradient or an optimizer, and skipped steps."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LR, loss_of
from records import inventory, record
from torch import nn
from torch.optim import SGD

import paramwatch
from paramwatch import Record, attached, worker
from paramwatch.absence import Tally
from paramwatch.testing import ListSink

pytestmark = pytest.mark.usefixtures("nothing_open")


class Net(nn.Module):
    """Its result depends on `body` and `head`; `spare` is used when asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.spare = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.use_spare: float | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        out: torch.Tensor = self.head(x)
        return out if self.use_spare is None else out + self.use_spare * self.spare(x)


def steps(net: nn.Module, optimizer: Any, n: int = 3) -> None:
    for i in range(n):
        optimizer.zero_grad()
        loss_of(net, i).backward()
        optimizer.step()


def sgd(*parts: nn.Module, **options: Any) -> SGD:
    return SGD([p for part in parts for p in part.parameters()], lr=LR, **options)


# ---- what a loop leaves out, and what is said of it -------------------------------------------

SPARE = "(spare.weight, spare.bias)"
NO_GRADIENT = f"2 rows had no gradient in any measured step {SPARE}"
NO_OPTIMIZER = f"2 trainable rows are in no optimizer that stepped {SPARE}"


def nothing(net: Net) -> None:
    net.use_spare = 1.0
    steps(net, sgd(net))


def a_gradient(net: Net) -> None:
    steps(net, sgd(net))


def a_gradient_at_first_and_later_not(net: Net) -> None:
    optimizer, net.use_spare = sgd(net), 1.0
    steps(net, optimizer, 1)
    net.use_spare = None
    steps(net, optimizer)


def a_gradient_at_first_only(net: Net) -> None:
    optimizer = sgd(net)
    steps(net, optimizer)
    net.use_spare = 1.0
    steps(net, optimizer, 1)


def anything_but_zeros(net: Net) -> None:
    net.use_spare = 0.0
    steps(net, sgd(net))


def anything_but_zeros_at_first(net: Net) -> None:
    optimizer, net.use_spare = sgd(net), 0.0
    steps(net, optimizer, 1)
    net.use_spare = None
    steps(net, optimizer)


def an_optimizer(net: Net) -> None:
    net.use_spare = 1.0
    steps(net, sgd(net.body, net.head))


def an_optimizer_until_later(net: Net) -> None:
    optimizer, net.use_spare = sgd(net.body, net.head), 1.0
    steps(net, optimizer)
    optimizer.add_param_group({"params": list(net.spare.parameters())})
    steps(net, optimizer)


def an_optimizer_that_steps(net: Net) -> None:
    idle, net.use_spare = sgd(net.spare), 1.0
    idle.zero_grad()
    steps(net, sgd(net.body, net.head))


def training(net: Net) -> None:
    net.spare.requires_grad_(False)
    steps(net, sgd(net.body, net.head))


def training_in_an_optimizer(net: Net) -> None:
    net.spare.requires_grad_(False)
    steps(net, sgd(net))


def training_from_now_on(net: Net) -> None:
    optimizer = sgd(net)
    steps(net, optimizer)
    net.spare.requires_grad_(False)
    steps(net, optimizer)


def training_until_now(net: Net) -> None:
    net.spare.requires_grad_(False)
    optimizer = sgd(net)
    steps(net, optimizer)
    net.spare.requires_grad_(True)
    steps(net, optimizer)


def added_to_no_optimizer(net: Net) -> None:
    spare, net.use_spare = net.spare, 1.0
    optimizer = sgd(net.body, net.head)
    net.spare = nn.Identity()
    steps(net, optimizer, 5)
    net.spare = spare
    steps(net, optimizer, 1)


def removed(net: Net) -> None:
    optimizer = sgd(net)
    steps(net, optimizer)
    net.spare = nn.Identity()
    steps(net, optimizer, 1)


def several_optimizers(net: Net) -> None:
    first, second = sgd(net.body), sgd(net.head)
    for i in range(3):
        loss_of(net, i).backward()
        first.step()
        repr(attached.opened[0])
        second.step()
    net.use_spare = 1.0
    steps(net, sgd(net.spare))


LEFT_OUT: dict[Callable[[Net], None], tuple[int, list[str]]] = {
    nothing: (0, []),
    a_gradient: (0, [NO_GRADIENT]),
    a_gradient_at_first_and_later_not: (0, []),
    a_gradient_at_first_only: (0, []),
    anything_but_zeros: (0, []),
    anything_but_zeros_at_first: (0, []),
    an_optimizer: (0, [NO_OPTIMIZER]),
    an_optimizer_until_later: (0, []),
    an_optimizer_that_steps: (0, [NO_OPTIMIZER]),
    training: (2, []),
    training_in_an_optimizer: (2, []),
    training_from_now_on: (2, []),
    training_until_now: (0, [NO_GRADIENT]),
    added_to_no_optimizer: (0, [NO_OPTIMIZER]),
    removed: (0, []),
    several_optimizers: (0, []),
}


def remarks(run: paramwatch.Run) -> tuple[int, list[str]]:
    """How many frozen rows a repr counts, and what it says of absence."""
    first, *said = repr(run).removesuffix(">").split("; ")
    rows = first.partition("rows (")[2].partition(" frozen")
    return int(rows[0]) if rows[1] else 0, said


@pytest.mark.parametrize(("loop", "said"), LEFT_OUT.items(), ids=lambda case: getattr(case, "__name__", ""))
def test_what_a_run_did_not_have_is_said_live_and_of_what_was_written(
    loop: Callable[[Net], None], said: tuple[int, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "paramwatch")
    net = Net().double()
    watch = paramwatch.attach(net, tmp_path)
    loop(net)
    watch.flush()

    assert remarks(watch) == said
    # that the kernel was compiled just now, say
    caplog.clear()
    watch.close()
    assert remarks(watch) == said
    assert remarks(paramwatch.load(tmp_path)) == (said[0], [text.replace("measured", "stored") for text in said[1]])
    report, *warnings = [(entry.levelno, entry.message) for entry in caplog.records if entry.message.startswith("paramwatch: ")]
    assert report[0] == logging.INFO
    assert ("(2 frozen)" in report[1]) == (said[0] == 2)
    assert warnings == [(logging.WARNING, f"paramwatch: in Net {text}") for text in said[1]]


def test_rows_that_are_trained_by_nobody_since_they_were_freed_are_named() -> None:
    net = Net().double()
    net.spare.requires_grad_(False)
    watch = paramwatch.attach(net)
    optimizer = sgd(net.body, net.head)
    steps(net, optimizer)
    assert remarks(watch) == (2, [])
    net.spare.requires_grad_(True)
    steps(net, optimizer)

    assert remarks(watch) == (0, [NO_OPTIMIZER])
    watch.close()
    net.spare.requires_grad_(False)
    assert remarks(watch) == (0, [NO_OPTIMIZER])


def test_both_kinds_of_absence_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    net = Net().double()
    with paramwatch.attach(net):
        steps(net, SGD([*net.body.parameters(), net.head.weight, net.spare.weight], lr=LR))

    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert said.message == (
        "paramwatch: in Net 2 trainable rows are in no optimizer that stepped (head.bias, spare.bias); "
        "1 row had no gradient in any measured step (spare.weight)"
    )


def test_of_steps_that_were_not_measured_nothing_is_said() -> None:
    net = Net().double()
    watch = paramwatch.attach(net, every=2)
    optimizer = sgd(net)
    for i in range(6):
        net.use_spare = 1.0 if i % 2 else None
        steps(net, optimizer, 1)
    watch.flush()

    assert remarks(watch) == (0, [NO_GRADIENT])
    assert "3 steps (0 to 4)" in repr(watch)


def test_before_the_first_step_no_row_is_missed() -> None:
    net = Net().double()
    net.spare.requires_grad_(False)

    assert repr(paramwatch.attach(net)) == "<Watch in memory: Net, 6 rows (2 frozen), no steps yet>"


def test_a_second_session_does_not_miss_what_the_first_one_trained_and_it_froze(tmp_path: Path) -> None:
    net = Net().double()
    net.use_spare = 1.0
    with paramwatch.attach(net, tmp_path):
        steps(net, sgd(net))
    net.spare.requires_grad_(False)
    with paramwatch.attach(net, tmp_path, first_step=3) as watch:
        steps(net, sgd(net.body, net.head))

    assert remarks(watch) == remarks(paramwatch.load(tmp_path)) == (2, [])


# ---- skipped steps ----------------------------------------------------------------------------


def scaled(net: nn.Module, infinite: set[int], n: int) -> None:
    """A fused optimizer skips by itself the steps in which its scaler met an infinity."""
    optimizer, scaler = sgd(net, fused=True), torch.amp.GradScaler("cpu", init_scale=2.0)
    for i in range(n):
        optimizer.zero_grad()
        loss = loss_of(net, i)
        scaler.scale(loss * float("inf") if i in infinite else loss).backward()
        scaler.step(optimizer)
        scaler.update()


def test_skipped_steps_are_counted_and_the_first_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paramwatch")
    net = nn.Linear(3, 1)
    with paramwatch.attach(net, tmp_path) as watch:
        scaled(net, {1, 3, 4, 6, 7}, 9)

    for run in (watch, paramwatch.load(tmp_path)):
        assert repr(run).endswith("9 steps (0 to 8), 5 skipped (1, 3, 4 and 2 others)>")
    (said,) = caplog.records
    assert ", 2 rows, 5 of 9 measured steps skipped (1, 3, 4 and 2 others), written to" in said.message


def test_a_run_of_skipped_steps_only_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(3, 1)
    with paramwatch.attach(net):
        scaled(net, {0, 1}, 2)

    assert [entry.message for entry in caplog.records] == ["paramwatch: in Linear every measured step was skipped, so nothing was trained"]


def test_a_step_that_came_in_parts_is_skipped_once() -> None:
    tally, net = Tally(), inventory("a", "b")
    for part in ("a", "b"):
        tally.write(record(7, net, {"param": {part: [1.0]}}, skipped=True))

    found = tally.absence(net)
    assert (found.steps, found.skipped, found.first_skipped) == (1, 1, (7,))


# ---- names ------------------------------------------------------------------------------------


def missing(*names: str, tied: dict[str, list[str]] | None = None) -> str:
    """How rows without a gradient are named: all but those that start with x."""
    net = inventory(*names, tied=tied)
    tally, here = Tally(), [row.name for row in net.rows]
    states = {name: "used" if name.startswith("x") else "none" for name in here}
    tally.write(record(0, net, {"param": {name: [1.0] for name in here}}, states=states))
    (said,) = tally.absence(net).wrong("measured")
    return said.partition("(")[2].removesuffix(")")


def test_few_rows_are_named_and_many_by_their_module() -> None:
    assert missing("a.x", "a.y", "b") == "a.x, a.y, b"
    assert missing("a.b.x", "a.b.y", "a.c", "d", "xe") == "a.*, d"
    assert missing("a.b.x", "a.b.y", "a.c", "d", "e", "f", "xe") == "a.*, d, e and 1 other"
    assert missing("a.b.x", "a.b.y", "a.b.z", "a.c.x", "a.c.y", "d", "e") == "a.*, d, e"


def test_a_module_stands_for_its_rows_only_if_all_of_its_names_are_among_them() -> None:
    assert missing("x", "m.a", "m.b.c", "m.b.d", "m.b.f", "m.e") == "m.*"
    assert missing("x", "m.a", "m.b.c", "m.b.d", "m.b.f", "m.e", tied={"x": ["m.e"]}) == "m.a, m.b.*"


def test_a_name_with_a_line_break_stays_in_its_line() -> None:
    assert missing("a\nb") == r"'a\nb'"


def test_a_large_model_is_described_in_a_line() -> None:
    net = nn.ModuleDict({f"part{i}": nn.ModuleList([nn.Linear(1, 1) for _ in range(20)]) for i in range(50)})
    used = [net[f"part{i}"][j].weight for i in range(50) if i != 7 for j in range(0, 20, 1 + i % 2)]  # type: ignore[index]
    watch = paramwatch.attach(net)
    SGD([*used, *net["part7"].parameters()], lr=LR).step()
    watch.flush()

    assert "2,000 rows" in repr(watch)
    assert "others" in repr(watch)
    assert len(repr(watch)) < 400


# ---- at any time ------------------------------------------------------------------------------


class StuckSink(ListSink):
    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, record: Record) -> None:
        assert self.free.wait(timeout=60)


def test_a_repr_says_what_was_missing_also_right_after_the_last_step() -> None:
    net = Net().double()
    watch = paramwatch.attach(net)
    for _ in range(3):
        steps(net, sgd(net), 5)
        assert NO_GRADIENT in repr(watch)


def test_a_repr_does_not_wait_for_long_for_a_background_thread_that_hangs() -> None:
    net, stuck = Net().double(), StuckSink()
    watch = paramwatch.attach(net, sinks=[stuck])
    steps(net, sgd(net), 5)
    said = repr(watch)
    stuck.free.set()

    assert "5 steps (0 to 4)" in said
    watch.flush()
    assert NO_GRADIENT in repr(watch)


def test_any_thread_may_ask_while_rows_come_and_go() -> None:
    net = nn.ModuleList([nn.Linear(3, 3)])
    watch = paramwatch.attach(net)
    done, changing, said = threading.Event(), threading.Lock(), set[str]()

    def ask() -> None:
        while not done.is_set():
            # torch itself cannot walk over a module that changes meanwhile
            with changing:
                said.add(repr(watch)[:6])

    asking = threading.Thread(target=ask)
    asking.start()
    for i in range(40):
        with changing:
            net.append(nn.Linear(3, 3))
        SGD(net[i].parameters(), lr=LR).step()
    done.set()
    asking.join()
    watch.flush()

    assert said == {"<Watch"}
    assert "2 trainable rows are in no optimizer that stepped (40.weight, 40.bias)" in repr(watch)
    assert "80 rows had no gradient in any measured step (0.*, 1.*, 2.* and 74 others)" in repr(watch)


def test_what_a_model_that_is_gone_did_not_have_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = Net().double()
    watch = paramwatch.attach(net)
    steps(net, sgd(net))
    del net
    gc.collect()
    worker.wait_for_all()

    assert [entry.message for entry in caplog.records] == [f"paramwatch: in Net {NO_GRADIENT}"]
    assert remarks(watch) == (0, [NO_GRADIENT])


def test_it_is_said_once_however_often_a_watch_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    net = Net().double()
    watch = paramwatch.attach(net)
    steps(net, sgd(net))
    for _ in range(2):
        watch.close()

    assert len(caplog.records) == 1


def broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("ours")


def test_after_a_failure_of_ours_nothing_is_missed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    net = Net().double()
    watch = paramwatch.attach(net)
    steps(net, sgd(net.body))
    monkeypatch.setattr(watch.recorder, "begin", broken)
    steps(net, sgd(net))
    watch.close()

    (said,) = caplog.records
    assert "paramwatch failed while" in said.message
    assert repr(watch) == "<Watch in memory: Net, 6 rows, 3 steps (0 to 2); recording stopped after a failure>"


@pytest.mark.parametrize("method", ["write", "absence"])
def test_a_failure_in_counting_harms_nothing(method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Tally, method, broken)
    net = Net().double()
    watch = paramwatch.attach(net)
    steps(net, sgd(net))
    watch.close()

    assert len(watch.steps) == 3
    assert len([entry for entry in caplog.records if "paramwatch failed while" in entry.message]) == 1


def test_a_notebook_shows_it() -> None:
    net = Net().double()
    watch = paramwatch.attach(net)
    steps(net, sgd(net))

    assert NO_GRADIENT in watch._repr_html_()


def test_what_took_the_place_of_a_tensor_is_in_no_optimizer_until_one_steps_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = paramwatch.attach(net)

    def step(optimizer: torch.optim.Optimizer) -> None:
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    step(optimizer)
    net.load_state_dict(net.state_dict() | {"0.weight": torch.ones(2, 2)}, assign=True)
    step(optimizer)
    assert not watch.parameters["owned"].any()
    assert "4 trainable rows are in no optimizer that stepped" in repr(watch)
    step(torch.optim.SGD(net.parameters(), lr=0.1))
    assert watch.parameters["owned"].all()
    assert "in no optimizer" not in repr(watch)
    watch.close()
