"""The trials of the Triton kernels: functions that run in a process of Triton's interpreter, or on a GPU.

They take names of cases and a device and give arrays, so that they can be called in another process. Triton is imported when it is used.
"""

from __future__ import annotations

import os
import weakref
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_cases import INF, NAN, cases, large, noise, some, steps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import paramwatch
from paramwatch.columns import PARTS, Array
from paramwatch.measure import chunked, gpu, native, packed, tables, trusted
from paramwatch.measure.naive import as_reals, parts
from paramwatch.measure.native import TYPES, _is_dense
from paramwatch.testing import ListSink

SMALL = tables.Sizes(chunk=2048, lanes=64, slow_lanes=128, few=3, many_lanes=32)
"""For the interpreter: a chunk is 512 elements of float32, 1024 of 16 bits and 128 of float64; four chunks are many."""


def interpreted() -> None:
    """Make this process one of Triton's interpreter; before its first import of triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    gpu.SIZES = SMALL


def placed(x: Tensor, device: str) -> Tensor:
    """The same on a device, with the same strides and as far from an aligned address."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    moved = whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
    return torch.nn.Parameter(moved) if isinstance(x, torch.nn.Parameter) else moved


def bits(x: Tensor) -> Array:
    """What a tensor holds, byte by byte."""
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def read(name: str, device: str) -> dict[str, Array]:
    """A tensor alone, and with a copy made of it."""
    x = placed(cases()[name], device)
    copy = torch.zeros_like(x)
    found = {"alone": gpu.measure([x]), "with a copy": gpu.measure([x], [copy])}
    return {how: parts.cpu().numpy() for how, parts in found.items()} | {"x": bits(x), "copy": bits(copy)}


def read_to_a_misaligned_copy(name: str, device: str) -> tuple[Array, Array, Array, Array]:
    x = placed(cases()[name], device)
    copy = torch.zeros(x.numel() + 1, dtype=x.dtype, device=device)[1:]
    return gpu.measure([x]).cpu().numpy(), gpu.measure([x], [copy]).cpu().numpy(), bits(x), bits(copy)


def step(name: str, device: str) -> dict[str, Array]:
    """An update, and the tensor after it measured alone."""
    before, after, grad = (placed(x, device) for x in steps()[name])
    update, itself = gpu.measure_update([after], [before], [grad])
    found = {"update": update, "itself": itself, "alone": gpu.measure([after])}
    return {how: parts.cpu().numpy()[0] for how, parts in found.items()}


def step_without_gradient(name: str, device: str) -> tuple[Array, Array]:
    before, after, _ = (placed(x, device) for x in steps()[name])
    update, itself = gpu.measure_update([after], [before])
    return update.cpu().numpy()[0], itself.cpu().numpy()[0]


def counted(name: str, device: str) -> dict[str, Array]:
    """Histograms: of a tensor, without a factor that it carries, and of an update."""
    x, scale = placed(cases()[name], device), torch.tensor(3.0, device=device)
    found = {"alone": gpu.histograms([x]), "unscaled": gpu.histograms([x], scale=scale)}
    if name in steps():
        before, after, _ = (placed(x, device) for x in steps()[name])
        found["update"] = gpu.histograms([after], [before])
    return {how: counts.cpu().numpy()[0] for how, counts in found.items()}


def counted_together(device: str) -> dict[str, Array]:
    """One case in three, in one call."""
    chosen = list(cases())[::3]
    return dict(zip(chosen, gpu.histograms([placed(cases()[name], device) for name in chosen]).cpu().numpy(), strict=True))


def together(device: str) -> dict[str, Array]:
    """One case in three, measured in one call."""
    chosen = list(cases())[::3]
    return dict(zip(chosen, gpu.measure([placed(cases()[name], device) for name in chosen]).cpu().numpy(), strict=True))


def steps_together(device: str) -> dict[str, tuple[Array, Array]]:
    """The same of steps: the update, and the tensor after it."""
    chosen = list(steps())[1::4]
    before, after, grads = ([placed(steps()[name][i], device) for name in chosen] for i in range(3))
    update, itself = gpu.measure_update(after, before, grads)
    return dict(zip(chosen, zip(update.cpu().numpy(), itself.cpu().numpy(), strict=True), strict=True))


def some_with_gradients(device: str) -> tuple[Array, Array]:
    """Updates in one call, of which only some have a gradient."""
    names = ["0-dim", "empty", "513", "misaligned", "bfloat16 257", "float64"]
    triples = [[placed(x, device) for x in steps()[name]] for name in names]
    before, after, grads = zip(*triples, strict=True)
    chosen = [grad if i % 2 else None for i, grad in enumerate(grads)]
    found = gpu.measure_update(after, before, chosen)[0].cpu().numpy()
    return found, torch.stack(
        [parts(as_reals(a) - as_reals(b), None if g is None else as_reals(g)) for b, a, g in zip(before, after, chosen, strict=True)]
    ).cpu().numpy()


