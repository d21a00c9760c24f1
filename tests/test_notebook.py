"""What a notebook shows of a run."""

from __future__ import annotations

import re

import torch
from torch import nn

import paramwatch
from paramwatch.notebook import Ties


def tied() -> nn.Sequential:
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Tanh(), shared)


def cells(html: str) -> list[str]:
    return re.findall(r"<td>(.*?)</td>", html)


def test_a_norm_that_is_no_number_is_told_from_one_that_was_not_measured() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net[0].weight.grad = torch.full((2, 2), torch.nan)
    with paramwatch.attach(net, update="off") as watch:
        optimizer.step()

    parameter, grad, update, state = cells(watch._repr_html_())[:4]
    assert float(parameter) > 0
    assert (grad, update, state) == ("nan", "-", "used")
    assert cells(watch._repr_html_())[5:8] == ["-", "-", "none"]


def test_names_with_controls_are_written_out() -> None:
    net = nn.Module()
    net.register_module("\x1b[31m<b>", nn.Linear(1, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with paramwatch.attach(net) as watch:
        optimizer.step()

    shown = watch._repr_html_()
    assert "\x1b" not in shown
    assert "<th>\\x1b[31m&lt;b&gt;.weight</th>" in shown


def test_ties_are_a_tuple_and_a_frame() -> None:
    watch = paramwatch.attach(tied())
    found = watch.ties

    assert found == paramwatch.tie_groups(tied()) == tuple(found)
    assert found.frame.to_dict("list") == {
        "names": [("0.weight", "2.weight"), ("0.bias", "2.bias")],
        "kind": ["parameter"] * 2,
        "numel": [9, 3],
        "bytes_saved": [36, 12],
    }
    assert "0.weight, 2.weight" in cells(found._repr_html_())
    assert list(Ties().frame) == list(found.frame)
    assert Ties()._repr_html_() == "<p>No ties.</p>"
