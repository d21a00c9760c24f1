"""The share of a run's time that watching took, as the closing report has it."""

from __future__ import annotations

import logging

import pytest
from loops import loss_of, mlp, sgd
from records import inventory, record

import paramwatch
from paramwatch.cost import Cost


def test_the_share_is_what_was_spent_until_the_last_step_of_the_time_until_then() -> None:
    cost, net = Cost(), inventory("a")
    assert cost.share is None
    for step, (at, spent) in enumerate([(100.0, 0.5e6), (102.0, 1.0e6), (105.0, 3e6)]):
        cost.write(record(step, net, {"param": {"a": [1.0]}}, time=at, overhead_us=spent))
        assert (cost.share is None) == (step == 0)
    # rows that no optimizer steps are measured once more at the end
    cost.write(record(2, net, {}, stepped=[], time=900.0, overhead_us=0.0))

    assert cost.share == pytest.approx(1.5 / 5)


def test_no_share_is_said_where_the_clock_was_set_back() -> None:
    cost, net = Cost(), inventory("a")
    for at in (100.0, 99.0):
        cost.write(record(0, net, {"param": {"a": [1.0]}}, time=at, overhead_us=1.0))

    assert cost.share is None


def test_the_share_that_is_said_is_that_of_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paramwatch")
    net = mlp()
    optimizer = sgd(net)
    watch = paramwatch.attach(net)
    for i in range(20):
        loss_of(net, i).backward()
        optimizer.step()
    watch.close()

    seconds = (watch.steps["time"].iloc[-1] - watch.steps["time"].iloc[0]).total_seconds()
    share = watch.steps["overhead_us"].iloc[:-1].sum() / 1e6 / seconds
    said = float(caplog.records[0].message.partition("watching took at least ")[2].partition(" %")[0])
    assert 0 < share < 1
    assert said == pytest.approx(100 * share, rel=0.06)
