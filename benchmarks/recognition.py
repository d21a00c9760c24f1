"""How often `summary` names which family: the four tables in docs/summary.md.

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
    "cut at -1 and 1.5 std": lambda w: init.trunc_normal_(w, std=0.02, a=-0.02, b=0.03),
    "cut at -2 std alone": lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=2),
    "cut at 0 and 1 std": lambda w: init.trunc_normal_(w, std=0.02, a=0, b=0.02),
    "cut at -3.5 and 0.5 std": lambda w: init.trunc_normal_(w, mean=1.5),
}
"""Laws that are tried."""

FUNCTIONS: dict[str, tuple[str, Draw]] = {
    "uniform_()": ("uniform", init.uniform_),
    "uniform_(-0.3, 0.1)": ("uniform", lambda w: init.uniform_(w, -0.3, 0.1)),
    "normal_()": ("normal", init.normal_),
    "normal_(1, 0.02)": ("normal", lambda w: init.normal_(w, 1.0, 0.02)),
    "trunc_normal_()": ("truncated", init.trunc_normal_),
    "trunc_normal_(std=0.02)": ("normal", lambda w: init.trunc_normal_(w, std=0.02)),
    "trunc_normal_(std=0.02, a=-0.04, b=0.04)": ("truncated", cut(2.0)),
    "trunc_normal_(mean=0.5)": ("truncated", lambda w: init.trunc_normal_(w, 0.5)),
    "trunc_normal_(mean=1)": ("truncated", lambda w: init.trunc_normal_(w, 1.0)),
    "trunc_normal_(std=2)": ("truncated", lambda w: init.trunc_normal_(w, std=2.0)),
    "xavier_uniform_()": ("uniform", init.xavier_uniform_),
    "xavier_uniform_(gain=5/3)": ("uniform", lambda w: init.xavier_uniform_(w, 5 / 3)),
    "xavier_uniform_(gain=0.5)": ("uniform", lambda w: init.xavier_uniform_(w, 0.5)),
    "xavier_normal_()": ("normal", init.xavier_normal_),
    "xavier_normal_(gain=sqrt(2))": ("normal", lambda w: init.xavier_normal_(w, 2**0.5)),
    "kaiming_uniform_()": ("uniform", init.kaiming_uniform_),
    "kaiming_uniform_(a=0.2)": ("uniform", lambda w: init.kaiming_uniform_(w, 0.2)),
    "kaiming_uniform_(mode='fan_out', nonlinearity='relu')": (
        "uniform",
        lambda w: init.kaiming_uniform_(w, mode="fan_out", nonlinearity="relu"),
    ),
    "kaiming_normal_()": ("normal", init.kaiming_normal_),
    "kaiming_normal_(mode='fan_out', nonlinearity='tanh')": (
        "normal",
        lambda w: init.kaiming_normal_(w, mode="fan_out", nonlinearity="tanh"),
    ),
    "orthogonal_()": ("orthogonal", init.orthogonal_),
    "orthogonal_(gain=1.3)": ("orthogonal", lambda w: init.orthogonal_(w, 1.3)),
    "sparse_(0.1)": ("sparse", lambda w: init.sparse_(w, 0.1) if w.dim() == 2 else init.sparse_(w.view(len(w), -1), 0.1)),
    "eye_(), dirac_()": ("identity", lambda w: init.eye_(w) if w.dim() == 2 else init.dirac_(w)),
    "constant_(0.3)": ("constant", lambda w: init.constant_(w, 0.3)),
    "ones_()": ("ones", init.ones_),
    "zeros_()": ("zeros", init.zeros_),
}
"""Functions of `torch.nn.init`, and the family that each fills with: `trunc_normal_(std=0.02)` cuts at 100 standard deviations."""

SHAPES: dict[int, tuple[tuple[int, ...], ...]] = {
    256: ((16, 16), (64, 4), (8, 8, 2, 2)),
    1024: ((32, 32), (8, 128), (32, 8, 2, 2)),
    4096: ((64, 64), (256, 16), (16, 16, 4, 4)),
}

OTHERS: dict[str, Draw] = {
    "triangular": lambda w: torch.rand(w.shape) + torch.rand(w.shape) - 1,
    "evenly spaced (linspace)": lambda w: torch.linspace(0, 1, w.numel()).view(w.shape),
    "beta(2, 2)": lambda w: distributions.Beta(2.0, 2.0).sample(w.shape),
    "logistic": lambda w: torch.logit(torch.rand(w.shape)),
    "Student's t, 5 degrees of freedom": lambda w: distributions.StudentT(5.0).sample(w.shape),
    "Student's t, 10 degrees of freedom": lambda w: distributions.StudentT(10.0).sample(w.shape),
    "Laplace": lambda w: distributions.Laplace(0.0, 1.0).sample(w.shape),
    "each element from U(-1, 1) or N(0, 1)": lambda w: torch.where(
        torch.rand(w.shape) < 0.5, torch.rand(w.shape) * 2 - 1, torch.randn(w.shape)
    ),
    "each element from N(0, 1) or N(0, 2²)": lambda w: torch.randn(w.shape) * (1 + (torch.rand(w.shape) < 0.5)),
    "PyTorch's default and normal noise, a tenth of its std": lambda w: w + 0.1 * w.std() * torch.randn(w.shape),
    "PyTorch's default and normal noise, a fiftieth of its std": lambda w: w + 0.02 * w.std() * torch.randn(w.shape),
    "a sign plus 0.3 N(0, 1)": lambda w: torch.randn(w.shape).sign() + 0.3 * torch.randn(w.shape),
}
"""Laws that are not: what they pass for."""


def larger(w: Tensor) -> Tensor:
    """With half of the rows 1.5 times larger."""
    w[: len(w) // 2] *= 1.5
    return w


SCALES: dict[str, Draw] = {
    "normal, half of the rows 1.5 times larger": lambda w: larger(torch.randn(w.shape)),
    "Xavier uniform, half of the rows 1.5 times larger": lambda w: larger(init.xavier_uniform_(w)),
    "normal, each row times a number from U(0.75, 1.25)": lambda w: torch.randn(w.shape) * (0.75 + 0.5 * torch.rand(len(w), 1)),
    "normal, and half as much of a product of two normal vectors": lambda w: (
        torch.randn(w.shape) + 0.5 * torch.randn(len(w), 1) * torch.randn(w.shape[1])
    ),
}
"""What is not of one scale."""


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


def of_no_law(widths: Sequence[int], draws: int) -> list[str]:
    """Lines of a table of how often no law is named of what is not of one scale."""
    lines = ["| drawn from | " + " | ".join(f"{width * width} elements" for width in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    return lines + [
        f"| {name} | {' | '.join(str(families(draw, width, draws)['unlike']) for width in widths)} |" for name, draw in SCALES.items()
    ]


def recognised(family: str, draw: Draw, shapes: Sequence[tuple[int, ...]], draws: int) -> tuple[int, int]:
    """How often of so many draws, in these shapes by turns, a family is named, and how often alone."""
    torch.manual_seed(0)
    held = nn.ParameterList(nn.Parameter(torch.empty(shapes[i % len(shapes)])) for i in range(draws))
    for parameter in held:
        draw(parameter.detach())
    found = paramwatch.summary(held).frame["family"]
    return sum(family in said.split(" or ") for said in found), int((found == family).sum())


def functions(draws: int, sizes: Sequence[int] = tuple(SHAPES)) -> list[str]:
    """Lines of a table of how often the family that a function fills with is named."""
    lines = ["| torch.nn.init | family | " + " | ".join(f"{size} elements" for size in sizes) + " |", "|---" * (len(sizes) + 2) + "|"]
    for name, (family, draw) in FUNCTIONS.items():
        cells = []
        for size in sizes:
            named, alone = recognised(family, draw, SHAPES[size], draws)
            cells.append(f"{named}, alone {alone}")
        lines.append(f"| `{name}` | {family} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    print("\n".join(["of 900 draws", *functions(900), ""]), flush=True)
    print(
        "\n".join(["of 1000 draws", *table(OWN, (16, 32, 64), 1000), "", "of 100 draws", *table(OTHERS, (16, 32, 64), 100), ""]), flush=True
    )
    print("\n".join(["of 60 draws", *of_no_law((16, 32, 64), 60)]))


if __name__ == "__main__":
    main()
