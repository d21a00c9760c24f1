"""What splitting costs: operations, bytes and hooks, never times; what is off the schedule costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from paramwatch.uses import obstacles


def test_objects_are_searched_for_compiled_forms_only_where_something_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    net, looked = nn.Linear(2, 2), []
    # loads what compiles, and leaves a trace of its own there
    torch.compiler.disable(len)
    frames = sys.modules["torch._dynamo.eval_frame"]
    search: Callable[..., Any] = obstacles.gc.get_referrers
    monkeypatch.setattr(obstacles.gc, "get_referrers", lambda *of: looked.append(of) or search(*of))

    monkeypatch.setattr(frames, "cached_backends", {id(None): None})
    assert obstacles.obstacle_to_splitting(net) is None
    assert not looked

    compiled = torch.compile(net, backend="eager")
    compiled(torch.ones(1, 2))
    assert "the model is one" in obstacles.obstacle_to_splitting(net)
    assert looked
