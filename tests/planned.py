"""Steps of models on the CPU that are measured as one on a GPU is: by kernels that read memory at the addresses which they are given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from gpu_trials import _like_on_a_gpu
from torch import Tensor, nn

import paramwatch
from paramwatch.deviceplan import FoldedOnDevice
from paramwatch.measure import chunked, gpu, native, packed, trusted
from paramwatch.measure.naive import ORDER, as_reals, parts
from paramwatch.measure.tables import DTYPES, Layout
from paramwatch.record import Record
from paramwatch.recorder import Recorder
from paramwatch.testing import ListSink

SCALED = [ORDER.index(part) for part in ("mean", "std", "rms", "min", "max")]


class Named:
    """A kernel that finds zeros; its launches are known."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.launched.append(self.name)
            if self.name == "fold":
                args[3].numpy()[...] = 0

        return launch


@contextmanager
def as_if_on_a_gpu() -> Iterator[list[str]]:
    """What is plain and on the CPU is measured by the kernels, and by nothing else; they are only named, and listed when launched."""
    launched: list[str] = []
    names = ("measure_chunks", "measure_updates", "fold", "count_chunks")
    kernels = SimpleNamespace(**{name: Named(name, launched) for name in names}, fields=11, elements=range(4), failure=RuntimeError)
    with ExitStack() as patches:
        patches.enter_context(patch.object(gpu, "kernels", lambda: kernels))
        for module in (trusted, gpu):
            patches.enter_context(patch.object(module, "takes", lambda x, _=False: _like_on_a_gpu(x) and x.device not in trusted._given_up))
        for other, name in ((native, "available"), (packed, "fits"), (chunked, "takes")):
            patches.enter_context(patch.object(other, name, lambda *_: False))
        yield launched
    trusted._given_up.clear()


def by_addresses(kernel: Named, layout: Layout, extra: dict[str, Any], scaled: int, scale: Tensor | None, found: Tensor) -> None:
    """What the kernels would find where the layout says that tensors are: `gpu._run`, in plain torch."""
    places = layout._addresses.reshape(-1, len(layout.numel)).tolist()
    for i, (code, n) in enumerate(zip(layout.codes.tolist(), layout.numel.tolist(), strict=True)):
        x, *other = (_at(row[i], n, DTYPES[code & 3]) for row in places)
        itself = parts(as_reals(x))
        if kernel.name == "measure_updates":
            found[0, i], found[1, i] = parts(as_reals(x) - as_reals(other[0])), itself
            continue
        if scale is not None:
            itself[SCALED] /= scale.double()
        found[0, i] = itself
        if layout.copied:
            other[0].copy_(x)


def _at(address: int, n: int, dtype: torch.dtype) -> Tensor:
    memory = (ctypes.c_uint8 * (n * dtype.itemsize)).from_address(address) if n else bytearray(0)
    return torch.frombuffer(memory, dtype=dtype) if n else torch.empty(0, dtype=dtype)


class Odd(nn.Module):
    """Rows of two types and of all shapes, one of which has a gradient at some steps only, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 7), nn.Linear(7, 2)
        self.second.weight.data = self.second.weight.data.t().contiguous().t()
        self.narrow = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        self.empty, self.single = nn.Parameter(torch.empty(0, 2)), nn.Parameter(torch.tensor(1.5))
        self.rare, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def loss(self, i: int) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(torch.ones(4, 3) * (i + 1)))) * self.single
        loss = out.square().mean() + self.narrow.float().square().sum() + self.empty.sum()
        return loss + self.rare.sum() if i % 2 else loss


def plainly(net: Odd, i: int, optimizer: Any) -> None:
    net.loss(i).backward()
    optimizer.step()


def with_a_closure(net: Odd, i: int, optimizer: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net.loss(i)
        loss.backward()
        return loss

    optimizer.step(closure)


def clipped(net: Odd, i: int, optimizer: Any) -> None:
    net.loss(i).backward()
    if i != 6:
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()


def scaled(net: Odd, i: int, optimizer: Any) -> None:
    """As `GradScaler` does with a fused optimizer; at one step there was an infinity."""
    (4 * net.loss(i)).backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(i == 6))
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def with_a_scaler(net: Odd, i: int, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(net.loss(i)).backward()
    scaler.step(optimizer)
    scaler.update()


def moved(net: Odd, i: int, optimizer: Any) -> None:
    """A row has other memory from the sixth step on, and another form at the last one."""
    if i == 6:
        net.first.bias.data = net.first.bias.data.clone()
    if i == 7:
        net.first.weight.data = net.first.weight.data.t().contiguous().t()
    net.loss(i).backward()
    optimizer.step()


WAYS: dict[str, tuple[Callable[[Odd, int, Any], None], type[torch.optim.Optimizer], int]] = {
    "plainly": (plainly, torch.optim.SGD, 3),
    "with a closure": (with_a_closure, torch.optim.SGD, 3),
    "clipped": (clipped, torch.optim.SGD, 1),
    "scaled": (scaled, torch.optim.Adam, 3),
    "with a scaler": (with_a_scaler, torch.optim.SGD, 3),
    "moved": (moved, torch.optim.SGD, 2),
}
"""By name: a step, the optimizer, and how many of eight steps go the quick way to their end."""


def trained(way: str, quick: bool) -> tuple[list[Record], int]:
    """The records of eight steps, and how many went the quick way to their end."""
    torch.manual_seed(0)
    net, sink, ended = Odd(), ListSink(), []
    step, kind, _ = WAYS[way]
    optimizer = kind(net.parameters(), lr=0.1, **({"fused": True} if way == "scaled" else {}))
    end = FoldedOnDevice.end

    def counted(self: FoldedOnDevice, *args: Any) -> bool:
        ended.append(end(self, *args))
        return ended[-1]

    with (
        as_if_on_a_gpu(),
        patch.object(gpu, "_run", by_addresses),
        patch.object(Recorder, "plans", quick),
        patch.object(FoldedOnDevice, "end", counted),
        paramwatch.attach(net, sinks=[sink], update="exact", raw_gradients=True),
    ):
        for i in range(8):
            optimizer.zero_grad()
            step(net, i, optimizer)
    return [_plain(record) for record in sink.records], sum(ended)


def _plain(record: Record) -> Any:
    return dict(record.values), record.lr, record.grad_state, {**record.steps, "overhead_us": 0}, record.changes.outside


def failing(fails: bool) -> list[Any]:
    """The records where no kernel can be launched from the sixth step on, or where they can."""
    torch.manual_seed(0)
    net, sink = Odd(), ListSink()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with as_if_on_a_gpu(), paramwatch.attach(net, sinks=[sink], update="exact"):
        for i in range(8):
            optimizer.zero_grad()
            net.loss(i).backward()
            with patch.object(gpu, "_run", _out_of_resources if fails and i >= 6 else by_addresses):
                optimizer.step()
    return [_plain(record) for record in sink.records]


def _out_of_resources(*args: Any) -> None:
    raise RuntimeError("out of resources")
