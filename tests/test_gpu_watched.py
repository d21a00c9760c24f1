"""A training on a GPU, watched: nobody waits, what is read is what the step used, and training is the same. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paramwatch
from paramwatch.bins import BINS, positions
from paramwatch.deviceplan import DevicePlan
from paramwatch.measure import capture, trusted
from paramwatch.record import Record
from paramwatch.recorder import Recorder
from paramwatch.testing import ListSink

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CUDA = "cuda"


@pytest.fixture(params=["kernels", "plain torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the Triton kernels, and as if there were none."""
    if request.param == "plain torch":
        monkeypatch.setattr(trusted, "takes", lambda tensor, histograms=False: False)
    return str(request.param)


@pytest.fixture
def default_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def net(device: str = CUDA) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 300), nn.Tanh(), nn.Linear(300, 7), nn.LayerNorm(7), nn.Linear(7, 1)).to(device)


def batch(i: int) -> Tensor:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(i))


def batches(n: int) -> list[Tensor]:
    return [batch(i).to(CUDA) for i in range(n)]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor], scaler: Any = None, clip: bool = False) -> None:
    for x in inputs:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if scaler is None:
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def histogram(x: Tensor) -> np.ndarray:
    return np.bincount(positions(x.detach().double().cpu().numpy().ravel()), minlength=BINS + 1)[:BINS]


def row(record: Record, name: str) -> int:
    return record.inventory.position[name]


