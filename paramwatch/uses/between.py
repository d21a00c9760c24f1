"""What became of a gradient since a backward pass of the same step: nothing, a multiple of itself (clipping), zeros, or something else.

Beside `held`, which keeps what earlier passes have contributed: that is multiplied as the gradient was, so that it stays a part of it. What
is no multiple is nobody's contribution. Of elements on a device nothing is asked that would have to be waited for: the factor stays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from paramwatch.uses.gram import Order, dense, flat, gram, real, side_by_side, square

Number: TypeAlias = float | Tensor
"""A number: known here, or float64 [] on a device."""

Mark: TypeAlias = tuple[int, int] | None
"""Address and version of a gradient as autograd has left it; None where nobody knows."""


class Change(NamedTuple):
    """What became of a gradient."""

    factor: Number
    """What it was multiplied with; 1 where it is no multiple of what it was."""
    rest: Number
    """0 where it is a multiple, else more: the squared norm of what came to it where that is known."""


NONE = Change(1.0, 0.0)

_SAMPLE = 1024
"""Elements by which a change after the last pass is noticed."""


def mark_of(gradient: Tensor, more: int) -> Mark:
    """How a gradient will be known that is changed in place so often."""
    return (gradient.data_ptr(), gradient._version + more) if type(gradient) is Tensor and gradient.layout is torch.strided else None


def sample_of(gradient: Tensor, before: Tensor | None, order: Order = (0,)) -> Tensor:
    """Some elements of a gradient, from all over it, to tell later by whether it was changed: the same ones however it lies in memory.

    Args:
        gradient: What is delivered.
        before: What it is added to.
        order: Of dimensions, in which the elements are counted: what lies so is not copied.
    """
    return _sampled(gradient, order).clone() if before is None else _sampled(gradient, order) + _sampled(before, order)


def _sampled(gradient: Tensor, order: Order) -> Tensor:
    x = real(gradient)
    # of complex numbers the two parts are the last dimension
    x = x.permute((*order, *range(len(order), x.ndim)))
    # odd, so that it meets all columns of a matrix
    every = x.numel() // _SAMPLE | 1
    if x.is_contiguous():
        return x.view(-1)[::every]
    place, index = torch.arange(0, x.numel(), every, device=x.device), list[Tensor]()
    for size in reversed(x.shape):
        index.insert(0, place % size)
        place = place // size
    return x[tuple(index)]


def change_of(was: Tensor, now: Tensor) -> Change:
    """What a gradient was multiplied with, and what came to it."""
    one, other = side_by_side([dense(was), dense(now)])
    found: Any = gram([one], other)
    where: Any = torch.where
    if found.is_cpu:
        found, where = found.numpy(), np.where
    a, b, product, apart = found[0, 0], found[1, 1], found[0, 1], found[2, 2]
    # of the multiplication of each element; sums of products are not exact either
    tolerance = max(2 * torch.finfo(now.dtype).eps, 1e-7) ** 2
    with np.errstate(all="ignore"):
        same, nothing = apart <= tolerance * b, b == 0
        multiple = (product * product >= (1 - tolerance) * a * b) & (a > 0)
        factor = where(nothing, 0.0, where(same | ~multiple, 1.0, product / a))
        rest = where(same | multiple | nothing, 0.0, apart)
    return Change(factor, rest) if isinstance(factor, Tensor) else Change(float(factor), float(rest))


def is_zero(gradient: Tensor) -> bool:
    """Whether all of it is 0."""
    return bool(square(flat(gradient)).numpy() == 0)


def change_of_sample(was: Tensor, now: Tensor, squared: Tensor) -> Change:
    """The same by samples, as of a gradient that is no sum of what was delivered.

    Args:
        was: Sample of the gradient,
        now: and as it is now,
        squared: of which this is the sum of squares.
    """
    change = change_of(was, now)
    if squared.is_cpu and isinstance(change.factor, float):
        # there may be zeros wherever it was sampled
        return change._replace(factor=0.0 if squared.numpy() == 0 else change.factor or 1.0)
    factor = torch.as_tensor(change.factor, dtype=torch.float64, device=squared.device)
    return change._replace(factor=torch.where(squared == 0, 0.0, torch.where(factor == 0, 1.0, factor)))


class Digest(NamedTuple):
    """What is kept of a gradient of which no copy is: enough to tell a multiple of it from anything else."""

    norm: Tensor
    """Float64 [], as all that is here."""
    along: Tensor
    """Its inner product with each contribution [K], divided by the norm of that."""
    sample: Tensor
    eps: float
    """Of its type."""


def digest_of(products: Tensor, sample: Tensor) -> Digest:
    """Of the gradient whose `gram` and whose sample these are."""
    squares = products.diagonal()[:-2]
    along = torch.where(squares > 0, products[:-2, -2] / squares.sqrt(), 0.0)
    return Digest(products[-2, -2].sqrt(), along, sample.to(torch.float64), torch.finfo(sample.dtype).eps)


def digest_with(grads: Sequence[Tensor], gradient: Tensor, order: Order) -> Digest:
    """The same of a gradient, beside these contributions; its sample in the same order."""
    *vectors, last = side_by_side([*map(dense, grads), dense(gradient)])
    return digest_of(gram(vectors, last), sample_of(gradient, None, order))


def multiple_of(was: Digest, now: Digest) -> Change:
    """What a gradient was multiplied with, as `change_of` says it, by digests."""
    scale = torch.where(was.norm > 0, now.norm / was.norm, 1.0)
    turned = (was.sample * now.sample).sum() + (was.along * now.along).sum() < 0
    tolerance = max(2 * now.eps, 1e-7)
    same = ~turned & ((scale - 1).abs() <= tolerance)
    factor = torch.where(same, 1.0, torch.where(turned, -scale, scale))
    near = (now.sample - factor * was.sample).norm() <= tolerance * now.sample.norm()
    multiple = near & ((now.along - factor * was.along).abs() <= tolerance * now.norm).all() & (was.norm > 0)
    factor = torch.where(now.norm == 0, 0.0, torch.where(multiple, factor, 1.0))
    rest = torch.where(multiple | (now.norm == 0), 0.0, now.norm.square())
    return Change(float(factor.numpy()), float(rest.numpy())) if rest.is_cpu else Change(factor, rest)


def times(grad: Tensor, factor: Number) -> Tensor:
    """The contribution, multiplied as the gradient was."""
    if isinstance(factor, float):
        return grad if factor == 1 else grad * factor
    # what was NaN and has been zeroed is zero
    return torch.where(factor == 0, 0.0, grad * factor).to(grad.dtype)
