"""Whether tensors still have the form they had: what has to be known of them before their memory is read by its address.

torch has a check of many tensors in one call, which guards compiled functions. It is private, so that it is believed only after it was
seen to refuse whatever has another form, and only when it agrees; where it does not (it also asks in which modes torch is) each tensor is
looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Forms:
    """The forms of some tensors: type, dtype, device, layout, shape, strides, and whether a gradient is asked for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.each = [_form(tensor) for tensor in tensors]
        make = _check_of_many()
        self.at_a_glance: Callable[..., bool] = make(tensors) if make is not None and tensors else _never
        """Torch's check, of the tensors one by one: says yes only where they are of these forms, and no to whatever is no tensor."""

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether as many tensors are of these forms, in this order."""
        return self.at_a_glance(*tensors) or [_form(tensor) for tensor in tensors] == self.each


def _form(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return type(tensor), tensor.layout
    lies = tuple(tensor.shape), tensor.stride(), tensor.is_neg(), tensor.is_conj()
    return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, *lies


def _never(*tensors: object) -> bool:
    return False


@cache
def _check_of_many() -> Callable[[Sequence[Tensor]], Callable[..., bool]] | None:
    """Makes torch's check; None where there is none that can be believed."""
    x = torch.zeros(2, 3, device="cpu")
    others = [
        torch.zeros(3, 2, device="cpu"),
        torch.zeros(3, 2, device="cpu").t(),
        torch.zeros(6, device="cpu"),
        torch.zeros(2, 3, device="cpu", dtype=torch.float64),
        torch.zeros(2, 3, device="cpu", dtype=torch.int32),
        torch.zeros(2, 3, device="cpu", requires_grad=True),
        torch.zeros(2, 3, device="meta"),
        torch.nn.Parameter(x, requires_grad=False),
        torch._neg_view(x),
        x.to_sparse(),
        torch._efficientzerotensor((2, 3), device="cpu"),
    ]
    try:
        check = _torchs_check([x])
        believed = check(x) and check(x.clone()) and not any(map(check, (*others, None)))
    except (ImportError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        believed = False
    return _torchs_check if believed else None


def _torchs_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    from torch._C._dynamo.guards import TensorGuards

    shapes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    # torch's stub wants sizes without unknown ones, which it takes
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check  # type: ignore[arg-type]
    return check
