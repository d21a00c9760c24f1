"""The specification of a measurement: the parts of one tensor in plain torch, float64, the obvious way.

Every faster path must give these numbers. Nothing here waits for a device: what depends on the data stays on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramwatch.bins import BINS, LEAST, ZERO
from paramwatch.columns import PARTS
from paramwatch.storage import is_there

ORDER = tuple(PARTS)
"""The order of the parts along the last axis of a measurement."""

_BLOCK = 1 << 14
"""Elements that torch sums in one thread: it splits a sum from 2^15 on, by as many threads as there are, which shows in the last bits."""


LARGEST_DENSE = 1 << 31
"""Elements up to which what is not strided (sparse) may be made dense."""

_PLAIN = (Tensor, torch.nn.Parameter)

_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a dtype raises that torch only has the name of."""

_known: dict[tuple[torch.dtype, torch.layout, bool], bool] = {}


def is_supported(tensor: Tensor) -> bool:
    """Whether the elements of a tensor can be read. Of a subclass that is tried, which takes as long as to read it."""
    if type(tensor) not in _PLAIN:
        return reals_of(tensor) is not None
    return is_open(tensor) and _is_known(tensor)


def is_open(tensor: Tensor) -> bool:
    """Whether there are elements, and memory for them as float64 vectors."""
    large = tensor.layout is not torch.strided and tensor.numel() > LARGEST_DENSE
    return not (tensor.is_meta or tensor.is_nested or large) and is_there(tensor)


def _is_known(tensor: Tensor) -> bool:
    """Whether torch reads tensors of this kind, which are all alike."""
    kind = tensor.dtype, tensor.layout, tensor.is_quantized
    if kind not in _known:
        # torch warns where a complex32 is made
        dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
        try:
            as_reals(tensor if tensor.is_quantized else torch.zeros(1, device="cpu").to(dtype))
        except _REFUSALS:
            _known[kind] = False
        else:
            _known[kind] = True
    return _known[kind]


def reals_of(tensor: Tensor) -> Tensor | None:
    """`as_reals`; None of a tensor that cannot be read. Each one of a subclass is asked by itself, and every time."""
    if type(tensor) in _PLAIN:
        return as_reals(tensor) if is_supported(tensor) else None
    try:
        found = as_reals(tensor) if is_open(tensor) else None
    except Exception:  # noqa: BLE001  # code of others, which refuses with whatever it likes: of this tensor nothing is known, and that is said
        return None
    # a subclass around other tensors stays itself, and has no elements of its own
    return found if type(found) is Tensor else None


def as_reals(tensor: Tensor) -> Tensor:
    """The elements as one float64 vector: complex as two reals, sparse as its dense equal, low precision and integers by value."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized or _wraps_quantized(tensor):
        tensor = tensor.dequantize()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.device.type == "mps":  # has no float64
        tensor = tensor.cpu()
    reals = tensor.to(torch.float64).reshape(-1)
    return reals if type(reals) is Tensor else reals.as_subclass(Tensor)


def parts_of(tensor: Tensor) -> Tensor | None:
    """The parts of one tensor of any kind, None if it cannot be read. Of a sparse one on the CPU only what it stores is looked at."""
    if tensor.layout is not torch.sparse_coo or not tensor.is_cpu or not is_supported(tensor):
        # elsewhere their number would have to be waited for
        reals = reals_of(tensor)
        return None if reals is None else parts(reals)
    stored = as_reals(tensor.detach().coalesce().values())
    return _with_zeros(parts(stored), tensor.numel() * (2 if tensor.is_complex() else 1) - stored.numel())


def parts(x: Tensor, dot: Tensor | None = None) -> Tensor:
    """The parts of a float64 vector, in `ORDER`, as a float64 vector on its device.

    Args:
        x: The elements.
        dot: Elements of another vector, for the inner product; without it that part is NaN.
    """
    finite = torch.isfinite(x)
    n = finite.sum()
    zeroed = torch.where(finite, x, 0.0)
    mean = _sum(zeroed) / n
    apart = torch.where(finite, x - mean, 0.0)
    lost = torch.full_like(mean, float("nan"))
    if x.numel():
        least = torch.where(finite, x, float("inf")).amin()
        most = torch.where(finite, x, float("-inf")).amax()
        low, high = torch.where(n > 0, least, lost), torch.where(n > 0, most, lost)
    else:
        low = high = lost
    found = {
        "count": torch.full_like(mean, x.numel()),
        "nan": torch.isnan(x).sum(),
        "posinf": (x == float("inf")).sum(),
        "neginf": (x == float("-inf")).sum(),
        "zero": (x == 0).sum(),
        "mean": mean,
        "std": (_sum(apart * apart) / n).sqrt(),
        "rms": (_sum(zeroed * zeroed) / n).sqrt(),
        "min": low,
        "max": high,
        "dot": lost if dot is None else _sum(torch.where(finite & torch.isfinite(dot), x * dot, 0.0)),
    }
    # an extreme of 0 has no sign: it would be that of the zero which is met first, and threads meet them in another order
    return torch.stack([found[part].to(torch.float64) for part in ORDER]) + 0.0


def histogram(x: Tensor) -> Tensor:
    """How many elements of a float64 vector are in each of the bins of `bins`, int64, on its device."""
    # a mantissa of at least 1/2, so that 1 has the exponent 1 here
    magnitude = (torch.frexp(x).exponent.long() - 1 - LEAST + 2).clamp(1, ZERO)
    signed = torch.where(x == 0, 0, torch.where(x < 0, -magnitude, magnitude))
    position = torch.where(torch.isfinite(x), ZERO + signed, BINS)
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(0, position, torch.ones_like(position)).narrow(0, 0, BINS)


def _with_zeros(found: Tensor, more: int) -> Tensor:
    """The parts of the same elements and so many zeros."""
    if not more:
        return found
    part = dict(zip(ORDER, found, strict=True))
    n = part["count"] - part["nan"] - part["posinf"] - part["neginf"]
    whole = n + more
    old = {name: torch.where(n > 0, part[name], 0.0) for name in ("mean", "std", "rms", "min", "max")}
    mean = old["mean"] * n / whole
    spread = n * (old["std"].square() + (old["mean"] - mean).square()) + more * mean.square()
    new = part | {
        "count": part["count"] + more,
        "zero": part["zero"] + more,
        "mean": mean,
        "std": (spread / whole).sqrt(),
        "rms": old["rms"] * (n / whole).sqrt(),
        "min": old["min"].clamp(max=0.0),
        "max": old["max"].clamp(min=0.0),
    }
    return torch.stack([new[name] for name in ORDER])


def _sum(x: Tensor) -> Tensor:
    """The same bits for any number of threads: each block is summed by one."""
    if x.numel() <= _BLOCK:
        return x.sum()
    whole = x.numel() // _BLOCK * _BLOCK
    return _sum(x.narrow(0, 0, whole).view(-1, _BLOCK).sum(1)) + x.narrow(0, whole, x.numel() - whole).sum()


def _wraps_quantized(tensor: Tensor) -> bool:
    return type(tensor) not in _PLAIN and type(tensor).dequantize is not Tensor.dequantize
