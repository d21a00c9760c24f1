"""What a live Watch answers is what the run that it wrote answers, in memory and on disk, while it trains and afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loops import loss_of, mlp, sgd
from torch import nn

import paramwatch
from paramwatch import Run
from paramwatch import watch as watch_module

FEW_BYTES = 400_000
"""So few that every other step is dropped from the 64th on, with room for some of the latest."""

HAPPENS = ("step", "grow", "freeze", "spoil", "without", "rate", "outside")
LOOPS = st.lists(st.tuples(st.sampled_from(HAPPENS), st.integers(1, 60)), min_size=1, max_size=5)


def train(loop: list[tuple[str, int]]) -> Iterator[nn.Sequential]:
    """Gives the model before its first step, and after each part of the loop: something happens, then some steps are made."""
    net = mlp()
    net.append(nn.Linear(1, 1, dtype=torch.float64))
    net.append(net[-1])
    optimizer = sgd(net)
    yield net
    for happens, steps in loop:
        if happens == "grow":
            net.append(nn.Linear(1, 1, dtype=torch.float64))
            optimizer.add_param_group({"params": list(net[-1].parameters())})
        elif happens == "freeze":
            net[0].bias.requires_grad_(not net[0].bias.requires_grad)
            net[0].bias.grad = None
        elif happens == "rate":
            optimizer.param_groups[0]["lr"] /= 2
        elif happens == "outside":
            net[0].weight.data.mul_(0.5)
        for i in range(steps):
            optimizer.zero_grad()
            loss_of(net, i % 3).backward()
            if i == 0 and happens == "spoil":
                net[2].weight.grad[0, 0] = torch.nan
            if i < 3 and happens == "without":
                net[2].weight.grad = None
            optimizer.step()
        yield net


def answers(run: Run, steps: slice) -> dict[str, pd.DataFrame]:
    """Everything that can be asked for; times differ from run to run."""
    found = {f"frame({options})": run.frame(**options) for options in _QUESTIONS}
    found[f"frame(steps={steps})"] = run.frame(steps=steps, by=2)
    found |= {name: getattr(run, name) for name in ("parameters", "findings")}
    found["steps"] = run.steps.drop(columns=["time", "overhead_us"])
    return found | {"histograms": run.histograms(), "uses": run.uses(), "agreement": run.agreement()}


_QUESTIONS: list[dict[str, Any]] = [
    {},
    {"by": "layer"},
    {"finite": True},
    {"aliases": True, "parameters": ["*.weight", "4.bias"]},
    {"statistic": "grad_norm"},
    {"statistic": "update_ratio", "by": "layer"},
    {"statistic": "grad_state", "aliases": True},
    {"statistic": "param_nan"},
]


def same(found: dict[str, pd.DataFrame], wanted: dict[str, pd.DataFrame]) -> None:
    for question, frame in wanted.items():
        pd.testing.assert_frame_equal(found[question], frame, check_exact=True, obj=question)


@settings(max_examples=2)
@example(loop=[("step", 140), ("spoil", 60), ("grow", 40)], steps=slice(50, 190, 3))
@given(loop=LOOPS, steps=st.slices(200).filter(lambda each: min(each.start or 0, each.stop or 0) >= 0 and (each.step or 1) > 0))
def test_every_frame_of_a_live_watch_is_that_of_the_loaded_run(loop: list[tuple[str, int]], steps: slice) -> None:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(watch_module, "MEMORY_BYTES", FEW_BYTES)
        seen = []
        for where in (None, Path(folder)):
            parts = train(loop)
            watch = paramwatch.attach(next(parts), where, max_bytes=FEW_BYTES, histograms=16, uses=8)
            next(parts)
            during = answers(watch, steps)
            if where:
                same(answers(paramwatch.load(where), steps), during)
            for _ in parts:
                pass
            watch.close()
            seen.append([during, answers(watch, steps)])
        for in_memory, on_disk in zip(*seen, strict=True):
            same(on_disk, in_memory)
        same(answers(paramwatch.load(folder).still(), steps), seen[0][-1])
