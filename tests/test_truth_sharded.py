"""Two processes that train one model: the truth harness over `ZeroRedundancyOptimizer`, and gradients by use, of each one's own part.

They are started once, and write down how each part went.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import LR, Lab, verify
from loops import OPTIONS, closure_of, loss_of, mlp, sgd
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from uses_on_ranks import SHARDS, verify_uses

import paramwatch

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


def verify_steps() -> None:
    for loop in (sharded, sharded_in_buckets, sharded_with_a_closure):
        for options in OPTIONS.values():
            lab = verify(loop, **options)
            assert lab.watch is not None
            assert lab.watch.frame("update_norm").gt(0).all(axis=None)


def verify_clipping() -> None:
    """Of a shard torch counts other writes than of a tensor."""
    # importing it warns of torch's own use of torch.jit
    from torch.distributed.fsdp import fully_shard

    net: Any = fully_shard(mlp())
    optimizer, watch = sgd(net), paramwatch.attach(net, raw_gradients=True)
    raw, used = [], []
    for i in range(4):
        optimizer.zero_grad()
        loss_of(net, RANKS * i + distributed.get_rank()).backward()
        raw.append(_local_norms(net))
        if i:
            nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        if i == 2:
            loss_of(net, i).backward()
        used.append(_local_norms(net))
        optimizer.step()
    # that of another micro-batch was added to a clipped one; a shard may be empty
    raw[2] = np.where(raw[2] > 0, np.nan, 0)
    np.testing.assert_allclose(watch.frame("grad_norm"), used, rtol=1e-6)
    np.testing.assert_allclose(watch.frame("grad_raw_norm"), raw, rtol=1e-6)
    watch.close()


def _local_norms(net: nn.Module) -> np.ndarray:
    return np.array([float(param.grad.to_local().norm()) for param in net.parameters()])


def _child(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting_point'}", rank=rank, world_size=RANKS)
    for verified in (verify_steps, *([verify_clipping] if SHARDS else []), verify_uses):
        said = folder / f"{verified.__name__}.{rank}"
        try:
            verified()
        except BaseException:
            said.write_text(traceback.format_exc(), encoding="utf-8")
            # the other rank waits for this one, and learns of it by its end
            raise
        said.write_text("done", encoding="utf-8")
    distributed.destroy_process_group()


def start(folder: str) -> None:
    """In a process that has imported all this for both."""
    torch.multiprocessing.start_processes(_child, (Path(folder),), nprocs=RANKS, start_method="fork")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each process has written how it went."""
    folder = tmp_path_factory.mktemp("ranks")
    code = f"import {__name__} as here; here.start({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
    return folder


def _each_said(folder: Path, part: str) -> list[str]:
    return [said.read_text(encoding="utf-8") for said in sorted(folder.glob(f"{part}.*"))]


def test_each_process_records_all_parameters_though_it_steps_a_share_of_them(said: Path) -> None:
    assert _each_said(said, "verify_steps") == ["done"] * RANKS


@pytest.mark.skipif(not SHARDS, reason="this torch shards on no CPU")
def test_each_process_records_its_part_of_the_gradients_before_clipping(said: Path) -> None:
    assert _each_said(said, "verify_clipping") == ["done"] * RANKS


def test_each_process_splits_its_own_part_of_the_gradients_and_says_so(said: Path) -> None:
    assert _each_said(said, "verify_uses") == ["done"] * RANKS
