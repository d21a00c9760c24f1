"""Steps in a row in which only numbers are new, against the same steps one by one; and what ends such a streak."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import one_by_one
from test_batching import put_together
from test_plan import assert_same
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import paramwatch
from paramwatch import steps
from paramwatch.batch import Batch
from paramwatch.columns import LAYOUTS
from paramwatch.guard import Guard
from paramwatch.inventory import LiveInventory
from paramwatch.measure import native
from paramwatch.recorder import Recorder
from paramwatch.rounds import Round
from paramwatch.streak import Streak
from paramwatch.testing import ListSink

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler: there is no quick way")


class Loop:
    """A net of which one optimizer steps all rows, and what may happen to it."""

    def __init__(self, plans: bool, raw: bool) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        self.stranger = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        # fused, it takes a scale
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, fused=True)
        self.rounds: list[Round] = []
        live = LiveInventory(self.net, ["*"], [], LAYOUTS["default"])
        self.recorder = Recorder(live, Guard("", lambda: None), self.rounds.append, update="exact", raw=raw)
        self.recorder.plans = plans

    def run(self, actions: list[str]) -> list[Round]:
        steps.register(self.recorder)
        try:
            for i, action in enumerate(actions):
                for j, param in enumerate(self.net.parameters()):
                    param.grad = torch.full_like(param, float(i + j))
                getattr(self, action)()
        finally:
            steps.unregister(self.recorder)
        self.recorder.finish()
        assert not self.recorder.guard.failed
        return self.rounds

    def step(self) -> None:
        self.optimizer.step()

    def closure(self) -> None:
        self.optimizer.step(lambda: 0.0)

    def read(self) -> None:
        self.step()
        self.recorder.close_round()

    def another(self) -> None:
        self.stranger.step()
        self.step()

    def outside(self) -> None:
        with torch.no_grad():
            self.net[0].bias.add_(1.0)
        self.step()

    def clipped(self) -> None:
        grads = [param.grad for param in self.net.parameters() if param.grad is not None]
        self.recorder.before_clipping(lambda raw: raw.clipping(grads, None))
        torch._foreach_mul_(grads, 0.5)
        self.recorder.before_clipping(lambda raw: raw.written(grads))
        self.step()

    def infinite(self) -> None:
        self.recorder.skipped(self.optimizer)

    def scaled(self) -> None:
        self.recorder.amp_scale = torch.tensor(4.0)
        self.step()

    def counted(self) -> None:
        self.recorder.backwards = 2
        self.step()

    def in_an_epoch(self) -> None:
        self.recorder.context = {"epoch": 1}
        self.step()
        self.recorder.context = {}

    def nothing(self) -> None:
        self.net[1].bias.grad = None
        self.step()

    def frozen(self) -> None:
        self.net[0].bias.requires_grad_(not self.net[0].bias.requires_grad)
        self.step()

    def moved(self) -> None:
        self.net[0].weight.data = self.net[0].weight.data.clone()
        self.step()

    def slower(self) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.5
        self.step()

    def replaced(self) -> None:
        """The model has another tensor where the optimizer steps the old one."""
        self.net[1].bias = nn.Parameter(torch.full((1,), 3.0))
        self.net[1].bias.grad = torch.ones(1)
        self.step()

    def renamed(self) -> None:
        held = self.net[1]._parameters
        name = next(name for name in held if name.startswith("weight"))
        held[f"{name}_"] = held.pop(name)
        self.step()

    def grown(self) -> None:
        if not hasattr(self.net, "more"):
            self.net.add_module("more", nn.Linear(1, 2))
        self.step()

    def grouped(self) -> None:
        param = nn.Parameter(torch.full((2,), 5.0))
        self.net[0].register_parameter(f"more{len(self.net[0]._parameters)}", param)
        param.grad = torch.ones(2)
        self.optimizer.add_param_group({"params": [param], "lr": 0.25})
        self.step()

    def shrunk(self) -> None:
        held = self.optimizer.param_groups[0]["params"]
        self.optimizer.param_groups[0]["params"] = held[:-1] if len(held) > 1 else held
        self.step()

    def converted(self) -> None:
        param = self.net[0].weight
        param.data = param.data.to(torch.float32 if param.dtype is torch.float64 else torch.float64)
        param.grad = torch.ones_like(param)
        self.step()

    def spread(self) -> None:
        """The same elements no longer lie side by side."""
        param = self.net[0].weight
        wide = torch.full((param.shape[0], 4), 9.0, dtype=param.dtype)
        wide[:, ::2] = param.data
        param.data = wide[:, ::2]
        self.step()

    def turned(self) -> None:
        """The same shape lies otherwise in memory."""
        param = self.net[0].weight
        param.grad = torch.arange(param.numel(), dtype=param.dtype).view(2, -1).t()
        self.step()

    def doubled(self) -> None:
        """A hook of someone else, before the step, changes what it uses."""
        handle = self.optimizer.register_step_pre_hook(self._doubling)
        self.step()
        handle.remove()

    def doubled_for_all(self) -> None:
        handle = register_optimizer_step_pre_hook(self._doubling)
        self.step()
        handle.remove()

    def scaled_inside(self) -> None:
        """As a `GradScaler` leaves it to a fused optimizer."""
        self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # type: ignore[attr-defined]  # as torch does
        self.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]  # as torch does

    def moved_inside(self) -> None:
        """The step puts a parameter into other memory."""
        param = self.net[0].weight

        def move(*_: Any) -> None:
            param.data = param.data + 1.0

        handle = self.optimizer.register_step_post_hook(move)
        self.step()
        handle.remove()

    def cut_inside(self) -> None:
        """The step leaves less of a parameter, where it was."""
        param = self.net[0].weight

        def cut(*_: Any) -> None:
            param.data = param.data[:1]

        handle = self.optimizer.register_step_post_hook(cut)
        self.step()
        handle.remove()

    def twin(self) -> None:
        """Another optimizer of the same tensors."""
        first, *others = self.net.parameters()
        torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.25}], lr=0.1).step()

    def without_rate(self) -> None:
        """A rate that is a tensor."""
        self.optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        self.step()
        self.optimizer.param_groups[0]["lr"] = 0.1

    def raises(self) -> None:
        handle = self.optimizer.register_step_post_hook(self._failing)
        with suppress(ZeroDivisionError):
            self.step()
        handle.remove()

    def inside(self) -> None:
        """Another optimizer of the same rows steps before this one is done."""
        inner = torch.optim.SGD(self.net[0].parameters(), lr=1.0)
        handle = self.optimizer.register_step_post_hook(lambda *_: inner.step())
        self.step()
        handle.remove()

    def _doubling(self, *_: Any) -> None:
        torch._foreach_mul_([param.grad for param in self.net.parameters() if param.grad is not None], 2.0)

    @staticmethod
    def _failing(*_: Any) -> None:
        raise ZeroDivisionError


OTHERS = [name for name in vars(Loop) if not name.startswith("_") and name not in ("run", "step")]


@pytest.fixture
def in_streaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the steps that were begun and ended in a streak."""
    found: list[int] = []
    leave = Streak.leave

    def noted(self: Streak) -> bool:
        if ended := leave(self):
            found.append(self._number)
        return ended

    monkeypatch.setattr(Streak, "leave", noted)
    return found


