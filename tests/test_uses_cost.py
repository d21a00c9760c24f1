"""What splitting costs: operations, bytes and hooks, never times; what is off the schedule costs nothing."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_no_waiting import Waits
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack
from used_models import Autoencoder, LanguageModel, shared_mlp

import paramwatch
from paramwatch.measure import native
from paramwatch.uses import gram as gram_module
from paramwatch.uses import watched
from paramwatch.uses.gram import flat, gram, side_by_side, square

KIB = 1024


# ---- operations and hooks ---------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def installed(net: nn.Module) -> dict[str, int]:
    """How much there is in every registry that splitting could use."""
    found = {name: len(hooks) for name, hooks in vars(torch_modules).items() if name.startswith("_global_") and hasattr(hooks, "__len__")}
    for module in net.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks"):
                found[name] = found.get(name, 0) + len(hooks)
    for parameter in net.parameters():
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[name] = found.get(name, 0) + len(getattr(parameter, name) or ())
    return found | {"filters": len(warnings.filters), "modes": _len_torch_dispatch_stack()}


def seen_of(steps: int, uses: int) -> tuple[list[list[str]], list[dict[str, int]], dict[str, int]]:
    """What each step dispatches; what is installed between its forward and its backward pass, and was before there was a watch."""
    torch.manual_seed(0)
    net, loss, _ = shared_mlp(True)
    before = installed(net)
    watch = paramwatch.attach(net, uses=uses, update="exact")
    optimizer, dispatched, hooks = torch.optim.SGD(net.parameters(), lr=0.1), [], []
    for _ in range(steps):
        with Operations() as operations:
            optimizer.zero_grad()
            value = loss(net)
            value.backward()
            optimizer.step()
        dispatched.append(operations.seen)
        loss(net)
        hooks.append(installed(net))
    watch.close()
    return dispatched, hooks, before


def test_off_a_split_step_nothing_is_installed_and_no_operation_is_dispatched_that_an_unsplit_watch_does_not() -> None:
    # first, since packages that are loaded meanwhile filter warnings of their own
    plain, unsplit, _ = seen_of(9, uses=0)
    dispatched, hooks, before = seen_of(9, uses=4)

    # hooks are looked at after a step: those of the next one
    assert [i + 1 for i, found in enumerate(hooks) if found != before] == [4, 8]
    assert unsplit[-1] == before
    assert [i for i, (one, other) in enumerate(zip(dispatched, plain, strict=True)) if one != other] == [0, 4, 8]


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_no_operation_of_a_split_step_waits_for_a_device(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is slower to answer than a CPU each of these would stop the training thread."""
    monkeypatch.setattr(gram_module, "can_multiply", lambda vectors: False)
    allow(monkeypatch, budget)
    net = Repeated(5)
    watch = paramwatch.attach(net, uses=1, uses_of="*")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Waits() as waits:
        for _ in range(2):
            for _ in range(2):
                net(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert len(watch.agreement()) == 2
    watch.close()
    assert waits.found == []


# ---- bytes ----------------------------------------------------------------------------------

X = torch.randn(4, 256, generator=torch.manual_seed(0))


def peak_bytes(doing: Callable[[], object]) -> int:
    """The most that torch's allocator had given out meanwhile, more than when it began."""
    return bytes_of(doing)[0]


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """What an earlier model had is not given back meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def bytes_of(doing: Callable[[], object]) -> tuple[int, int]:
    """The same, and what it had given out in the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        doing()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    given = most = 0
    for each in sorted(events, key=lambda each: each.start_ns()):
        given += each.nbytes()
        most = max(most, given)
    return most, given


class Repeated(nn.Module):
    def __init__(self, times: int, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.times = layer or nn.Linear(256, 256, bias=False), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


def permuted() -> nn.Module:
    """A weight that lies in memory as its transpose does."""
    layer = nn.Linear(256, 256, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().t())
    return Repeated(2, layer)


def convolutions() -> nn.Module:
    return Repeated(2, nn.Conv2d(64, 64, 3, padding=1, bias=False)).to(memory_format=torch.channels_last)


def embedding_and_head() -> nn.Module:
    net = LanguageModel(True)
    net.embed.weight = net.lm_head.weight = nn.Parameter(torch.randn(4000, 32))
    return net


def autoencoder() -> nn.Module:
    net = Autoencoder(True)
    net.enc.weight = net.dec[0] = nn.Parameter(torch.randn(256, 256))
    net.enc.bias = None
    return net


def peaks_of(make: Callable[[], nn.Module], x: Tensor, backwards: int = 1, steps: int = 3, **options: Any) -> tuple[list[int], list[str]]:
    """Of each step, from where there is no gradient to where there is one again; and how splits were told."""
    for _ in range(5):
        with no_garbage():
            peaks, left, modes = measured(make, x, backwards, steps, **options)
        # torch's profiler loses an event now and then
        if max(left) <= 4 * KIB:
            break
    return peaks, modes


def measured(
    make: Callable[[], nn.Module], x: Tensor, backwards: int, steps: int, **options: Any
) -> tuple[list[int], list[int], list[str]]:
    """The same, and how far the bytes that a step left are from those of its gradients."""
    torch.manual_seed(0)
    net = make()
    watch = paramwatch.attach(net, update="off", uses_of="*", **options)
    optimizer, found, left = torch.optim.SGD(net.parameters(), lr=0.1), [], []

    def step() -> None:
        for _ in range(backwards):
            net(x).square().mean().backward()
        optimizer.step()

    for _ in range(steps):
        optimizer.zero_grad()
        most, given = bytes_of(step)
        found.append(most)
        left.append(abs(given - sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)))
    watch.close()
    assert not watch.recorder.guard.failed
    assert not options or not watch.recorder.splits.guard.failed
    return found, left, list(watch.uses()["mode"].unique()) if options else []


def allow(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(watched, "LEAST_BUDGET", size)
    monkeypatch.setattr(watched, "share_of_device", lambda device: 0)


needs_kernel = pytest.mark.skipif(not native.available(), reason="no C++ compiler was found: PyTorch multiplies by pieces of 2 MiB")

TWO_USES = {
    "linear": (lambda: Repeated(2), X),
    "a weight that lies as its transpose": (permuted, X),
    "channels_last": (convolutions, torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)),
    "embedding and head": (embedding_and_head, torch.randint(4000, (1, 4))),
    "autoencoder": (autoencoder, X),
}


@needs_kernel
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(("make", "x"), TWO_USES.values(), ids=TWO_USES)
def test_two_uses_take_no_more_memory_than_autograd_does(
    make: Callable[[], nn.Module], x: Tensor, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if budget is not None:
        allow(monkeypatch, budget)
    plain, _ = peaks_of(make, x)
    split, modes = peaks_of(make, x, uses=1)

    assert modes == ["full"]
    assert all(mine <= other + 4 * KIB for mine, other in zip(split, plain, strict=True)), (split, plain)


@needs_kernel
@pytest.mark.parametrize(("budget", "mode", "more"), [(11, "full", 10), (3, "stream", 1), (0.9, "norms", 0)])
def test_many_uses_take_what_their_mode_says(budget: float, mode: str, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 256 * 256 * 4
    allow(monkeypatch, int(budget * size))
    (plain, *_), _ = peaks_of(lambda: Repeated(12), X)
    split, modes = peaks_of(lambda: Repeated(12), X, uses=1)

    assert modes == [mode]
    assert all(peak <= plain + more * size + 8 * KIB for peak in split), [(peak - plain) / size for peak in split]


class Cast(Repeated):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@needs_kernel
@pytest.mark.parametrize("budget", [3, 0])
def test_two_uses_under_autocast_take_no_more_memory_than_autograd_once_it_is_known_that_there_is_one_pass(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd adds them before it casts the sum, and does not hold them any more when that arrives."""
    size = 256 * 256 * 4
    allow(monkeypatch, budget * size)
    plain, _ = peaks_of(lambda: Cast(2), X)
    (first, *others), modes = peaks_of(lambda: Cast(2), X, uses=1)

    assert modes == ["full"]
    assert first <= plain[0] + min(budget, 1) * size + 8 * KIB
    assert all(peak <= plain[1] + 8 * KIB for peak in others), [(peak - plain[1]) / size for peak in others]


def test_sums_of_squares_are_made_without_a_copy_in_float64() -> None:
    x = torch.randn(3 << 20)
    true = x.double().square().sum()

    assert peak_bytes(lambda: square(x)) < x.nbytes
    assert square(x) == pytest.approx(float(true), rel=1e-12)


def test_what_lies_alike_is_read_where_it_is_and_what_does_not_in_the_order_of_the_last() -> None:
    one, other = torch.randn(2, 40, 30, 20).permute(0, 2, 3, 1).unbind()
    apart = torch.randn(30, 20, 40)
    vectors = side_by_side([apart, one, other])

    assert [x.data_ptr() for x in vectors[1:]] == [one.data_ptr(), other.data_ptr()]
    assert vectors[0].data_ptr() != apart.data_ptr()
    true = torch.stack([flat(x.contiguous()) for x in (apart, one, other)]).double()
    assert torch.allclose(gram(vectors[:2], vectors[2])[:3, :3], true @ true.T, rtol=1e-10)
