"""An exception inside paramwatch, in each of its functions that a watched run enters: it is reported once, and training goes on.

The functions are not listed: a first run of each loop is traced, and says which functions of paramwatch are entered, and through which
entry point (the outermost one on the stack: what torch, the user or the background thread calls). Then the loop runs once for each
function, and the function fails in every pass, before its first line: each function once, and those near an entry point once for each of
these, since it is there that something may be left out of the guard.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from faults import LOOPS, Injector, Pair, Run, run_of
from loops import sgd
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import clip_grad

import paramwatch
from paramwatch import attached, steps

NEAR = 4
"""Functions on the stack, the entry point included, up to which a function is near it."""

BEGINS_WITH_THE_GUARD = {
    *("_before", "_after", "_gradients_before", "_function_returned", "_closure_raised"),
    *("_report_clipping", "_report_unscaling", "_report_written"),
}
"""What an entry point of ours calls with nothing around it, since a compiler looks at that one."""

Plan = dict[str, list[tuple[Callable[[Run], None], Pair]]]
"""By the name of the entry point: loops, and what fails in them."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread for tiny tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """What each loop enters that is not in the plan of an earlier one; what the guard itself is made of is left out."""
    found: Plan = {}
    tried: set[Any] = set()
    for loop in LOOPS:
        # what is done but once in a process is done now
        run_of(loop, Injector(), tmp_path_factory.mktemp("first"))
        gc.collect()
        injector = Injector()
        run_of(loop, injector, tmp_path_factory.mktemp("traced"))
        for (entry, code), depth in injector.entered.items():
            key = (entry, code) if depth <= NEAR else code
            inside = code is not entry and code.co_name not in BEGINS_WITH_THE_GUARD and not code.co_filename.endswith("guard.py")
            if inside and key not in tried:
                tried |= {key, code}
                found.setdefault(entry.co_qualname, []).append((loop, (entry, code)))
    return found


ENTRY_POINTS = (
    "Traced.hooks.<locals>.pre_hook",
    "Traced.hooks.<locals>.post_hook",
    "_see_when_hooks_are_done.<locals>.last",
    "ReportingClosure.__call__",
    "untraced_or.<locals>.chosen",
    "_Groups.items",
    "Worker._run",
    "explicit",
    "Watch.close",
    "Watch._module_is_gone",
    "Armed._enter",
    "Armed._leave",
    "Armed._taking.<locals>.take",
    "Armed._run.<locals>.over",
    "Armed._watch.<locals>.deliver",
    "Watch.root",
)
"""What torch, the user's loop, the thread and the collector call; each of them does nothing before it enters the guard."""


def test_every_entry_point_is_tried(plan: Plan) -> None:
    assert plan.keys() == set(ENTRY_POINTS)
    assert sum(map(len, plan.values())) > 200


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What nobody catches: in threads, in what the collector calls."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    yield found
    gc.collect()


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_a_failure_in_any_function_is_reported_once_and_training_goes_on(
    entry: str, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: list[Any]
) -> None:
    outcomes: dict[Any, Run] = {}
    wrong: dict[str, list[str]] = {}
    quiet: list[str] = []
    for loop, pair in plan[entry]:
        caplog.clear()
        lost.clear()
        if loop not in outcomes:
            outcomes[loop] = run_of(loop, None, tmp_path / "bare")
        injector = Injector(pair)
        problems = []
        try:
            run = run_of(loop, injector, tmp_path / "run")
        except RuntimeError as error:
            problems.append(f"{error} reached the loop")
        else:
            if run.losses != outcomes[loop].losses or not all(map(torch.equal, run.end, outcomes[loop].end)):
                problems.append("something else was learned")
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        uncaught = [each.exc_value for each in lost if "injected into" in str(each.exc_value)]
        # a generator that fails when it is thrown away, which Python itself passes over
        thrown_away = bool(uncaught) and pair[1].co_flags & inspect.CO_GENERATOR
        if not thrown_away and (len(said) != 1 or f"RuntimeError: injected into {pair[1].co_qualname}" not in said[0]):
            problems.append(f"said: {said}")
        if uncaught and not thrown_away:
            problems.append(f"nobody caught {uncaught[0]!r}")
        problems += what_is_left()
        if not injector.fired:
            quiet.append(pair[1].co_qualname)
        elif problems:
            wrong[pair[1].co_qualname] = problems
    # what depends on the moment (a tick, a collection) was not entered this time
    assert len(quiet) <= len(plan[entry]) // 10, quiet
    assert not wrong, "\n".join(f"{name}: {', '.join(problems)}" for name, problems in wrong.items())


def what_is_left() -> list[str]:
    """What a run has left in torch and in paramwatch once the next step is over; it is taken away."""
    for watch in tuple(attached.opened):
        watch.close()
    net = nn.Linear(1, 1)
    sgd(net).step()
    registries = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    of_modules = torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks
    left = [f"{len(registry)} hooks" for registry in (*registries, *of_modules) if registry]
    for registry in of_modules:
        registry.clear()
    if not clip_grad._group_tensors_by_device_and_dtype.__module__.startswith("torch."):
        left.append("torch's helper for clipping is still wrapped")
    return left


def test_an_interrupt_in_any_function_that_torch_calls_passes_and_nothing_is_said(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, fired = {}, 0
    for loop, pair in [*plan[ENTRY_POINTS[0]], *plan[ENTRY_POINTS[1]]]:
        if not pair[1].co_filename.endswith(("steps.py", "recorder.py", "inventory.py")):
            continue
        injector = Injector(pair, KeyboardInterrupt)
        with contextlib.suppress(KeyboardInterrupt):
            run_of(loop, injector, tmp_path)
            kept[pair[1].co_qualname] = injector.fired
        fired += injector.fired
        what_is_left()

    assert fired > 20
    assert not any(kept.values())
    assert not [record for record in caplog.records if "failed" in record.getMessage()]


def test_an_attach_that_fails_in_any_function_leaves_nothing(tmp_path: Path, lost: list[Any]) -> None:
    def attach(failing: Pair | None) -> Injector:
        injector, net = Injector(failing), nn.Linear(2, 1)
        threads = threading.active_count()
        threading.settrace(injector)
        injector.arm()
        with contextlib.suppress(RuntimeError):
            paramwatch.attach(net, tmp_path, raw_gradients=True).close()
        injector.disarm()
        threading.settrace(None)  # type: ignore[arg-type]
        del net
        left = [f"{each.path} open" for each in attached.opened] + what_is_left()
        if left or threading.active_count() > threads:
            wrong.append(f"{failing[1].co_qualname if failing else 'nothing'}: {left}, {threading.active_count() - threads} threads")
        return injector

    wrong: list[str] = []
    for pair in attach(None).entered:
        if pair[0].co_name == "attach":
            attach(pair)
    assert not wrong
    assert not [each.exc_value for each in lost if "injected into" not in str(each.exc_value)]


@pytest.mark.parametrize("failing", ["drop_left_in_any_thread", "unsee_parents"])
def test_torchs_registries_are_as_before_though_what_else_closes_a_watch_fails(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(2, 2)
    watch = paramwatch.attach(net)
    undone = getattr(steps, failing)
    monkeypatch.setattr(steps, failing, raising)
    watch.close()

    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not torch_optimizer._global_optimizer_post_hooks
    undone()


def raising() -> None:
    raise RuntimeError
