"""Steps that are captured in a CUDA graph: passed over, with a word; the capture itself is tried in test_gpu_device.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paramwatch
from paramwatch.measure import capture


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
