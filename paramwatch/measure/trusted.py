"""Which devices the Triton kernels are trusted on: the one place that asks about devices, and tries before it believes.

Where there is no Triton, or no GPU that it compiles for, tensors on a GPU are measured in plain torch. Where there is, the kernels measure
some small tensors first, for each device and type of elements, and must say of them what the specification says. That happens when a model
is attached, before it is trained; one that comes to a GPU later, or is attached while a CUDA graph is captured, is met at its first step
there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from paramwatch.bins import BINS, positions
from paramwatch.columns import PARTS, Array
from paramwatch.guard import logger
from paramwatch.measure import capture, gpu
from paramwatch.measure.naive import ORDER, as_reals, parts
from paramwatch.measure.native import TYPES

T = TypeVar("T")

OLDEST = (7, 5)
"""Compute capability that the kernels need."""

_EXACT = [i for i, part in enumerate(ORDER) if PARTS[part].integer or part in ("min", "max")]

_MISFITS = (
    RuntimeError,
    OSError,
    subprocess.SubprocessError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    AssertionError,
    ImportError,
)

_given_up: set[torch.device] = set()


def prepare(tensors: Callable[[], Iterable[Tensor]], histograms: bool) -> None:
    """Compile and try what these tensors will need. May take some seconds on a GPU that was not seen before."""
    for kind in sorted({tensor.device.type for tensor in tensors()}.difference(("cpu", "cuda", "meta"))):
        _say_plain(kind)
    if not torch.cuda.is_initialized() or capture.capturing():
        return
    for device, dtype in dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors() if tensor.is_cuda and tensor.dtype in TYPES):
        if works(device, dtype) and histograms:
            works(device, dtype, histograms=True)


def takes(tensor: Tensor, histograms: bool = False) -> bool:
    """Whether a tensor is measured by the kernels."""
    return tensor.is_cuda and gpu.takes(tensor) and works(tensor.device, tensor.dtype, histograms)


def works(device: torch.device, dtype: torch.dtype, histograms: bool = False) -> bool:
    """Whether the kernels can be trusted with elements of a type on a device; a line in the log says why not."""
    return device not in _given_up and _is_there(device) and _tried(device, dtype, histograms)


def attempt(device: torch.device, measure: Callable[[], T]) -> T | None:
    """What the kernels say. None, from then on for all of the device, where they cannot be compiled or launched for these tensors."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        raise
    except _failures() as error:
        _give_up(device, f"a kernel could not be compiled or launched: {str(error).strip()[:500]}")
        return None


def _failures() -> tuple[type[Exception], ...]:
    """What a Triton raises that cannot compile or launch, or that is of a version with other names and arguments."""
    return gpu.kernels().failure, *_MISFITS


def _give_up(device: torch.device, why: str) -> None:
    if device not in _given_up:
        _given_up.add(device)
        logger.warning("paramwatch: measuring on %s in plain PyTorch from now on, which takes several times longer: %s", device, why)


@cache
def _say_plain(kind: str) -> None:
    said = (
        "paramwatch: measuring on %s in plain PyTorch, which takes several times longer and waits for the device: the kernels are for CUDA"
    )
    logger.info(said, kind)


@cache
def _is_there(device: torch.device) -> bool:
    obstacle = _obstacle(device)
    if obstacle is not None:
        logger.info("paramwatch: measuring on %s in plain PyTorch, which takes several times longer: %s", device, obstacle)
    return obstacle is None


