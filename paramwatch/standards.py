"""The laws people start from: Xavier, Kaiming and their kin for a shape, and what PyTorch gives each kind of module.

Sources: X. Glorot and Y. Bengio, *Understanding the difficulty of training deep feedforward neural networks*, 2010 (Xavier); K. He,
X. Zhang, S. Ren and J. Sun, *Delving deep into rectifiers*, 2015 (Kaiming); `reset_parameters` of each module (the defaults).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from paramwatch.laws import Law

DEFAULT = "PyTorch default"

ZEROS, ONES = Law("constant", 0.0, 0.0), Law("constant", 1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Standard:
    """A law with a name."""

    name: str
    law: Law
    rank: int
    """How readily one thinks of it, from 0."""


def fans(shape: Sequence[int]) -> tuple[int, int] | None:
    """Inputs and outputs of a unit, counted as `torch.nn.init` does; None where that has no meaning."""
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


@lru_cache(maxsize=1024)
def standards(shape: tuple[int, ...]) -> tuple[Standard, ...]:
    """The laws that have a name for this shape, those one thinks of first in front."""
    found = fans(shape)
    plain = [Standard("", Law("normal", 0.0, std), 1) for std in (1.0, 0.1, 0.05, 0.02, 0.01, 0.001)]
    if found is None:
        return tuple(plain)
    inputs, outputs = found
    stds = [("Xavier {}", math.sqrt(2 / (inputs + outputs)), 0)]
    if inputs == outputs:
        stds += [("Kaiming {}", math.sqrt(2 / inputs), 0)]
    else:
        stds += [("Kaiming {}, fan_in", math.sqrt(2 / inputs), 0), ("Kaiming {}, fan_out", math.sqrt(2 / outputs), 0)]
    stds += [("Kaiming {}, a=sqrt(5)", math.sqrt(1 / (3 * inputs)), 0), ("Kaiming {}, linear gain", math.sqrt(1 / inputs), 1)]
    stds += [("Xavier {}, relu gain", math.sqrt(4 / (inputs + outputs)), 1), ("Xavier {}, tanh gain", 5 / 3 * stds[0][1], 1)]
    uniform = [Standard(name.format("uniform"), Law("uniform", 0.0, std * math.sqrt(3)), rank) for name, std, rank in stds]
    normal = [Standard(name.format("normal"), Law("normal", 0.0, std), rank) for name, std, rank in stds]
    return tuple(sorted([*uniform, *normal, *plain], key=lambda standard: standard.rank))


def default_of(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    """What PyTorch gives this parameter of this module, None where it gives nothing of its own."""
    for kinds, law in _DEFAULTS:
        if isinstance(module, kinds):
            return law(module, key, shape)
    return None


def scale_range(module: nn.Module, key: str, shape: Sequence[int]) -> tuple[float, float] | None:
    """Least and greatest of the standard deviations that Xavier and Kaiming give, for a weight that multiplies activations.

    None for all others: biases, scales, embeddings, and what is no layer's weight.
    """
    found = fans(shape)
    multiplies = isinstance(module, _WEIGHTED) if isinstance(module, _KNOWN) else len(shape) == 2 and key == "weight"
    if found is None or not multiplies or "bias" in key:
        return None
    inputs, outputs = found
    stds = [math.sqrt(2 / (inputs + outputs)), math.sqrt(2 / inputs), math.sqrt(1 / (3 * inputs))]
    return min(stds), max(stds)


def is_norm_scale(module: nn.Module, key: str) -> bool:
    """Whether this is the factor of a normalising layer."""
    return isinstance(module, _NORMS) and key == "weight"


# ---- what `reset_parameters` does, module by module -----------------------------------------


def _by_fan_in(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    weight = getattr(module, "weight", None)
    found = fans(weight.shape) if weight is not None and hasattr(weight, "shape") else None
    return None if found is None or key not in ("weight", "bias") else Law("uniform", 0.0, 1 / math.sqrt(found[0]))


def _by_first_input(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return Law("uniform", 0.0, 1 / math.sqrt(module.in1_features)) if key in ("weight", "bias") else None  # type: ignore[arg-type]


def _attention_output(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return ZEROS if key == "bias" else _by_fan_in(module, key, shape)


def _attention(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    found = fans(shape)
    if found is None:
        return ZEROS
    std = math.sqrt(2 / sum(found))
    return Law("normal", 0.0, std) if key.startswith("bias") else Law("uniform", 0.0, std * math.sqrt(3))


def _by_hidden_size(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return Law("uniform", 0.0, 1 / math.sqrt(module.hidden_size)) if key.startswith(("weight_", "bias_")) else None  # type: ignore[arg-type]


def _standard_normal(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return Law("normal", 0.0, 1.0) if key == "weight" else None


def _ones_and_zeros(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return {"weight": ONES, "bias": ZEROS}.get(key)


def _quarter(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return Law("constant", 0.25, 0.0)


_Rule = Callable[[nn.Module, str, Sequence[int]], Law | None]
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WEIGHTED = (nn.Linear, nn.Bilinear, _ConvNd, *_RECURRENT, nn.MultiheadAttention)
_KNOWN = (*_WEIGHTED, *_EMBEDDINGS, *_NORMS, nn.PReLU)
_DEFAULTS: tuple[tuple[tuple[type[nn.Module], ...], _Rule], ...] = (
    ((NonDynamicallyQuantizableLinear,), _attention_output),
    ((nn.Linear, _ConvNd), _by_fan_in),
    ((nn.Bilinear,), _by_first_input),
    ((nn.MultiheadAttention,), _attention),
    (_RECURRENT, _by_hidden_size),
    (_EMBEDDINGS, _standard_normal),
    (_NORMS, _ones_and_zeros),
    ((nn.PReLU,), _quarter),
)
