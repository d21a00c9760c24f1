"""Contributions of uses against the untied twin: the same bits, under the right names, and they add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from untied import assert_contributions, multiplied, multiplied_for
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


LAYERS: dict[str, tuple[str, Callable[[nn.Module], Iterable[nn.Module]]]] = {
    "a_linear_with_three_inputs": ("a", lambda twin: (twin.a, twin.b, twin.c)),
    "rnn_cell": ("cell", lambda twin: twin.cells),
    "shared_attention": ("blocks.0", lambda twin: twin.blocks),
    "shared_convolution": ("a", lambda twin: (twin.a, twin.b)),
    "weight_norm": ("a", lambda twin: (twin.a, twin.b)),
    "gated_layer": ("layer", lambda twin: twin.layers),
}
"""The layer that is used several times, and those that it is in the twin."""


@pytest.mark.parametrize("name", LAYERS)
def test_so_are_those_of_every_parameter_of_a_layer(name: str) -> None:
    shared, layers = LAYERS[name]
    (net, loss, _), (twin, loss_apart, _), sink = CASES[name].build(True), CASES[name].build(False), ListSink()
    with multiplied() as seen, paramwatch.attach(net, uses=1, uses_of=f"{shared}.*", sinks=[sink]):
        loss(net).backward()
        torch.optim.SGD(net.parameters(), lr=0.0).step()
    loss_apart(twin).backward()

    (record,) = sink.records
    for key, parameter in net.get_submodule(shared).named_parameters():
        # a recurrent layer multiplies what comes in at all moments at once
        assert (f"{shared}.{key}" in record.uses) == ("_ih_" not in key)
        if "_ih_" not in key:
            apart = [layer.get_parameter(key).grad for layer in layers(twin)]
            assert_contributions(record.uses[f"{shared}.{key}"], *multiplied_for(parameter.grad, seen), apart, parameter.grad)
