"""Tensors whose memory was taken away for a while (offloading, sharding): nothing is read there, and all else is recorded as ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paramwatch
from paramwatch.measure import measure, native
from paramwatch.storage import Addresses, has_address, is_there

SIZE = 300
"""Of a side: a null address, or one past the end, is not read by luck."""

LEFT = {"nothing": 0, "a part": 64}
"""Bytes."""

PATHS = ("the kernel", "plain torch")


@contextmanager
def away(tensor: Tensor, left: int = 0) -> Iterator[None]:
    """Without its memory, or with only some of it; afterwards it is as before."""
    kept, storage = tensor.detach().clone(), tensor.untyped_storage()
    size = storage.nbytes()
    storage.resize_(left)
    yield
    storage.resize_(size)
    tensor.data.copy_(kept)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2))
    net[0].requires_grad_(False)
    return net


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain torch":
        monkeypatch.setattr(native, "available", bool)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("first", [0, 1, 7], ids=lambda first: f"from step {first}")
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "in no optimizer"])
@pytest.mark.parametrize("options", [{}, {"update": "sampled"}, {"detail": "full", "histograms": 1}], ids=str)
def test_a_parameter_without_memory_is_not_read_and_the_others_are(owned: bool, first: int, left: int, options: dict[str, Any]) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters() if owned else net[1].parameters(), lr=0.1)
    watch = paramwatch.attach(net, **options)
    norms = []
    for step in range(10):
        optimizer.zero_grad()
        net(torch.ones(2, SIZE)).sum().backward()
        norms.append(torch.linalg.vector_norm(net[1].weight.detach().double()).item())
        with away(net[0].weight, left if first <= step < 9 else net[0].weight.nbytes):
            optimizer.step()
    watch.close()

    assert not watch.recorder.guard.failed
    frame = watch.frame("param_norm")
    np.testing.assert_allclose(frame["1.weight"], norms, rtol=1e-6)
    if owned:
        truly = torch.linalg.vector_norm(net[0].weight.double()).item()
        np.testing.assert_allclose(frame["0.weight"], [truly] * first + [np.nan] * (9 - first) + [truly], rtol=1e-6)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("first", [0, 3], ids=lambda first: f"from step {first}")
def test_a_gradient_without_memory_is_not_read(first: int) -> None:
    net = model()
    optimizer, step = torch.optim.SGD(net[1].parameters(), lr=0.0), -1
    watch = paramwatch.attach(net)
    for step in range(6):
        optimizer.zero_grad()
        net(torch.ones(2, SIZE)).sum().backward()
        grad = net[1].weight.grad
        assert grad is not None
        # one that neither torch nor anyone else reads: an optimizer that makes no step
        with away(grad, 0 if step >= first else grad.nbytes), watch.step(optimizer):
            pass
    watch.close()

    assert not watch.recorder.guard.failed
    norms = watch.frame("grad_norm")
    assert norms["1.weight"].isna().tolist() == [step >= first for step in range(6)]
    assert norms["1.bias"].notna().all()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("first", [0, 3], ids=lambda first: f"from step {first}")
def test_zeros_that_torch_makes_no_memory_for_are_zeros(first: int) -> None:
    net = model()
    optimizer = torch.optim.SGD(net[1].parameters(), lr=0.1)
    watch = paramwatch.attach(net)
    for step in range(6):
        optimizer.zero_grad()
        net(torch.ones(2, SIZE)).sum().backward()
        if step >= first:
            net[1].weight.grad = torch._efficientzerotensor((2, SIZE))
        optimizer.step()
    watch.close()

    line = watch.frame(parameters="1.weight")
    assert (line["grad_norm"].to_numpy() == 0).tolist() == [step >= first for step in range(6)]
    assert (line["grad_zero_frac"].to_numpy() == 1).tolist() == [step >= first for step in range(6)]
    assert not watch.recorder.guard.failed


def test_a_gradient_without_memory_is_split_as_it_was_delivered() -> None:
    net = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(2)))
    net[1].weight = net[0].weight
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    watch = paramwatch.attach(net, uses=1)
    for step in range(4):
        optimizer.zero_grad()
        net(torch.ones(2, SIZE)).square().mean().backward()
        grad = net[0].weight.grad
        assert grad is not None
        with away(grad, 0 if step >= 2 else grad.nbytes), watch.step(optimizer):
            pass
    watch.close()

    shares = watch.uses()["use_share"].unstack("use").to_numpy()
    assert shares.shape == (4, 2)
    np.testing.assert_allclose(shares, shares[:1].repeat(4, 0), rtol=1e-6)


def test_a_model_without_memory_can_be_attached_looked_at_and_left() -> None:
    net = model()
    whole = paramwatch.attach(net)
    with away(net[0].weight):
        whole.close()
        watch = paramwatch.attach(net)
        found, groups = paramwatch.summary(net), paramwatch.tie_groups(net)
        watch.close()

    assert watch.parameters.loc["0.weight", "dtype"] == "float32 (unsupported)"
    assert watch.parameters.loc["0.bias", "dtype"] == "float32"
    assert found.frame.loc["0.weight", "looks_like"] == "without memory for now: no values"
    assert list(groups) == []


def test_views_of_memory_that_is_gone_share_none() -> None:
    flat = torch.ones(3 * SIZE)
    net = nn.Module()
    for i in range(2):
        net.register_parameter(f"p{i}", nn.Parameter(flat[i * SIZE // 2 : i * SIZE // 2 + SIZE]))
    assert len(paramwatch.tie_groups(net)) == 1
    with away(flat):
        assert list(paramwatch.tie_groups(net)) == []


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x, id="whole"),
        pytest.param(lambda x: x[100:], id="behind an offset"),
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="strided"),
        pytest.param(lambda x: x[:1].expand(SIZE, SIZE), id="expanded"),
    ],
)
def test_what_is_there_is_told_to_the_last_byte(view: Callable[[Tensor], Tensor]) -> None:
    whole = torch.ones(SIZE, SIZE)
    x = view(whole)
    last = 1 + x.storage_offset() + sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    whole.untyped_storage().resize_(4 * last)
    assert is_there(x)
    assert has_address(x)
    assert not np.isnan(measure([x]).numpy()[0, 0])
    whole.untyped_storage().resize_(4 * last - 1)
    assert not is_there(x)
    assert not has_address(x)
    assert np.isnan(measure([x]).numpy()).all()


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_tensor_without_its_values_is_not_read(layout: torch.layout) -> None:
    x = torch.eye(SIZE).to_sparse(layout=layout)
    stored = x._values() if layout is torch.sparse_coo else x.values()
    stored.untyped_storage().resize_(0)
    assert not is_there(x)
    assert np.isnan(measure([x]).numpy()).all()


def test_what_has_no_elements_needs_no_memory() -> None:
    x = torch.ones(4)[:0]
    x.untyped_storage().resize_(0)
    assert is_there(x)
    assert has_address(x)
    assert measure([x]).numpy()[0, 0] == 0


def _cut(x: Tensor, elements: int) -> Tensor:
    x.untyped_storage().resize_(4 * elements)
    return x


@pytest.mark.parametrize(
    "make",
    [lambda: _cut(torch.ones(3), 2), lambda: _cut(torch.ones(4)[1:], 3), lambda: torch._efficientzerotensor((3,))],
    ids=["less memory", "as much, farther back", "none"],
)
def test_that_tensors_were_there_does_not_say_that_others_of_their_form_are(make: Callable[[], Tensor]) -> None:
    addresses, there, elsewhere = Addresses(), [torch.ones(3), torch.ones(3)], [torch.ones(3), torch.ones(3)]

    for tensors in (there, elsewhere, there):
        assert addresses.of(tensors) == [x.data_ptr() for x in tensors]
    assert addresses.of([elsewhere[0], make()]) is None
    assert addresses.of(elsewhere) is not None
