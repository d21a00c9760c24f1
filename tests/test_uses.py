"""Contributions of uses against the untied twin: the same bits, under the right names, and they add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from untied import assert_contributions, multiplied
from used_models import CASES, Case

import paramwatch
from paramwatch.record import Split
from paramwatch.testing import ListSink


def split_of(case: Case, watched: str = "") -> tuple[Split, Tensor]:
    net, loss, _ = case.build(tied=True)
    sink = ListSink()
    watch = paramwatch.attach(net, uses=1, uses_of=watched or case.row, sinks=[sink])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss(net).backward()
    gradient = dict(net.named_parameters())[case.row].grad.clone()
    optimizer.step()
    watch.close()
    assert not watch.recorder.splits.guard.failed
    (record,) = sink.records
    return record.uses[case.row], gradient


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_contributions_are_those_of_the_untied_twin_bit_for_bit(case: Case) -> None:
    with multiplied() as seen:
        split, gradient = split_of(case)
    twin, loss, copies = case.build(tied=False)
    loss(twin).backward()
    ((contributed, total),) = seen

    if case.name == "weight_norm_cached" and not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"):
        pytest.skip("this torch does not tell what is saved through hooks: the uses of a cached weight are one, which is said")
    assert split.uses == case.uses
    assert_contributions(split, contributed, total, [copy.grad for copy in copies(twin)], gradient)
