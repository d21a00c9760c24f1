"""Inner products of contributions, of the gradient that they should add up to, and of what is missing: everything that is said of uses.

In float64 and by pieces, so that no copy of a whole tensor is made and squares of vanishing gradients do not vanish. Nothing here waits for
a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from paramwatch.agreement import MOST_PAIRS
from paramwatch.measure.products import CHUNK, can_multiply, products

_PIECE, _PIECE_ON_DEVICE = 1 << 18, 1 << 22
"""Elements in float64 at a time: what a processor's cache holds, and what keeps a device busy (32 MiB)."""


Order: TypeAlias = tuple[int, ...]
"""Of dimensions, the one that is gone through last at its end."""


def side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The elements of tensors of one shape as vectors, all in the order in which those of the last one lie in memory.

    So no copy is made of what lies alike, whether or not it is contiguous (a transpose, `channels_last`).
    """
    if all(type(x) is Tensor and x.layout is torch.strided and x.is_contiguous() and not x.is_complex() for x in tensors):
        return [x.view(-1) for x in tensors]
    reals = [real(x) for x in tensors]
    order = order_of(reals[-1])
    return [x.permute(order).reshape(-1) for x in reals]


def order_of(tensor: Tensor) -> Order:
    """The dimensions of a tensor, that with the largest stride first; in their own order where there are no strides."""
    dims = range(tensor.ndim)
    return tuple(sorted(dims, key=tensor.stride, reverse=True) if tensor.layout is torch.strided else dims)


def flat(tensor: Tensor, order: Order | None = None) -> Tensor:
    """The elements as one vector, in the order of these dimensions; without any as they lie in memory."""
    found = real(tensor)
    return found.permute(order_of(found) if order is None else order).reshape(-1)


def real(tensor: Tensor) -> Tensor:
    """The elements of their own type: sparse as dense, complex as two reals, of a sharded tensor those that are here."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.device.type == "mps":  # has no float64
        tensor = tensor.cpu()
    return tensor


def gram(grads: Sequence[Tensor], total: Tensor, before: Tensor | None = None) -> Tensor:
    """Inner products [K + 2, K + 2] of K contributions, the gradient, and the gradient minus their sum; float64, on their device.

    Args:
        grads: Vectors of one size.
        total: What autograd delivered.
        before: What it adds that to.
    """
    if before is None and can_multiply((*grads, total)):
        return torch.from_numpy(products(grads, total, len(grads) <= MOST_PAIRS))
    return plain_gram(grads, total, before)


def plain_gram(grads: Sequence[Tensor], total: Tensor, before: Tensor | None = None) -> Tensor:
    """`gram` in PyTorch: on other devices, and where there is no kernel."""
    k, n = len(grads), total.numel()
    found = torch.zeros(k + 2, k + 2, dtype=torch.float64, device=total.device)
    piece = max(1, (_PIECE if total.is_cpu else _PIECE_ON_DEVICE) // (k + 2))
    for start in range(0, n, piece):
        these = slice(start, min(n, start + piece))
        wide = torch.stack([x[these].to(torch.float64) for x in (*grads, total, total)])
        if before is not None:
            wide[k:] += before[these]
        wide[-1] -= wide[:k].sum(0)
        if k <= MOST_PAIRS:
            found += wide @ wide.T
        else:
            found[:, k:] += wide @ wide[k:].T
            found.diagonal()[:k] += wide[:k].square().sum(1)
    if k > MOST_PAIRS:
        found[k:, :k] = found[:k, k:].T.clone()
        found[:k, :k] = torch.where(torch.eye(k, dtype=torch.bool, device=found.device), found[:k, :k], float("nan"))
    return found


def alone(total: Tensor) -> Tensor:
    """`gram` of no contribution: all of the gradient is missing."""
    return square(total).expand(2, 2)


def square(x: Tensor) -> Tensor:
    """The sum of squares of a vector, in float64."""
    # not by `vector_norm`, which makes a copy of all of it in float64
    return gram([], x)[0, 0]


def add(to: Tensor, x: Tensor) -> None:
    """Add a vector in place, whatever their types, by pieces where one would be a copy of it."""
    piece = x.numel() if to.dtype == x.dtype else _PIECE if x.is_cpu else _PIECE_ON_DEVICE
    for start in range(0, x.numel(), max(piece, 1)):
        to[start : start + piece] += x[start : start + piece]


def workspace(k: int, n: int) -> int:
    """Bytes that inner products of K contributions of n elements take meanwhile, and what is found of them."""
    size = k + 2
    pairs = size * (size + 1) // 2 if k <= MOST_PAIRS else 3 * size
    return 8 * (size * size + pairs * -(-n // CHUNK))


def diagonal(squares: Sequence[Tensor], total: Tensor, summed: Tensor | None, before: Tensor | None = None) -> Tensor:
    """What is known of `gram` where contributions were not kept.

    Args:
        squares: Of the contributions.
        total: What autograd delivered.
        summed: The sum of the contributions, where that was kept.
        before: What it adds that to: without a sum, all that is known to be missing.
    """
    k = len(squares)
    found = torch.full((k + 2, k + 2), float("nan"), dtype=torch.float64, device=total.device)
    found.diagonal()[:k] = torch.stack([*squares])
    if summed is None and before is None:
        found[k, k] = square(total)
    elif summed is not None:
        found[k:, k:] = gram([summed], total, before)[1:, 1:]
    else:
        # the gradient without what was there before is what was delivered
        found[k:, k:] = gram([total], total, before)[1:, 1:]
    return found


def own(grad: Tensor, total: Tensor) -> Tensor:
    """The contribution, in memory of its own where autograd goes on with it: what it delivers may become `param.grad`."""
    if type(grad) is not Tensor or type(total) is not Tensor or grad.layout is not torch.strided or total.layout is not torch.strided:
        return dense(grad).clone()
    same = grad.untyped_storage().data_ptr() == total.untyped_storage().data_ptr()
    return grad.clone() if same else grad


def dense(grad: Tensor) -> Tensor:
    """The same elements where no place is left out."""
    return grad.detach() if grad.layout is torch.strided else grad.detach().to_dense()
