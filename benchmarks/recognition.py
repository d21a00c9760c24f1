"""How often `summary` names which family: the two tables in docs/summary.md.

python benchmarks/recognition.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, distributions, nn
from torch.nn import init

import paramwatch

Draw = Callable[[Tensor], object]


def cut(std: float) -> Draw:
    return lambda w: init.trunc_normal_(w, std=0.02, a=-0.02 * std, b=0.02 * std)


OWN: dict[str, Draw] = {
    "PyTorch's default": lambda w: None,
    "uniform ±0.07": lambda w: init.uniform_(w, -0.07, 0.07),
    "normal(0, 0.02)": lambda w: init.normal_(w, std=0.02),
    "cut at 3 std": cut(3.0),
    "cut at 2.5 std": cut(2.5),
    "cut at 2 std": cut(2.0),
    "cut at 1.5 std": cut(1.5),
    "cut at 1 std": cut(1.0),
    "cut at 0.5 std": cut(0.5),
    "cut at -2 and 3 std": lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=0.06),
    "cut at -1 and 2 std": lambda w: init.trunc_normal_(w, std=0.02, a=-0.02, b=0.04),
}
"""Laws that are tried."""

OTHERS: dict[str, Draw] = {
    "triangular": lambda w: torch.rand(w.shape) + torch.rand(w.shape) - 1,
    "beta(2, 2)": lambda w: distributions.Beta(2.0, 2.0).sample(w.shape),
    "logistic": lambda w: torch.logit(torch.rand(w.shape)),
    "Student's t, 5 degrees of freedom": lambda w: distributions.StudentT(5.0).sample(w.shape),
    "Student's t, 10 degrees of freedom": lambda w: distributions.StudentT(10.0).sample(w.shape),
    "Laplace": lambda w: distributions.Laplace(0.0, 1.0).sample(w.shape),
    "each element from U(-1, 1) or N(0, 1)": lambda w: torch.where(
        torch.rand(w.shape) < 0.5, torch.rand(w.shape) * 2 - 1, torch.randn(w.shape)
    ),
    "each element from N(0, 1) or N(0, 2²)": lambda w: torch.randn(w.shape) * (1 + (torch.rand(w.shape) < 0.5)),
    "a sign plus 0.3 N(0, 1)": lambda w: torch.randn(w.shape).sign() + 0.3 * torch.randn(w.shape),
}
"""Laws that are not: what they pass for."""


def families(draw: Draw, width: int, draws: int) -> Counter[str]:
    """Of so many square layers."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(draws))
    for layer in layers:
        drawn = draw(layer.weight.detach())
        if isinstance(drawn, Tensor):
            layer.weight.data.copy_(drawn)
    return Counter(paramwatch.summary(layers).frame["family"])


def table(laws: Mapping[str, Draw], widths: Sequence[int], draws: int) -> list[str]:
    """Lines of a table of how often which family was named."""
    lines = ["| drawn from | " + " | ".join(f"{width * width} elements" for width in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for name, draw in laws.items():
        cells = [", ".join(f"{n} {family}" for family, n in families(draw, width, draws).most_common()) for width in widths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    print("\n".join(["of 1000 draws", *table(OWN, (16, 32, 64), 1000), "", "of 100 draws", *table(OTHERS, (16, 32), 100)]))


if __name__ == "__main__":
    main()
