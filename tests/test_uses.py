"""Contributions of uses against the untied twin: the same bits, under the right names, and they add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from used_models import CASES, Case

import paramwatch
from paramwatch.record import Split
from paramwatch.testing import ListSink
from paramwatch.uses import contributions


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Tensor], Tensor]]:
    """What is multiplied: the contributions themselves, and what autograd delivered."""
    found: list[tuple[list[Tensor], Tensor]] = []
    gram = contributions.gram

    def spy(grads: list[Tensor], total: Tensor) -> Tensor:
        found.append(([grad.clone() for grad in grads], total.clone()))
        return gram(grads, total)

    monkeypatch.setattr(contributions, "gram", spy)
    return found


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
def test_contributions_are_those_of_the_untied_twin_bit_for_bit(case: Case, seen: list[tuple[list[Tensor], Tensor]]) -> None:
    split, gradient = split_of(case)
    twin, loss, copies = case.build(tied=False)
    loss(twin).backward()
    truth = [copy.grad.reshape(-1) for copy in copies(twin)]
    ((contributed, total),) = seen

    assert split.uses == case.uses
    assert len(contributed) == len(truth)
    for name, found, true in zip(split.uses, contributed, truth, strict=True):
        assert torch.equal(found, true), f"{name}: {(found - true).abs().max()}"
    assert torch.equal(total, gradient.reshape(-1))
    wide = torch.stack([*(x.double() for x in truth), total.double()])
    wide = torch.cat([wide, (wide[-1] - wide[:-1].sum(0))[None]])
    np.testing.assert_allclose(split.products, wide @ wide.T, rtol=1e-12, atol=1e-18 * float(total.norm()) ** 2)
    assert np.sqrt(split.products[-1, -1]) <= split.rounding
