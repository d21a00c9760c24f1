"""The specification of a measurement: the parts of one tensor in plain torch, float64, the obvious way.

Every faster path must give these numbers. Nothing here waits for a device: what depends on the data stays on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramwatch.columns import PARTS

ORDER = tuple(PARTS)
"""The order of the parts along the last axis of a measurement."""

_BLOCK = 1 << 14
"""Elements that torch sums in one thread: it splits a sum from 2^15 on, by as many threads as there are, which shows in the last bits."""


_supported: dict[tuple[type, torch.dtype], bool] = {}


def is_supported(tensor: Tensor) -> bool:
    """Whether the elements of a tensor of this kind can be read at all."""
    if tensor.is_meta:
        return False
    kind = (type(tensor), tensor.dtype)
    if kind not in _supported:
        try:
            plain = kind[0] in (Tensor, torch.nn.Parameter)
            as_reals(torch.zeros(1, device="cpu").to(tensor.dtype) if plain else tensor)
            _supported[kind] = True
        except (NotImplementedError, RuntimeError, TypeError):
            _supported[kind] = False
    return _supported[kind]


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
    return tensor.to(torch.float64).reshape(-1)


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
    return torch.stack([found[part].to(torch.float64) for part in ORDER])


def _sum(x: Tensor) -> Tensor:
    """The same bits for any number of threads: each block is summed by one."""
    if x.numel() <= _BLOCK:
        return x.sum()
    whole = x.numel() // _BLOCK * _BLOCK
    return _sum(x[:whole].view(-1, _BLOCK).sum(1)) + x[whole:].sum()


def _wraps_quantized(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, torch.nn.Parameter) and "dequantize" in type(tensor).__dict__
