"""The exercise of `shared_mlp.py` as a LightningModule and its data, for the examples that train with Lightning."""

from __future__ import annotations

import logging
import warnings

import pytorch_lightning as pl
import torch
from shared_mlp import LEARNING_RATE, SharedMLP, accuracy_of, batches, loss_of
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

# Lightning's hints on workers and on its other products, and a deprecation inside it, are nothing a reader of these examples can act on.
for namespace in ("pytorch_lightning", "lightning.pytorch"):
    logging.getLogger(f"{namespace}.utilities.rank_zero").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*does not have many workers")
warnings.filterwarnings("ignore", ".*LeafSpec")


class LitSharedMLP(pl.LightningModule, SharedMLP):
    """The net and how to train it in one module, so that its parameters are `0.weight` and not `net.0.weight`."""

    def __init__(self, lr: float = LEARNING_RATE) -> None:
        """Make a fresh net.

        Args:
            lr: Learning rate of plain SGD.
        """
        super().__init__()
        self.lr = lr

    def training_step(self, batch: list[Tensor]) -> Tensor:
        measurements, answers = batch
        logits = self(measurements)
        loss = loss_of(logits, answers)
        self.log_dict({"loss": loss, "accuracy": accuracy_of(logits, answers)}, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class IrisData(pl.LightningDataModule):
    """Fisher's irises, in the batches that every example sees."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return batches()