@settings(max_examples=8)
@given(st.lists(st.sampled_from(["step"] * 2 * len(OTHERS) + OTHERS), min_size=20, max_size=31), st.booleans(), st.sampled_from([2, 256]))
def test_whatever_happens_the_records_are_those_of_the_general_way(actions: list[str], raw: bool, most: int) -> None:
    quick, general = Loop(True, raw).run(actions), one_by_one(Loop(False, raw).run(actions))
    alone = one_by_one(quick)
    together = [each for part in put_together(quick, most) for each in (part if isinstance(part, Batch) else [part])]

    assert len(alone) == len(together) == len(general)
    for i, each in enumerate(general):
        assert_same(alone[i], each)
        assert_same(together[i], each)


@pytest.mark.parametrize("action", OTHERS)
def test_each_of_these_is_recorded_in_the_middle_of_a_streak(action: str, in_streaks: list[int]) -> None:
    actions = ["step"] * 12 + [action] + ["step"] * 3
    quick, general = one_by_one(Loop(True, True).run(actions)), one_by_one(Loop(False, True).run(actions))

    assert 11 in in_streaks
    assert (12 in in_streaks) == (action in ("read", "outside", "moved", "slower"))
    assert len(quick) == len(general)
    for one, other in zip(quick[11:], general[11:], strict=True):
        assert_same(one, other)
    assert quick[-1].step == len(actions) - 1 - (action == "raises")


def trained(net: nn.Module, times: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def steps_of() -> None:
        for _ in range(times):
            for param in net.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()

    return steps_of


def test_nobody_has_to_ask_for_what_a_streak_holds(tmp_path: Path, in_streaks: list[int]) -> None:
    """A loop that stands still has its latest steps handed over all the same."""
    sink = ListSink()
    net = nn.Linear(2, 1)
    with paramwatch.attach(net, tmp_path, sinks=[sink]):
        trained(net, 12)()
        end = time.monotonic() + 20
        while len(sink.records) < 12 and time.monotonic() < end:
            time.sleep(0.01)
        assert [record.step for record in sink.records] == list(range(12))
    assert in_streaks[-1] == 11


def test_two_threads_that_step_the_same_rows_lose_no_step() -> None:
    net, sink = nn.Linear(2, 1), ListSink()
    with paramwatch.attach(net, sinks=[sink]) as watch:
        threads = [threading.Thread(target=trained(net, 100), daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not watch.recorder.guard.failed
        assert watch.recorder.steps_seen == 200
    assert np.all(np.diff([record.step for record in sink.records]) >= 0)
