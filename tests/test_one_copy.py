"""All numbers of a step leave a device by one copy: seen on tensors of the CPU that are measured in plain torch and sent by a ring."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paramwatch
from paramwatch.measure import chunked, native, packed, reading
from paramwatch.measure.ring import Ring, end_to_end
from paramwatch.testing import ListSink


class Done:
    """The mark of a copy that was made at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Counting:
    """A transport that copies at once."""

    def __init__(self) -> None:
        self.copies = 0

    def room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def queue(self, tensor: Tensor) -> str:
        return "default"

    def packed(self, tensors: Sequence[Tensor], queue: str) -> Tensor:
        return end_to_end(tensors)

    def copy(self, tensor: Tensor, to: Tensor, queue: str) -> Done:
        self.copies += 1
        to.copy_(tensor)
        return Done()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def trained(sink: ListSink, optimizers: int = 1) -> None:
    torch.manual_seed(0)
    net = Tied()
    trainable = [p for p in net.parameters() if p.requires_grad]
    groups = [trainable[i::optimizers] for i in range(optimizers)]
    each = [torch.optim.SGD(params, lr=torch.tensor(0.1)) for params in groups]
    with paramwatch.attach(net, sinks=[sink], update="exact", histograms=1, uses=1, raw_gradients=True):
        for i in range(3):
            net.zero_grad()
            net(torch.ones(2, 4) * i).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            for optimizer in each:
                optimizer.step()


@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_step_with_everything_leaves_the_device_by_one_copy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, optimizers: int
) -> None:
    expected, sink = ListSink(), ListSink()
    for module, name in ((native, "available"), (packed, "fits"), (chunked, "takes")):
        monkeypatch.setattr(module, name, lambda *_: False)
    trained(expected, optimizers)
    counting = Counting()
    ring = Ring(transport=counting)
    monkeypatch.setattr(reading, "ring_of", cache(lambda device: ring))
    trained(sink, optimizers)

    assert caplog.messages == []
    # the round at the end holds what no optimizer steps
    assert len(sink.records) == len(expected.records) >= 3
    assert counting.copies == len(sink.records)
    for found, known in zip(sink.records, expected.records, strict=True):
        for part, values in known.values.items():
            np.testing.assert_array_equal(found.values[part], values, part)
        np.testing.assert_array_equal(found.lr, known.lr)
        for kind, counts in known.histograms.items():
            np.testing.assert_array_equal(found.histograms[kind], counts)
        assert found.uses.keys() == known.uses.keys()
        for row, split in known.uses.items():
            np.testing.assert_array_equal(found.uses[row].products, split.products)
