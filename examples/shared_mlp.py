"""The exercise that all examples train: its data, its net, its loss and the order of its batches, in plain torch.

The net is an MLP 4-8-8-8-1 whose two hidden 8x8 layers are one and the same `nn.Linear`; the question is whether an iris is a virginica.
`01_shared_mlp.py` and `03_lightning_cli.py` train it with Lightning, `02_plain_loop.py` in a plain loop; all three see the same numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from paramwatch.tensorboard.address import first_view

SEED = 0
EPOCHS = 40
BATCH_SIZE = 10
LEARNING_RATE = 0.1


class SharedMLP(nn.Sequential):
    """Four measurements in, one logit out; layers 2 and 4 are one layer."""

    def __init__(self) -> None:
        shared = nn.Linear(8, 8)
        super().__init__(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1))


def iris() -> tuple[Tensor, Tensor]:
    """The measurements [150, 4], each column standardised, and the answers [150, 1]: 1 for virginica, 0 for the others."""
    table = pd.read_csv(Path(__file__).parent / "data" / "iris.csv")
    measurements = table.drop(columns="species")
    standardised = (measurements - measurements.mean()) / measurements.std()
    answers = (table[["species"]] == "virginica").astype(float)
    return torch.tensor(standardised.to_numpy(), dtype=torch.float32), torch.tensor(answers.to_numpy(), dtype=torch.float32)


def batches() -> DataLoader[tuple[Tensor, ...]]:
    """The data in batches, shuffled once: each run sees the same ones in the same order, whatever else draws random numbers."""
    measurements, answers = iris()
    shuffled = torch.randperm(len(answers), generator=torch.Generator().manual_seed(SEED))
    return DataLoader(TensorDataset(measurements[shuffled], answers[shuffled]), BATCH_SIZE)


def loss_of(logits: Tensor, answers: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, answers)


def accuracy_of(logits: Tensor, answers: Tensor) -> Tensor:
    return ((logits > 0) == (answers > 0)).float().mean()


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line that the examples have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="how often to go through the 150 irises")
    parser.add_argument("--log-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs are written")
    return parser.parse_args(argv)


def print_ending(net: nn.Module, run: Path, log_dir: Path) -> None:
    """Say how well the net learned, where its run was written, and how to look at it."""
    measurements, answers = iris()
    with torch.no_grad():
        logits = net(measurements)
    print(f"On all 150 irises: loss {loss_of(logits, answers):.6f}, accuracy {accuracy_of(logits, answers):.1%}.")
    print(f"The run was written to {run}; read it back with")
    print(f"    paramwatch.load({str(run)!r}).frame()")
    print("and see it, beside all other runs, at the address below, with")
    print(f"    {_tensorboard()} --logdir {log_dir}")
    print(f"    {first_view()}")


def _tensorboard() -> str:
    """How to call the TensorBoard of this environment, whether or not the environment is activated."""
    scripts = Path(sys.executable).parent
    if str(scripts) in os.environ.get("PATH", "").split(os.pathsep):
        return "tensorboard"
    nearby = scripts.relative_to(Path.cwd()) if scripts.is_relative_to(Path.cwd()) else scripts
    return str(nearby / "tensorboard")
