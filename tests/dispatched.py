"""What torch dispatches, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Names the operations within."""

    names: list[str]

    def __enter__(self) -> Dispatched:
        self.names = []
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def __len__(self) -> int:
        """How many they are; torch 2.6 dispatches each `detach` twice."""
        return len(self.names) - self.names.count("detach") * (_DETACHES - 1) // _DETACHES


with Dispatched() as _once:
    torch.ones(()).detach()
_DETACHES = _once.names.count("detach")