def _obstacle(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return "the kernels are for CUDA"
    if os.environ.get("PARAMWATCH_KERNEL") == "off":
        return "PARAMWATCH_KERNEL=off"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"the kernels need compute capability {OLDEST[0]}.{OLDEST[1]}"
    try:
        gpu.kernels()
    except _MISFITS as error:
        return f"Triton, which comes with PyTorch for CUDA on Linux, cannot be imported ({error})"
    logger.info("paramwatch: compiling the measuring kernels for %s, where that was not done before", torch.cuda.get_device_name(device))
    return None


@cache
def _tried(device: torch.device, dtype: torch.dtype, histograms: bool) -> bool:
    wrong = attempt(device, lambda: _wrong_histogram(device, dtype) if histograms else _wrong(device, dtype))
    if wrong:
        _give_up(device, f"its kernels gave wrong numbers for {dtype} ({wrong}); please report this")
    return wrong == ""


# ---- what they are tried on -----------------------------------------------------------------


def _samples(dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one and of several chunks, and one with everything that is not a common number; made without random numbers."""
    wave = torch.sin(torch.arange(gpu.SIZES.elements(dtype) + 137, dtype=torch.float64, device="cpu") * 0.7) * 1.5
    odd = wave[:200].clone()
    odd[[3, 70, 199]] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64, device="cpu")
    odd[10:20] = torch.tensor([0.0, -0.0], dtype=torch.float64, device="cpu").repeat(5)
    odd[20:30] = torch.finfo(dtype).tiny / 4
    return [x.to(dtype) for x in (wave[:1], wave, odd, 1 + wave[:99] / 64, wave[:0])]


def _wrong(device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the parts, "" if nothing is."""
    hosts = _samples(dtype)
    before = [x / 2 for x in hosts]
    tensors, olds = ([_sent(x, device) for x in some] for some in (hosts, before))
    copies = [torch.empty_like(x) for x in tensors]
    moved, itself = gpu.measure_update(tensors, olds, tensors)
    expected = [parts(as_reals(x)) for x in hosts]
    updates = [parts(as_reals(x) - as_reals(old), as_reals(x)) for x, old in zip(hosts, before, strict=True)]
    found = {
        "measured": (gpu.measure(tensors), expected),
        "measured and copied": (gpu.measure(tensors, copies), expected),
        "after an update": (itself, expected),
        "the update": (moved, updates),
    }
    for what, (there, wanted) in found.items():
        if not _alike(_here(there), torch.stack(wanted).numpy()):
            return what
    return next(("the copy" for x, copy in zip(hosts, copies, strict=True) if _bits(_here(copy)) != _bits(x.float().numpy())), "")


def _wrong_histogram(device: torch.device, dtype: torch.dtype) -> str:
    hosts = _samples(dtype)
    tensors = [_sent(x, device) for x in hosts]
    reals = [as_reals(x).numpy() for x in hosts]

    def counts(each: list[Array]) -> Array:
        return np.array([np.bincount(positions(x), minlength=BINS + 1)[:BINS] for x in each])

    halves = [_sent(x / 2, device) for x in hosts]
    with np.errstate(invalid="ignore"):
        moved = [x - as_reals(old / 2).numpy() for x, old in zip(reals, hosts, strict=True)]
    if not np.array_equal(_here(gpu.histograms(tensors)), counts(reals)):
        return "the histogram"
    return "" if np.array_equal(_here(gpu.histograms(tensors, halves)), counts(moved)) else "the histogram of an update"


def _alike(found: Array, wanted: Array) -> bool:
    with np.errstate(over="ignore"):
        exact = np.array_equal(found[:, _EXACT].astype(np.float32), wanted[:, _EXACT].astype(np.float32), equal_nan=True)
    # of a mean near 0 the elements, of about 1, say how far it may be off; the inner product is a sum of many
    loose = ORDER.index("dot")
    near = np.allclose(np.delete(found, loose, 1), np.delete(wanted, loose, 1), rtol=1e-5, atol=1e-5, equal_nan=True)
    return exact and near and np.allclose(found[:, loose], wanted[:, loose], rtol=1e-4, atol=1e-2, equal_nan=True)


def _bits(x: Array) -> bytes:
    return x.astype(np.float32).tobytes()


def _sent(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.clone()


def _here(x: Tensor) -> Array:
    """On the host, waited for: an event may be waited for also where torch was told to let nobody wait."""
    x = x if x.dtype in (torch.float64, torch.int64) else x.float()
    if not x.is_cuda:
        return x.numpy()
    host = x.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))
    event.synchronize()
    return host.numpy()
