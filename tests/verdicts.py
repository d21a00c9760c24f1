"""What `summary` says of many draws, for the tests of how tensors look initialised."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from paramwatch import summary

Layer = Callable[[], nn.Module]


def frame_of(make: Layer, fill: Callable[[Tensor], object], draws: int, dtype: torch.dtype | None = None) -> pd.DataFrame:
    """The rows of the weights of so many layers, cast to a dtype after they were filled if one is given."""
    torch.manual_seed(0)
    layers = nn.ModuleList([make() for _ in range(draws)])
    for layer in layers:
        fill(layer.weight)
    return summary(layers.to(dtype)).frame.loc[[f"{i}.weight" for i in range(draws)]]


def looks(make: Layer, fill: Callable[[Tensor], object], draws: int, dtype: torch.dtype | None = None) -> list[str]:
    """The verdicts on the weights of so many layers."""
    return list(frame_of(make, fill, draws, dtype)["looks_like"])


def holding(tensor: Tensor) -> nn.Module:
    """A module whose one parameter is a tensor."""
    module = nn.Module()
    module.p = nn.Parameter(tensor)
    return module


def plain(text: str) -> str:
    """A verdict without how far it vouches for the law that it names."""
    return re.sub(r", (uncut to|flat within) \S+ (std|%)$", "", text)


def named_in(text: str) -> list[str]:
    """The laws that a verdict names."""
    return re.split(r" or | \(= | = |\)$| \((?=uniform)", plain(text))


def is_named(text: str, names: Iterable[str]) -> bool:
    """Whether one of the laws that a verdict names has one of these names, which may be patterns."""
    return any(fnmatch.fnmatchcase(word, name) for word in named_in(text) for name in names)