@pytest.mark.parametrize("update", ["exact", "sampled", "off"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.usefixtures("default_mode")
def test_ten_watched_steps_never_wait(path: str, update: str, scaled: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, sink, inputs = net(), ListSink(), batches(13)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, lr=torch.tensor(1e-3, device=CUDA))
    scaler = torch.amp.GradScaler(CUDA) if scaled else None
    watch = paramwatch.attach(model, sinks=[sink], update=update, histograms=1, detail="full", raw_gradients=True)  # type: ignore[arg-type]
    run(model, optimizer, inputs[:3], scaler)
    torch.cuda.set_sync_debug_mode("error")
    run(model, optimizer, inputs[3:], scaler)
    torch.cuda.set_sync_debug_mode("default")
    watch.close()

    # a failure of ours reaches nobody's loop, and would be here
    assert [record.levelname for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert [each.step for each in sink.records] == list(range(13))
    assert all((each.values["count"][each.inventory.kinds.index("grad")] > 0).all() for each in sink.records)


@pytest.mark.parametrize("way", ["plain", "GradScaler", "clipped"])
@pytest.mark.usefixtures("default_mode")
def test_ten_steps_that_go_the_quick_way_never_wait(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model, sink, inputs = net(), ListSink(), batches(21)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    given = {"scaler": torch.amp.GradScaler(CUDA) if way == "GradScaler" else None, "clip": way == "clipped"}
    watch = paramwatch.attach(model, sinks=[sink], update="exact")
    # the model is read anew at step 8, and planned at step 9
    run(model, optimizer, inputs[:11], **given)
    plan = watch.recorder._plans.of(optimizer)
    torch.cuda.set_sync_debug_mode("error")
    run(model, optimizer, inputs[11:], **given)
    torch.cuda.set_sync_debug_mode("default")
    watch.close()

    assert isinstance(plan, DevicePlan)
    assert not plan.broken
    assert [record.levelname for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert [each.step for each in sink.records] == list(range(21))
    for record in sink.records:
        assert (record.values["count"][:3] > 0).all()
        assert 0 < record.steps["overhead_us"] < 1e7
        assert record.steps["overhead_host_us"] > 0


def test_the_quick_way_gives_the_records_of_the_general_one_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Record]] = []
    for quick in (True, False):
        monkeypatch.setattr(Recorder, "plans", quick)
        model, sink = net(), ListSink()
        with paramwatch.attach(model, sinks=[sink], update="exact"):
            run(model, torch.optim.AdamW(model.parameters()), batches(16))
        found.append(sink.records)
    for one, other in zip(*found, strict=True):
        for part, values in one.values.items():
            np.testing.assert_array_equal(values, other.values[part], part)
        np.testing.assert_array_equal(one.lr, other.lr)


def test_a_step_that_goes_on_in_another_stream_is_measured_when_it_is_done(path: str) -> None:
    model, sink, stepping = net(), ListSink(), torch.cuda.Stream()
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=0.1), []
    watch = paramwatch.attach(model, sinks=[sink], update="exact")
    for x in batches(14):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        before = model[0].weight.detach().clone()
        with watch.step(optimizer):
            stepping.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(stepping)
            torch.cuda._sleep(20_000_000)
            optimizer.step()
        torch.cuda.default_stream().wait_stream(stepping)
        torch.cuda.set_stream(torch.cuda.default_stream())
        expected.append((model[0].weight.detach() - before).double().square().mean().sqrt())
    watch.close()

    for record, rms in zip(sink.records, expected, strict=True):
        at = record.inventory.kinds.index("update"), row(record, "0.weight")
        assert record.values["rms"][at] == pytest.approx(rms.item(), rel=1e-5)


def test_what_is_recorded_is_what_the_step_used(path: str) -> None:
    model, sink = net(), ListSink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    with paramwatch.attach(model, sinks=[sink], update="exact", histograms=1):
        for x in batches(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            moved = {name: p.detach().double() - before[name].double() for name, p in model.named_parameters()}
            found.append({"param": before, "grad": grads, "update": moved})
    for record, kinds in zip(sink.records, found, strict=True):
        for kind, tensors in kinds.items():
            for name, x in tensors.items():
                at = record.inventory.kinds.index(kind), row(record, name)
                np.testing.assert_array_equal(record.histograms[kind][at[1]], histogram(x), name)
                reals = x.double().cpu()
                assert record.values["rms"][at] == pytest.approx(reals.square().mean().sqrt().item(), rel=1e-6)
                assert record.values["zero"][at] == (reals == 0).sum()
                assert record.values["max"][at] == np.float32(reals.max())


def test_streams_are_kept_to_when_the_optimizer_has_one_of_its_own(path: str) -> None:
    model, sink, work, stepping = net(), ListSink(), torch.cuda.Stream(), torch.cuda.Stream()
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=0.1), []
    torch.cuda.synchronize()
    with paramwatch.attach(model, sinks=[sink], update="exact"):
        for x in batches(5):
            with torch.cuda.stream(work):
                optimizer.zero_grad(set_to_none=False)
                model(x).square().mean().backward()
                torch.cuda._sleep(20_000_000)
                for p in model.parameters():
                    p.grad.add_(1.0) if p.grad is not None else None
            stepping.wait_stream(work)
            with torch.cuda.stream(stepping):
                optimizer.step()
            work.wait_stream(stepping)
            torch.cuda.synchronize()
            expected.append(model[0].weight.grad.double().mean().item())  # type: ignore[union-attr]
    for record, mean in zip(sink.records, expected, strict=True):
        at = record.inventory.kinds.index("grad"), row(record, "0.weight")
        assert record.values["mean"][at] == pytest.approx(mean, rel=1e-5)


def test_training_and_records_are_the_same_bit_for_bit(path: str) -> None:
    def trained(watched: bool) -> tuple[list[Tensor], list[Record]]:
        model, sink = net(), ListSink()
        with paramwatch.attach(model, sinks=[sink], histograms=2) if watched else nullcontext():
            run(model, torch.optim.AdamW(model.parameters()), batches(6))
        return [p.detach().clone() for p in model.parameters()], sink.records

    (plain, _), (one, first), (other, second) = trained(False), trained(True), trained(True)
    for a, b, c in zip(plain, one, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b in zip(first, second, strict=True):
        for part, values in a.values.items():
            np.testing.assert_array_equal(values, b.values[part], part)
        for kind, counts in a.histograms.items():
            np.testing.assert_array_equal(counts, b.histograms[kind], kind)


def test_a_captured_step_is_passed_over_and_the_graph_replays(caplog: pytest.LogCaptureFixture) -> None:
    capture._say.cache_clear()
    model, sink, x = net(), ListSink(), batch(0).to(CUDA)
    optimizer = torch.optim.Adam(model.parameters(), capturable=True)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    watch = paramwatch.attach(model, sinks=[sink])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(model, optimizer, [x] * 3)
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
        optimizer.step()
    before = model[0].weight.detach().clone()
    graph.replay()
    torch.cuda.synchronize()
    watch.close()

    assert not torch.equal(model[0].weight, before)
    assert [each.step for each in sink.records] == [0, 1, 2]
    assert not [line for line in caplog.messages if "stopped" in line]
    assert len([line for line in caplog.messages if "captured in a CUDA graph" in line]) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_model_on_two_gpus_is_measured_on_both(path: str) -> None:
    first, second, sink = nn.Linear(16, 50).to("cuda:0"), nn.Linear(50, 3).to("cuda:1"), ListSink()
    model = nn.ModuleList([first, second])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with paramwatch.attach(model, sinks=[sink], histograms=1):
        for x in batches(3):
            second(first(x).to("cuda:1")).square().mean().backward()
            expected = [histogram(p.grad) for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
    np.testing.assert_array_equal(sink.records[-1].histograms["grad"], expected)


@pytest.mark.parametrize("update", ["exact", "sampled"])
def test_a_model_that_comes_to_the_gpu_after_it_was_attached_is_measured_there(update: str) -> None:
    model, sink = net("cpu"), ListSink()
    with paramwatch.attach(model, sinks=[sink], update=update):  # type: ignore[arg-type]
        model.to(CUDA)
        run(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(2))

    assert [each.step for each in sink.records] == [0, 1]
    assert (sink.records[1].values["count"][:2] > 0).all()
