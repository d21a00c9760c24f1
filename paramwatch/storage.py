"""Whether the memory of a tensor is there: who shards or offloads a model takes it away for a while, and what reads it then is lost.

The tensor itself stays as it was, so that its storage has to be asked. Beside the paths, which all ask here before they read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, UntypedStorage

_ROWS, _COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _ROWS,
    torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS,
    torch.sparse_bsc: _COLUMNS,
}
"""What a sparse tensor consists of."""


def is_there(tensor: Tensor) -> bool:
    """Whether its storage, or those of the tensors that it consists of, reach as far as its elements do."""
    if hasattr(tensor, "__tensor_flatten__"):
        held = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return all(is_there(each) for each in held if isinstance(each, Tensor))  # a sharded one names its mesh as well
    if tensor.layout in PARTS:
        return all(is_there(getattr(tensor.detach(), part)()) for part in PARTS[tensor.layout])
    return tensor.layout is not torch.strided or tensor.is_nested or _reaches(tensor)


def has_address(tensor: Tensor) -> bool:
    """Whether the elements of a plain, strided tensor are at its address. Of zeros that torch makes no memory for they are not."""
    return _reaches(tensor) and (tensor.data_ptr() != 0 or not tensor.numel())


def _reaches(tensor: Tensor) -> bool:
    if not (extent := tensor.numel()):
        return True
    held = tensor.untyped_storage().nbytes()
    if tensor.is_quantized:  # several elements may share a byte
        return held > 0
    if not tensor.is_contiguous():
        extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return held >= (tensor.storage_offset() + extent) * tensor.element_size()


class Addresses:
    """Where some tensors are, of which not much more than that is new from one step to the next: their forms are the same each time."""

    def __init__(self) -> None:
        self._known: list[int] = []
        self._lay: tuple[object, ...] = ()

    def of(self, tensors: Sequence[Tensor]) -> list[int] | None:
        """The address of each; None if one is not there. What is where it was needs no second look."""
        addresses = [*map(Tensor.data_ptr, tensors)]
        if addresses != self._known:
            # gradients mostly come to be elsewhere at each step, and each of these looks goes through all of them at once
            lie = [*map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))], [*map(Tensor.storage_offset, tensors)]
            if (lie != self._lay or 0 in addresses) and not all(map(has_address, tensors)):
                return None
            self._known, self._lay = addresses, lie
        return addresses
