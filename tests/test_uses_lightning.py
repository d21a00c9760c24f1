"""Gradients by use in real fits: those of the untied twin in a plain loop, whatever Lightning does, and training stays the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_lightning import QUIET, watch_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from untied import assert_contributions, multiplied, multiplied_for
from used_models import shared_mlp

from paramwatch.lightning import ParamWatch
from paramwatch.testing import ListSink

pytestmark = [
    # a hint that does not concern loaders of 24 samples
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # a deprecation inside Lightning
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

BATCHES = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Way:
    """How a step of a fit comes about."""

    manual: bool = False
    backwards: int = 1
    precision: str = "32-true"


WAYS = {
    "automatic": Way(),
    "accumulating": Way(backwards=3),
    "bf16": Way(precision="bf16-mixed"),
    "bf16, accumulating": Way(backwards=2, precision="bf16-mixed"),
    "manual": Way(manual=True),
    "manual, bf16, accumulating": Way(manual=True, backwards=2, precision="bf16-mixed"),
}


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    return shared_mlp(True)[0]


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    """The shared layer has a use outside of the model as well."""
    return net(batch).square().mean() + 0.1 * nn.functional.linear(torch.ones(2, 8), net[2 if len(net) < 8 else 7].weight).square().mean()


class Lit(pl.LightningModule):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.net, self.way, self.losses = tied(), way, []
        self.automatic_optimization = not way.manual

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = loss_of(self.net, batch[0])
        self.losses.append(loss.detach())
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / self.way.backwards)
        if (batch_idx + 1) % self.way.backwards == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(way: Way, *callbacks: ParamWatch) -> Lit:
    trained = Lit(way)
    accumulate = 1 if way.manual else way.backwards
    options = QUIET | {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "precision": way.precision}
    trainer = pl.Trainer(**options, accumulate_grad_batches=accumulate, callbacks=[*callbacks])
    trainer.fit(trained, DataLoader(TensorDataset(BATCHES.flatten(0, 1)), batch_size=4))
    return trained


def truth(way: Way) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients of the first step in a plain loop: those of the shared weight's copies by use, and that of the shared weight."""
    net, twin = tied(), tied()
    twin[4] = copy.deepcopy(twin[2])
    # runs never, but holds the copy of what is used outside
    twin.append(copy.deepcopy(twin[2]))
    twin[7].forward = lambda x: x
    for each in (net, twin):
        for batch in BATCHES[: way.backwards]:
            # as Lightning does it
            with torch.autocast("cpu", torch.bfloat16, way.precision == "bf16-mixed", cache_enabled=False):
                loss = loss_of(each, batch)
            (loss / way.backwards).backward()
    return {"net.2": twin[2].weight.grad, "net.4": twin[4].weight.grad, "(outside)": twin[7].weight.grad}, net[2].weight.grad


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_fit_is_split_as_a_plain_loop_is_and_trains_the_same(way: Way) -> None:
    sink = ListSink()
    callback = ParamWatch(uses=2, sinks=[sink])
    with multiplied() as seen:
        watched = fit(way, callback)
    bare = fit(way)
    apart, whole = truth(way)

    assert not watch_of(callback).recorder.splits.guard.failed  # type: ignore[union-attr]  # with `uses` there are splits
    assert watched.losses == bare.losses
    assert all(torch.equal(one, other) for one, other in zip(watched.parameters(), bare.parameters(), strict=True))
    steps = 6 // way.backwards
    assert len(sink.records) == steps
    assert [record.step for record in sink.records if record.uses] == list(range(0, steps, 2))
    split = sink.records[0].uses["net.2.weight"]
    assert split.uses == tuple(apart)
    assert (split.mode, split.backwards) == ("full", way.backwards)
    assert_contributions(split, *multiplied_for(whole, seen), [*apart.values()], whole)
    assert watch_of(callback).findings.empty


def test_a_callback_without_splits_reads_that_there_are_none() -> None:
    callback = ParamWatch()
    fit(Way(), callback)

    with pytest.raises(ValueError, match=r"ParamWatch\(uses=N\) in Lightning"):
        watch_of(callback).uses()
