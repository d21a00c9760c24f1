"""A recurrent cell is one set of weights used once for each moment: how far back does its gradient come from?"""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn

import paramwatch

MOMENTS, WIDTH = 60, 64


class Recall(nn.Module):
    """Reads 60 numbers, and says at the end what the first one was."""

    def __init__(self, orthogonal: bool) -> None:
        super().__init__()
        self.cell = nn.RNNCell(1, WIDTH)
        self.answer = nn.Linear(WIDTH, 1)
        if orthogonal:
            nn.init.orthogonal_(self.cell.weight_hh)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(numbers.shape[1], WIDTH)
        for moment in numbers:
            state = self.cell(moment, state)
        return self.answer(state)


def train(steps: int, orthogonal: bool) -> paramwatch.Watch:
    torch.manual_seed(0)
    net = Recall(orthogonal)
    watch = paramwatch.attach(net, uses=5, uses_of="cell.weight_hh", include="cell.weight_hh")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(steps):
        numbers = torch.rand(MOMENTS, 32, 1)
        optimizer.zero_grad()
        (net(numbers) - numbers[0]).square().mean().backward()
        optimizer.step()
    watch.close()
    return watch


def table(default: paramwatch.Watch, orthogonal: paramwatch.Watch) -> pd.DataFrame:
    """The contribution of some moments to the gradient of `weight_hh`, medians over the split steps."""
    found = {}
    for name, watch in (("default", default), ("orthogonal", orthogonal)):
        norms = watch.uses()["use_norm"].groupby("use", sort=False).median()
        moments = {f"moment {i}": norms[f"cell@{i}"] for i in (1, 20, 40, 50, 58, 59)}
        found[name] = {
            **moments,
            "grad_norm": watch.frame("grad_norm")["cell.weight_hh"].median(),
            "horizon": watch.agreement()["horizon"].median(),
        }
    return pd.DataFrame(found)
