"""The Triton path where there is a GPU: nobody waits, streams are kept to, large tensors; and what is said where there is none."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paramwatch.measure import capture, gpu, trusted
from paramwatch.measure.naive import ORDER, as_reals, parts
from paramwatch.measure.native import TYPES
from paramwatch.measure.ring import Ring

CUDA = torch.device("cuda")
MEAN, COUNT = ORDER.index("mean"), ORDER.index("count")

device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(CUDA).manual_seed(0), device=CUDA).to(dtype)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


# ---- where there is none --------------------------------------------------------------------


def test_a_cpu_is_not_measured_here_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not gpu.takes(torch.zeros(3))
        assert not trusted.takes(torch.zeros(3))
        trusted.prepare(lambda: [torch.zeros(3)], histograms=True)
    assert caplog.text == ""


def test_of_a_device_of_another_kind_it_is_said_once_that_the_kernels_are_not_for_it(caplog: pytest.LogCaptureFixture) -> None:
    trusted._say_plain.cache_clear()
    elsewhere = SimpleNamespace(device=torch.device("mps"), is_cuda=False, dtype=torch.float32)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            trusted.prepare(lambda: [torch.zeros(3), elsewhere], histograms=True)  # type: ignore[list-item]  # it has what is asked for

    assert len(caplog.records) == 1
    assert "measuring on mps in plain PyTorch" in caplog.text


def test_a_build_of_torch_without_cuda_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    trusted._is_there.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [trusted.works(CUDA, torch.float32) for _ in range(3)] == [False] * 3
    trusted._is_there.cache_clear()

    assert len(caplog.records) == 1
    assert "measuring on cuda in plain PyTorch" in caplog.text
    assert "the kernels are for CUDA" in caplog.text


@pytest.mark.parametrize(("capability", "triton", "said"), [((7, 0), True, "compute capability 7.5"), ((9, 0), False, "Triton")])
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: bool, said: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not triton:
        for name in [name for name in sys.modules if name.startswith("paramwatch.measure.triton")]:
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(sys.modules["paramwatch.measure"], name.rpartition(".")[2])
        monkeypatch.setitem(sys.modules, "triton", None)
        gpu.kernels.cache_clear()

    assert said in str(trusted._obstacle(CUDA))


def test_no_graph_is_captured_where_there_is_no_gpu() -> None:
    assert not capture.capturing()


def test_nothing_is_measured_as_no_rows() -> None:
    assert gpu.measure([]).shape == (0, len(ORDER))
    assert [found.shape for found in gpu.measure_update([], [])] == [(0, len(ORDER))] * 2


# ---- where there is one ---------------------------------------------------------------------


@device
def test_the_path_can_be_used() -> None:
    for dtype in TYPES:
        assert trusted.works(CUDA, dtype)
        assert trusted.works(CUDA, dtype, histograms=True)


@device
def test_what_is_plain_and_dense_is_taken_and_nothing_else() -> None:
    x = noise(8, 6)
    taken = [x, x.t(), x[2:], nn.Parameter(x), x.half(), x.bfloat16(), x.double(), noise(0, 3), x[0, 0], x.view(-1)[1:]]
    others = [x[:, ::2], x.expand(3, 8, 6), x.cpu(), x.int(), x.to(torch.complex64), x.to_sparse(), x.to(torch.float8_e5m2)]
    freed = noise(9)[1:]
    freed.untyped_storage().resize_(0)

    assert all(gpu.takes(tensor) for tensor in taken)
    assert not any(gpu.takes(tensor) for tensor in [*others, freed])


@device
def test_what_lies_alike_is_compared() -> None:
    x = noise(8, 6)

    assert gpu.are_alike(x, x.clone(), x.half())
    assert gpu.are_alike(x.t(), x.t().clone(), None)
    assert not gpu.are_alike(x, x.half(), None)
    assert not gpu.are_alike(x.t(), x.t().contiguous(), None)
    assert not gpu.are_alike(x, x[:4], None)


@device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [5_000_000, 5_000_001])
def test_large_tensors_have_the_parts_that_the_specification_says(n: int, dtype: torch.dtype) -> None:
    x = noise(n, dtype=dtype)
    found, expected = gpu.measure([x])[0].cpu().numpy(), parts(as_reals(x)).cpu().numpy()
    update, itself = (each[0].cpu().numpy() for each in gpu.measure_update([x], [x * 0.5], [x]))

    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(itself, found)
    moved = as_reals(x) - as_reals(x * 0.5)
    np.testing.assert_allclose(update, parts(moved, as_reals(x)).cpu().numpy(), rtol=2e-6, atol=1e-6)


@device
def test_more_than_2_to_the_31_elements_are_read_and_copied() -> None:
    n = (1 << 31) + 4097
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("the GPU has too little memory free")
    x, copy = torch.ones(n, dtype=torch.bfloat16, device=CUDA), torch.zeros(n, dtype=torch.bfloat16, device=CUDA)
    x[-1] = 3
    found = dict(zip(ORDER, gpu.measure([x], [copy])[0].tolist(), strict=True))

    assert (found["count"], found["min"], found["max"]) == (n, 1, 3)
    assert torch.equal(copy[-5000:], x[-5000:])
    assert copy.min() == 1


@device
def test_the_bits_are_the_same_from_run_to_run() -> None:
    tensors = [noise(n, dtype=dtype) for n in (7, 4097, 300_001, 3_000_000) for dtype in (torch.float32, torch.bfloat16)]
    before, first = [x * 0.9 for x in tensors], gpu.measure(tensors)
    update = gpu.measure_update(tensors, before, tensors)

    for _ in range(10):
        assert torch.equal(gpu.measure(tensors).view(torch.int64), first.view(torch.int64))
        for again, known in zip(gpu.measure_update(tensors, before, tensors), update, strict=True):
            assert torch.equal(again.view(torch.int64), known.view(torch.int64))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, ring: Ring, copies: list[Tensor], scale: Tensor) -> bool:
    """A training step, measured."""
    optimizer.zero_grad()
    net(x).square().mean().backward()
    parameters = [p.detach() for p in net.parameters()]
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    sent = [ring.send(gpu.measure(parameters, copies)), ring.send(gpu.measure(grads, scale=scale))]
    optimizer.step()
    update, itself = gpu.measure_update(parameters, copies, grads, scale)
    sent += [ring.send(update.contiguous()), ring.send(itself.contiguous())]
    ready = all(slot is None or slot.ready for slot in sent)
    for slot in sent:
        if slot is not None:
            slot.release()
    return ready


@device
@pytest.mark.usefixtures("no_waiting")
def test_ten_measured_steps_never_wait_for_the_device() -> None:
    torch.cuda.set_sync_debug_mode("default")
    net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 7), nn.LayerNorm(7)).to(CUDA)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    copies, x, scale, ring = [torch.empty_like(p) for p in net.parameters()], noise(32, 64), torch.tensor(8.0, device=CUDA), Ring()
    for _ in range(2):
        step(net, optimizer, x, ring, copies, scale)
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(10):
        step(net, optimizer, x, ring, copies, scale)


@device
def test_what_is_read_is_what_is_there_in_the_order_of_the_stream() -> None:
    x, stream = torch.zeros(4_000_000, device=CUDA), torch.cuda.Stream()
    gpu.measure([x])
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x += 1
        first = gpu.measure([x])
        x += 1
        second = gpu.measure([x])
        x += 1
    stream.synchronize()

    assert (first[0, MEAN].item(), second[0, MEAN].item()) == (1, 2)


@device
def test_memory_that_is_freed_after_the_call_is_read_before_it_is_used_again() -> None:
    x = torch.ones(4_000_000, device=CUDA)
    address = x.data_ptr()
    torch.cuda._sleep(50_000_000)
    found = gpu.measure([x])
    del x
    other = torch.zeros(4_000_000, device=CUDA)

    assert other.data_ptr() == address
    assert found[0, MEAN].item() == 1


@device
def test_a_capture_is_seen() -> None:
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(3, device=CUDA)
    with torch.cuda.graph(graph):
        seen = capture.capturing()
        x += 1

    assert seen
    assert not capture.capturing()


@device
def test_fifteen_thousand_tensors_are_measured_in_one_call() -> None:
    tensors = list(noise(15_000, 64).unbind())
    found = gpu.measure(tensors)

    assert (found[:, COUNT] == 64).all()
    torch.testing.assert_close(found[:, MEAN], torch.stack(tensors).double().mean(1), rtol=0, atol=1e-6)
