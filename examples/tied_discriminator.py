"""A discriminator is called on real data and on fakes before one backward: two uses of every weight, with opposite wishes."""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramwatch

NOISE = 4


def real(n: int) -> Tensor:
    """Points near a circle, [n, 2]."""
    angle = 2 * torch.pi * torch.rand(n)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, outputs))


def train(steps: int) -> paramwatch.Watch:
    torch.manual_seed(0)
    generator, discriminator = mlp(NOISE, 2), mlp(2, 1)
    watch = paramwatch.attach(discriminator, uses=10, uses_of="*", include="2.weight")
    judge = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    forger = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    for _ in range(steps):
        for parameter in discriminator.parameters():
            parameter.requires_grad_(False)
        forger.zero_grad()
        F.softplus(-discriminator(generator(torch.randn(64, NOISE)))).mean().backward()
        forger.step()
        for parameter in discriminator.parameters():
            parameter.requires_grad_(True)
        fakes = generator(torch.randn(64, NOISE)).detach()
        loss = F.softplus(-discriminator(real(64))).mean() + F.softplus(discriminator(fakes)).mean()
        judge.zero_grad()
        loss.backward()
        judge.step()
    watch.close()
    return watch


def table(watch: paramwatch.Watch) -> pd.DataFrame:
    """What the two halves of the loss contributed to the gradient of the middle layer."""
    norms = watch.uses()["use_norm"].droplevel("parameter").unstack("use")
    found = pd.DataFrame({"|real|": norms["call0:2"], "|fake|": norms["call1:2"]})
    found["grad_norm"] = watch.frame("grad_norm")["2.weight"]
    found[["agreement", "coherence"]] = watch.agreement().droplevel("parameter")[["agreement", "coherence"]]
    return found
