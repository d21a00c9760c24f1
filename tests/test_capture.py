"""Steps that are captured in a CUDA graph: passed over, with a word; the capture itself is tried in test_gpu_device.py."""

from __future__ import annotations

import pytest
import torch
from test_uses_cost import Operations
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import paramwatch
from paramwatch.measure import capture, trusted


def test_a_captured_step_is_passed_over_and_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    capture._say.cache_clear()
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = paramwatch.attach(net, raw_gradients=True)
    for captured in (False, True, True, False):
        monkeypatch.setattr(capture, "capturing", lambda now=captured: now)
        net(torch.ones(1, 2)).sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    assert list(watch.frame("grad_norm").index) == [0, 1]
    assert [line for line in caplog.messages if "captured in a CUDA graph" in line] == [
        "paramwatch: an optimizer step is captured in a CUDA graph; neither it nor what its replays do is recorded"
    ]


def test_a_step_that_was_entered_before_the_capture_began_is_counted_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = paramwatch.attach(net)
    for captured in (False, True, False):
        net(torch.ones(1, 2)).sum().backward()
        with watch.step(optimizer):
            monkeypatch.setattr(capture, "capturing", lambda now=captured: now)
            optimizer.step()
            inside = watch.recorder.steps_seen
        monkeypatch.setattr(capture, "capturing", lambda: False)

    assert inside == 2
    assert list(watch.frame("grad_norm").dropna().index) == [0, 2]


def test_kernels_are_not_tried_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    with FakeTensorMode():
        there = [torch.empty(3, device="cuda")]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(trusted, "works", lambda *_: asked.append(_))
    monkeypatch.setattr(capture, "capturing", lambda: True)
    trusted.prepare(lambda: there, histograms=False)
    assert not asked

    monkeypatch.setattr(capture, "capturing", bool)
    trusted.prepare(lambda: there, histograms=False)
    assert len(asked) == 1


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x).tanh())


def test_a_split_gathers_nothing_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hooks do there would be done at each replay, and what it finds belongs to no step."""
    net = Shared()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def operations() -> int:
        net.zero_grad()
        with Operations() as counting:
            net(torch.ones(1, 2)).sum().backward()
        return len(counting.seen)

    bare = operations()
    with paramwatch.attach(net, uses=1) as watch:
        monkeypatch.setattr(capture, "capturing", lambda: True)
        captured = operations()
        optimizer.step()
        monkeypatch.setattr(capture, "capturing", bool)
        split = operations()
        optimizer.step()
        found = watch.uses()

    assert captured == bare < split
    assert found.index.unique("step").tolist() == [0]
    assert found["backwards"].unique().tolist() == [1]
    assert found["use_share"].groupby("parameter").sum().tolist() == pytest.approx([1.0, 1.0])
