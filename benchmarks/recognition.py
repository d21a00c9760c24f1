"""What `summary` takes laws for that it was not made for, of 100 draws each: the table in docs/summary.md.

python benchmarks/recognition.py
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import distributions, nn

import paramwatch

LAWS = {
    "triangular": lambda shape: torch.rand(shape) + torch.rand(shape) - 1,
    "beta(2, 2)": distributions.Beta(2.0, 2.0).sample,
    "logistic": lambda shape: torch.logit(torch.rand(shape)),
    "Student's t, 5": distributions.StudentT(5.0).sample,
    "Student's t, 10": distributions.StudentT(10.0).sample,
    "Laplace": distributions.Laplace(0.0, 1.0).sample,
    "U(-1, 1) or N(0, 1)": lambda shape: torch.where(torch.rand(shape) < 0.5, torch.rand(shape) * 2 - 1, torch.randn(shape)),
    "N(0, 1) or N(0, 2^2)": lambda shape: torch.randn(shape) * (1 + (torch.rand(shape) < 0.5)),
    "sign + 0.3 N(0, 1)": lambda shape: torch.randn(shape).sign() + 0.3 * torch.randn(shape),
    "cut at 1 std": lambda shape: nn.init.trunc_normal_(torch.empty(shape), a=-1, b=1),
}


def main() -> None:
    for name, draw in LAWS.items():
        for width in (16, 32):
            torch.manual_seed(0)
            layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(100))
            for layer in layers:
                layer.weight.data.copy_(draw(layer.weight.shape))
            print(f"{name:22} {width * width:5} elements", dict(Counter(paramwatch.summary(layers).frame["family"])), flush=True)


if __name__ == "__main__":
    main()
