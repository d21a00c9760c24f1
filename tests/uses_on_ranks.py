"""Gradients by use in several processes that train one model: of each one's part of the batch, and labelled so; training stays the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from untied import Multiplied, assert_contributions, multiplied, multiplied_for

import paramwatch
from paramwatch.record import Record
from paramwatch.testing import ListSink

USES = {
    "embed.weight": ("embed", "head"),
    "block.weight": ("block@0", "block@1"),
    "block.bias": ("block@0", "block@1"),
}


# FSDP2 of torch 2.6 runs on no CPU
SHARDS = hasattr(torch.cpu.current_stream(), "record_event")


def verify_uses() -> None:
    """To be called by each of several processes, which have met."""
    for wrap, backwards in ((shared, 1), (shared, 3), (shared_in_buckets, 1), (sharded, 1), (sharded, 3), (sharded_in_bfloat16, 1)):
        if wrap in (shared, shared_in_buckets) or SHARDS:
            _verify(wrap, backwards)
    for wrap in (shared, sharded):
        if wrap is shared or SHARDS:
            for change, factor, mode in ((None, 1.0, ""), (halve, 0.5, ""), (forget, 0.0, ""), (shift, 1.0, ", changed between")):
                _verify_changed(wrap, change, factor, mode)


class Language(nn.Module):
    """A head that is tied to the embedding, and between them a layer that is called twice."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.block = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight if tied else nn.Parameter(self.embed.weight.detach().clone())
        self.twin = None if tied else nn.Linear(16, 16)
        if self.twin is not None:
            self.twin.load_state_dict(self.block.state_dict())

    def forward(self, words: Tensor) -> Tensor:
        again = self.block if self.twin is None else self.twin
        return self.head(torch.tanh(again(torch.tanh(self.block(self.embed(words))))))


def loss_of(net: nn.Module, step: int, i: int) -> Tensor:
    """On words that no other rank, step or backward pass has."""
    seed = 100 * distributed.get_rank() + 10 * step + i
    words = torch.randint(0, 30, (5, 4), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(net(words[:-1]).flatten(0, 1), words[1:].flatten())


def shared(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def shared_in_buckets(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net, gradient_as_bucket_view=True, static_graph=True)


def sharded(net: nn.Module, **options: Any) -> nn.Module:
    # importing it warns of torch's own use of torch.jit
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.block, **options)
    fully_shard(net, **options)
    return net


def sharded_in_bfloat16(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return sharded(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def train(wrap: Callable[[nn.Module], nn.Module], backwards: int, watched: bool) -> tuple[list[Tensor], list[Record], Multiplied]:
    """What was learned; of a watched run also the records, and what was multiplied for them."""
    net = Language(True)
    wrapped: Any = wrap(net)
    sink, learned = ListSink(), []
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(multiplied())
        if watched:
            watch = stack.enter_context(paramwatch.attach(net, uses=2, uses_of="*", sinks=[sink]))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            for i in range(backwards):
                last = i == backwards - 1
                waits = isinstance(wrapped, DistributedDataParallel) and not last
                if not isinstance(wrapped, DistributedDataParallel):
                    wrapped.set_requires_gradient_sync(last)
                with wrapped.no_sync() if waits else contextlib.nullcontext():
                    loss = loss_of(wrapped, step, i)
                    loss.backward()
                learned.append(loss.detach())
            optimizer.step()
        if watched:
            assert not watch.recorder.splits.guard.failed  # type: ignore[union-attr]
            assert watch.agreement()["residual"].lt(1e-7 if loss.dtype is torch.float32 else 1e-2).all()
    return learned + [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in net.parameters()], sink.records, seen


def truth(backwards: int, dtype: torch.dtype) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """The gradients of this rank's part of the first step: of the untied twin, by row, and of the model."""
    net, twin = Language(True).to(dtype), Language(False).to(dtype)
    for each in (net, twin):
        for i in range(backwards):
            loss_of(each, 0, i).backward()
    layers = {"embed": (twin.embed, twin.head), "block": (twin.block, twin.twin)}
    apart = {row: [getattr(layer, row.split(".")[1]).grad for layer in layers[row.split(".")[0]]] for row in USES}
    return apart, {row: net.get_parameter(row).grad for row in USES}


def _verify(wrap: Callable[[nn.Module], nn.Module], backwards: int) -> None:
    (bare, _, _), (learned, records, seen) = (train(wrap, backwards, watched) for watched in (False, True))
    apart, whole = truth(backwards, torch.bfloat16 if wrap is sharded_in_bfloat16 else torch.float32)

    assert all(torch.equal(one, other) for one, other in zip(bare, learned, strict=True))
    assert [len(record.uses) for record in records] == [3, 0, 3]
    for row, split in records[0].uses.items():
        found, total = multiplied_for(whole[row], seen)
        assert split.uses == USES[row]
        assert (split.mode, split.backwards) == ("full (this rank)", backwards)
        assert_contributions(split, found, total, apart[row], whole[row])


def halve(gradient: Tensor) -> None:
    gradient.mul_(0.5)


def forget(gradient: Tensor) -> None:
    gradient.zero_()


def shift(gradient: Tensor) -> None:
    """No version of anything is another one after that."""
    gradient.data.add_(0.05)


def _verify_changed(wrap: Callable[[nn.Module], nn.Module], change: Callable[[Tensor], None] | None, factor: float, mode: str) -> None:
    """A gradient that is averaged after each of two passes of a step, and changed between them; in the first split step and a later one."""
    net, twin = Language(True), Language(False)
    wrapped = wrap(net)
    with paramwatch.attach(net, uses=1) as watch:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        for step in range(2):
            optimizer.zero_grad()
            for i in range(2):
                loss_of(wrapped, step, i).backward()
                for parameter in net.parameters() if change is not None and not i else ():
                    change(parameter.grad)
            if step and change is shift:
                for parameter in net.parameters():
                    shift(parameter.grad)
            optimizer.step()

    for step in range(2):
        twin.zero_grad()
        (factor * loss_of(twin, step, 0) + loss_of(twin, step, 1)).backward()
        parts = torch.stack([twin.embed.weight.grad, twin.head.weight.grad]).double()
        shares = (parts * parts.sum(0)).sum((1, 2)) / parts.sum(0).square().sum()
        frame = watch.uses().loc[(step, "embed.weight")]
        later = ", changed later" if step and change is shift else ""
        assert list(frame.index) == ["embed", "head"]
        assert frame["use_share"].tolist() == pytest.approx(shares.tolist(), rel=1e-4)
        assert set(frame["mode"]) == {f"full (this rank){mode}{later}"}, frame
    assert watch.findings.empty
