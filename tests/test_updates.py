"""Whether updates are measured exactly: while there is memory for a copy of the parameters, or as one chose."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import paramwatch
from paramwatch.measure import room
from paramwatch.updates import UpdateMode


def modes(net: nn.Module, update: UpdateMode, steps: int = 3) -> tuple[set[str], bool]:
    """How its updates were measured, and whether their norms are known."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    with paramwatch.attach(net, update=update) as watch:
        for _ in range(steps):
            optimizer.step()
        return set(watch.steps["update_mode"]), bool(watch.frame("update_norm").notna().all(axis=None))


BYTES = 4 * 1000


@pytest.mark.parametrize(
    ("free", "total", "mode"),
    [
        (2 * BYTES, 50 * BYTES, "exact"),
        (2 * BYTES - 1, 50 * BYTES, "sampled"),  # half of what is free
        (50 * BYTES, 50 * BYTES - 50, "sampled"),  # 2 % of all
    ],
)
def test_auto_is_exact_while_there_is_room_for_a_copy(free: int, total: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_host_memory", lambda: (free, total))
    assert modes(nn.Linear(1000, 1, bias=False), "auto") == ({mode}, True)


def test_auto_looks_at_the_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(room, "_host_memory", lambda: (asked.append(1), (10**9, 10**12))[1])
    assert modes(nn.Linear(10, 10), "auto", steps=9) == ({"exact"}, True)
    assert len(asked) == 1


@pytest.mark.parametrize(("mode", "known"), [("exact", True), ("sampled", True), ("off", False)])
def test_what_was_chosen_is_done(mode: UpdateMode, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_host_memory", lambda: (0, 0))
    assert modes(nn.Linear(10, 10), mode) == ({mode}, known)


SHORT = """
import logging, resource, sys, torch, paramwatch
logging.basicConfig(stream=sys.stdout, format="%(message)s")
net = torch.nn.Linear(5000, 5000, bias=False)
optimizer = torch.optim.SGD(net.parameters(), lr=1.0, foreach=False)
net.weight.grad = torch.ones_like(net.weight)
watch = paramwatch.attach(net, update="exact")
for short in map(int, sys.argv[1]):
    if short:
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (50 << 20), resource.RLIM_INFINITY))
    optimizer.step()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
watch.flush()
print(*watch.steps["update_mode"], *watch.frame("update_norm")["weight"].round(3))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the memory of a process is not limited in this way")
@pytest.mark.parametrize("when", ["100", "0000110"], ids=["at the first step", "at a later one"])
def test_where_memory_runs_out_updates_are_estimated_from_then_on_and_that_is_said_once(when: str) -> None:
    done = subprocess.run([sys.executable, "-c", SHORT, when], capture_output=True, text=True, check=True)
    *said, numbers = done.stdout.splitlines()
    exact = when.index("1")

    assert numbers.split() == ["exact"] * exact + ["sampled"] * (len(when) - exact) + ["5000.0"] * len(when)
    assert said == ["no memory is left for a copy of the parameters: updates are estimated from samples from now on"]