def scaled(name: str, factor: float, dtype: torch.dtype, device: str) -> tuple[Array, Array, Array, Array]:
    """A gradient that carries a scale, and one that does not; and the inner products with them."""
    x = cases()[name]
    scale = torch.tensor(factor, dtype=dtype, device=device)
    carried, plain = placed(x * factor, device), placed(x, device)
    zero = torch.zeros_like(plain)
    dots = gpu.measure_update([plain], [zero], [carried], scale)[0], gpu.measure_update([plain], [zero], [plain])[0]
    return tuple(t.cpu().numpy()[0] for t in (gpu.measure([carried], scale=scale), gpu.measure([plain]), *dots))  # type: ignore[return-value]


def in_chunks(n: int, offset: int, chunk: int, lanes: int, device: str) -> Array:
    """The same numbers cut into chunks and dealt to lanes in some way."""
    usual, gpu.SIZES = gpu.SIZES, tables.Sizes(chunk=chunk, lanes=lanes, slow_lanes=32, few=3, many_lanes=32)
    try:
        return gpu.measure([placed((1 + noise(3000))[offset : offset + n], device)]).cpu().numpy()[0]
    finally:
        gpu.SIZES = usual


def pieces(n: int, cuts: tuple[int, ...], device: str) -> tuple[Array, Array]:
    """A tensor with all that is not finite, whole and cut in pieces."""
    x = placed(some(noise(3000), NAN, INF, -INF, 0.0)[:n], device)
    return gpu.measure([x]).cpu().numpy(), gpu.measure(torch.tensor_split(x, sorted(cuts))).cpu().numpy()


def at_full_size(name: str, device: str) -> Array:
    """What takes a chunk as large as they are."""
    usual, gpu.SIZES = gpu.SIZES, tables.Sizes()
    try:
        return gpu.measure([placed(large()[name], device)]).cpu().numpy()[0]
    finally:
        gpu.SIZES = usual


def records(layout: tables.Layout, sizes: tables.Sizes, last: int, device: str) -> Array:
    """Of the last chunks of a layout of one tensor, the records as they are folded: [fields but the inner product, chunks]."""
    kernels, plan = gpu.kernels(), layout.plan(sizes, 0)
    found = torch.full((plan.chunks * kernels.fields,), NAN, dtype=torch.float64, device=device)
    chosen = gpu.options(plan.launches[0].variant, kernels.measure_chunks, sizes, {"COPY": False})
    kernels.measure_chunks[(last,)](plan.table, layout.addresses(0), found, 1, plan.chunks, plan.chunks - last, **chosen)
    return found.view(-1, plan.chunks)[:-1].cpu().numpy()


def read_twice(name: str, device: str) -> float:
    """The share of chunks that float32 was not enough for: their pivot is the mean, so that the sum about it is exactly 0."""
    layout = tables.Layout.of([placed(large()[name], device)])
    found = records(layout, tables.Sizes(), layout.plan(tables.Sizes(), 0).chunks, device)
    return float((found[6] == 0).mean())


def beyond_32_bits(dtype: torch.dtype, device: str) -> tuple[Array, Array]:
    """The last chunk of a tensor of 2^33 elements, of which nothing else is there; and the same elements as a tensor."""
    last, numel = (noise(700) + 3).to(dtype).to(device), (1 << 33) + 700
    layout = tables.Layout.of([last])
    layout.numel[:] = numel
    layout._addresses -= (numel - 700) * dtype.itemsize
    found = records(layout, tables.Sizes(chunk=1 << 22, lanes=32, slow_lanes=32), 1, device)
    assert np.isnan(found[:, :-1]).all()
    finite, _, _, _, zero, pivot, first, second, least, most = found[:, -1]
    mean = pivot + first / finite
    return np.array([finite, zero, mean, np.sqrt(second / finite - (first / finite) ** 2), least, most]), parts(
        as_reals(last)
    ).cpu().numpy()


