"""Nothing on the way from a tensor on a GPU to the ring makes anyone wait, in plain torch either: seen on tensors that only pretend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import paramwatch.measure as measuring
from paramwatch.bins import BINS
from paramwatch.measure import histograms, naive, reading, sampled, scaled
from paramwatch.measure.ring import end_to_end
from paramwatch.uses.arriving import Budget
from paramwatch.uses.contributions import Contributions
from paramwatch.uses.reading import SplitReading
from paramwatch.uses.sites import Site

WAITING = ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "equal", "is_nonzero", "bincount", "histc")


class Waits(TorchDispatchMode):
    """Collects the operations that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim}
        out = func(*args, **kwargs)
        devices |= {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)}
        name = func.overloadpacket.__name__
        self.seen += 1
        moves = name in ("_to_copy", "copy_") and len(devices) > 1 and not (kwargs.get("non_blocking") or True in args[2:])
        by_mask = name in ("index", "index_put_") and any(x.dtype is torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor))
        if name in WAITING or moves or by_mask:
            self.found.append(name)
        return out


class Sent:
    """A ring that takes everything."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def queue(self, tensor: Tensor) -> None:
        """There is one."""

    def send(self, tensors: Sequence[Tensor], queue: None) -> None:
        self.tensors.append(end_to_end(tensors))


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sent]:
    """Pretended tensors on a GPU are taken as plain ones, and what is sent there in pinned memory is simply there."""
    ring = Sent()
    monkeypatch.setattr(naive, "_PLAIN", (*naive._PLAIN, FakeTensor))
    monkeypatch.setattr(reading, "ring_of", lambda device: ring)
    monkeypatch.setattr(measuring, "stream_now", lambda device: None)
    for module in (scaled, sampled):
        monkeypatch.setattr(module, "sent", lambda tensor, device: torch.empty_like(tensor, device=device))
        monkeypatch.setattr(module, "stream_of", lambda device: 0)
    for cache in (scaled.mask, sampled.positions, sampled.columns):
        cache.cache_clear()
    with FakeTensorMode():
        yield ring
    for cache in (scaled.mask, sampled.positions, sampled.columns):
        cache.cache_clear()


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


plain = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot take a fake tensor as a plain one")


def test_a_wait_would_be_seen(ring: Sent) -> None:
    x = on_gpu(3)
    with Waits() as waits:
        x.cpu()
        torch.empty(3).copy_(x)
        x.to("cpu", torch.float64)
        x.to("cpu", non_blocking=True)
    assert waits.found == ["_to_copy", "copy_", "_to_copy"]


@plain
@pytest.mark.parametrize("scale", [None, "cuda", "cpu"])
def test_measuring_in_plain_torch_waits_for_nothing(ring: Sent, scale: str | None) -> None:
    tensors = [on_gpu(3, 5), on_gpu(70_000), on_gpu(7, dtype=torch.bfloat16), on_gpu()]
    factor = None if scale is None else torch.empty((), device=scale)
    with Waits() as waits:
        readings = [
            measuring.measure(tensors, factor),
            *measuring.measure_end(tensors, measuring.Kept(tensors), tensors, factor),
            histograms.histograms(tensors, None if scale == "cpu" else factor),
            histograms.update_histograms(tensors, tensors),
        ]
        measuring.send(readings)

    assert waits.seen > 100
    assert waits.found == []
    parts, counted = 3 * len(tensors) * len(measuring.ORDER), 2 * len(tensors) * BINS
    assert [(x.device.type, x.numel()) for x in ring.tensors] == [("cuda", parts + counted)]


@plain
def test_samples_wait_for_nothing(ring: Sent) -> None:
    tensors = [on_gpu(9_000), on_gpu(3)]
    with Waits() as waits:
        before = [measuring.sample(tensor) for tensor in tensors]
        measuring.send([measuring.measure_sampled_update(tensors, before)])

    assert waits.found == []
    assert [x.numel() for x in ring.tensors] == [2 * len(measuring.ORDER)]


def test_numbers_of_the_host_meet_a_factor_on_a_gpu_without_waiting(ring: Sent) -> None:
    with Waits() as waits:
        found = scaled.unscaled([([0], torch.empty(1, len(measuring.ORDER), dtype=torch.float64))], torch.empty((), device="cuda"), [5])
        scalars = reading.read_scalars([0.1, torch.empty((), device="cuda"), None])
        measuring.send([reading.Reading(found, (1, len(measuring.ORDER))), scalars])

    assert waits.found == []
    assert [x.numel() for x in ring.tensors] == [len(measuring.ORDER) + 1]


@pytest.mark.parametrize(("budget", "mode"), [(1 << 30, "full"), (200_000, "stream"), (0, "norms")])
@pytest.mark.parametrize("passes", [1, 2])
def test_splitting_a_gradient_by_use_waits_for_nothing(budget: int, mode: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of the meta device, which have no elements: whoever asks for one meets an error."""
    sent, uses = Sent(), 5
    monkeypatch.setattr(reading, "ring_of", lambda device: sent)

    def made() -> Tensor:
        return torch.empty(200, 200, dtype=torch.bfloat16, device="meta")

    row = Contributions(made(), Budget(budget), always=False)
    with Waits() as waits:
        for task in range(passes):
            row.expected = uses
            for i in range(uses):
                row.take(task, Site("call", task, "", i, str(i)), made(), 2**-8)
            row.deliver(task, made(), made() if task else None, True, None)
        sums = row.sums()
        assert sums is not None
        # products stay where they were made, and those of all rows travel together
        measuring.send([SplitReading([("weight", sums), ("other", sums)]).reading])

    assert sums.mode.split(", ")[0] == mode
    assert sums.backwards == (passes if mode == "full" else 1)
    assert waits.seen > 20
    assert waits.found == []
    # whether what the last pass was added to is zero is one more number, if only that pass counts; so is what a sample shows to be missing
    more = (passes == 2 and mode != "full") + (mode == "norms")
    assert [(x.device.type, x.numel()) for x in sent.tensors] == [("meta", 2 * ((uses + 2) ** 2 + more))]
