"""The truth harness over a large frozen base with small adapters: the memory of the base is left alone at ordinary steps."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Lab, verify
from loops import OPTIONS, loss_of, sgd
from torch import Tensor, nn

PAGES = Path("/proc/self/pagemap")


class Adapted(nn.Module):
    """A frozen linear map, each tensor in a mapping of its own, with a product of two thin matrices beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
        self.mappings = [mmap.mmap(-1, param.nbytes) for param in self.base.parameters()]
        for (name, param), mapping in zip(self.base.named_parameters(), self.mappings, strict=True):
            memory = torch.frombuffer(mapping, dtype=param.dtype).view(param.shape).copy_(param)
            setattr(self.base, name, nn.Parameter(memory, requires_grad=False))
        self.down = nn.Linear(inputs, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, outputs, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Touched:
    """Whether memory was read or written inside a `with`, by whatever means: pages given back before are there again only if used."""

    def __init__(self, mappings: list[mmap.mmap]) -> None:
        self.history: list[bool] = []
        self._mappings = mappings

    @contextmanager
    def noted(self) -> Iterator[None]:
        for mapping in self._mappings:
            # a shared mapping keeps its contents
            mapping.madvise(mmap.MADV_DONTNEED)
        yield
        self.history.append(any(map(_pages_there, self._mappings)))


def _pages_there(mapping: mmap.mmap) -> int:
    """How many pages of a mapping the process has in its table."""
    start, entry = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() // mmap.PAGESIZE, 8
    with PAGES.open("rb", buffering=0) as table:
        table.seek(start * entry)
        entries = struct.iter_unpack("=Q", table.read(-(-len(mapping) // mmap.PAGESIZE) * entry))
    return sum(present >> 63 for (present,) in entries)


def _can_be_noted() -> bool:
    if not PAGES.exists() or not hasattr(mmap, "MADV_DONTNEED"):
        return False
    mapping, there = mmap.mmap(-1, mmap.PAGESIZE), []
    mapping[0] = 1
    touched = Touched([mapping])
    with touched.noted():
        there.append(_pages_there(mapping))
    with touched.noted():
        there.append(mapping[0])
    return there == [0, 1] and touched.history == [False, True]


@pytest.mark.skipif(not _can_be_noted(), reason="this system does not tell which memory was used")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_only_the_adapters_of_a_frozen_base_are_read_at_each_step(options: dict[str, Any]) -> None:
    histories = []

    def adapters(lab: Lab) -> None:
        torch.manual_seed(0)
        # one tensor is large, the others are small
        net = nn.Sequential(Adapted(3, 300), nn.Tanh(), Adapted(300, 300), nn.Tanh(), Adapted(300, 1))
        optimizer = sgd(param for param in net.parameters() if param.requires_grad)
        touched = Touched([mapping for layer in (net[0], net[2], net[4]) for mapping in layer.mappings])
        lab.attach(net)
        for i in range(11):
            optimizer.zero_grad()
            (loss_of(net, i) / 256).backward()
            with lab.by_update(optimizer), touched.noted():
                optimizer.step()
        histories.append([step for step, used in enumerate(touched.history) if used])

    frame = verify(adapters, **options).watch.frame("param_norm")
    base = frame.loc[:, frame.columns.str.contains("base")]
    assert histories == [[], [0, 1, 2, 4, 8]]
    assert list(base.index[base.notna().all(axis=1)]) == list(base.index[base.notna().any(axis=1)]) == [0, 1, 2, 4, 8, 10]
    assert frame.drop(columns=base.columns).notna().all(axis=None)