def operations(device: str) -> dict[str, int]:
    """How often torch is called for few and for many tensors, for the first time and again."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += 1
            return func(*args, **(kwargs or {}))

    def calls(n: int) -> int:
        with Count() as count:
            gpu.measure(many[:n], copies[:n])
            gpu.measure_update(many[:n], copies[:n], many[:n])
        return count.n

    many, copies = ([noise(3 + i).to(device) for i in range(60)] for _ in range(2))
    return {"few": calls(2), "many": calls(6), "few again": calls(2), "many again": calls(6)}


def holds(device: str) -> bool:
    """Whether a tensor that was measured is held by anything."""
    x, copy = noise(600).to(device), torch.empty(600, device=device)
    seen = weakref.ref(x), weakref.ref(copy)
    gpu.measure([x], [copy])
    gpu.measure_update([x], [copy], [x])
    del x, copy
    return any(ref() is not None for ref in seen)


# ---- the path as a whole --------------------------------------------------------------------


def tried(dtype: torch.dtype, device: str) -> tuple[str, str]:
    """What is wrong with the kernels before they are trusted."""
    return trusted._wrong(torch.device(device), dtype), trusted._wrong_histogram(torch.device(device), dtype)


def tried_broken(device: str) -> list[tuple[str, bool]]:
    """What is said of a kernel that gives a wrong number, of one that cannot be launched, and whether it is trusted then."""

    def wrong(*args: Any, **options: Any) -> Tensor:
        return good(*args, **options) * 1.001

    def failing(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("out of resources")

    said = []
    good = gpu.measure
    for broken in (wrong, failing):
        trusted._given_up.clear()
        trusted._tried.cache_clear()
        handler = _Said()
        with patch.object(gpu, "measure", broken), patch.object(trusted, "logger", handler):
            found = [trusted._tried(torch.device(device), torch.float32, False) for _ in range(2)]
        said.append(("; ".join(handler.lines), any(found)))
    trusted._given_up.clear()
    trusted._tried.cache_clear()
    return said


class _Said:
    """Takes what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, text: str, *given: object) -> None:
        self.lines.append(text % given)


def _like_on_a_gpu(tensor: Tensor, histograms: bool = False) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype in TYPES and _is_dense(tensor)


def trained(by_kernels: bool, failing: bool = False) -> tuple[list[dict[str, Array]], list[dict[str, Array]], list[float]]:
    """What is recorded of some steps, parts and histograms, and the losses; here tensors on the CPU are measured as those on a GPU are."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
    net[2].weight.data = net[2].weight.data.t().contiguous().t()
    optimizer, sink, losses = torch.optim.AdamW(net.parameters(), fused=True), ListSink(), []
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)  # type: ignore[attr-defined]  # as a scaler

    def fails(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("out of resources")

    with ExitStack() as patches:
        if by_kernels:
            for module in (trusted, gpu):
                patches.enter_context(patch.object(module, "takes", _like_on_a_gpu if not failing or module is gpu else _trusted_like))
        for module, name in ((native, "available"), (packed, "fits"), (chunked, "takes")):
            patches.enter_context(patch.object(module, name, lambda *_: False))
        if failing:
            patches.enter_context(patch.object(gpu, "measure_update", fails))
        with paramwatch.attach(net, sinks=[sink], update="exact", histograms=2):
            for i in range(2):
                optimizer.zero_grad()
                loss = net(noise(8, 4, seed=i)).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
    trusted._given_up.clear()
    return [dict(each.values) for each in sink.records], [dict(each.histograms) for each in sink.records], losses


def _trusted_like(tensor: Tensor, histograms: bool = False) -> bool:
    return _like_on_a_gpu(tensor) and tensor.device not in trusted._given_up


# ---- launches on a GPU that is not there ----------------------------------------------------


class Nowhere:
    """A driver that knows what to compile for, and no more."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compiled_by_launches() -> list[tuple[int, int, int]]:
    """How often each kernel has been compiled after some calls, by Triton's own launcher, which stops short of the launch."""
    from triton.runtime.driver import driver

    driver.set_active(Nowhere())
    kernels = gpu.kernels()
    names = ("measure_chunks", "measure_updates", "fold")
    for name in names:
        setattr(kernels, name, _Warmed(getattr(kernels, name)))
    seen = []

    def count() -> None:
        seen.append(tuple(getattr(kernels, name).compiled for name in names))

    one, many = [noise(40)], [noise(40_000), *(noise(40 + i) for i in range(31))]
    for tensors in (one, many[:16], many):
        gpu.measure(tensors)
        count()
    for tensors in (one, many):
        gpu.measure_update(tensors, tensors, tensors, torch.tensor(8.0))
        count()
    # a kind of a step's numbers may lie anywhere among them
    gpu.read(tables.Layout.of(one), torch.empty((4, 1, len(PARTS)), dtype=torch.float64)[1:2])
    count()
    return seen


class _Warmed:
    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *args, **options: self._kernel.warmup(*args, grid=grid, **options)

    @property
    def compiled(self) -> int:
        kernel = self._kernel
        return len(kernel.device_caches[0][0] if hasattr(kernel, "device_caches") else kernel.cache[0])
