"""The truth harness over `ZeroRedundancyOptimizer`: two processes, each with an optimizer inside for its share of the parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import LR, Lab, verify
from loops import OPTIONS, closure_of, loss_of, mlp
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

RANKS = 2

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch was built without gloo"
)


def sharded(lab: Lab) -> None:
    _sharded(lab, as_bucket_view=False, closure=False)


def sharded_in_buckets(lab: Lab) -> None:
    _sharded(lab, as_bucket_view=True, closure=False)


def sharded_with_a_closure(lab: Lab) -> None:
    _sharded(lab, as_bucket_view=False, closure=True)


def _sharded(lab: Lab, as_bucket_view: bool, closure: bool) -> None:
    # importing it warns of torch's own use of torch.jit
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = mlp()
    whole, rank = DistributedDataParallel(net), distributed.get_rank()
    # overlapping with DistributedDataParallel is not for gloo; by default it is off
    optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=torch.optim.SGD, parameters_as_bucket_view=as_bucket_view, lr=LR)
    lab.attach(net)
    mine = [param for group in optimizer.optim.param_groups for param in group["params"]]
    assert 0 < len(mine) < 4
    for i in range(3):
        batch = RANKS * i + rank
        if not closure:
            optimizer.zero_grad()
            loss = loss_of(whole, batch)
            loss.backward()
            lab.losses.append(loss.item())
        with lab.by_update(optimizer):
            optimizer.step(closure_of(whole, optimizer, batch) if closure else None)
    _assert_the_same_everywhere(net)


def _assert_the_same_everywhere(net: nn.Module) -> None:
    for param in net.parameters():
        copies = [torch.empty_like(param) for _ in range(RANKS)]
        distributed.all_gather(copies, param.detach())
        assert all(torch.equal(copy, param) for copy in copies)


def _child(rank: int, meeting_point: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=RANKS)
    for loop in (sharded, sharded_in_buckets, sharded_with_a_closure):
        for options in OPTIONS.values():
            lab = verify(loop, **options)
            assert lab.watch is not None
            assert lab.watch.frame("update_norm").gt(0).all(axis=None)
    distributed.destroy_process_group()


def test_each_process_records_all_parameters_though_it_steps_a_share_of_them(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_child, (str(tmp_path / "meeting_point"),), nprocs=RANKS)
