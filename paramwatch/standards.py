"""The laws people start from: Xavier, Kaiming and their kin for a shape, and what PyTorch gives each kind of module.

Sources: X. Glorot and Y. Bengio, *Understanding the difficulty of training deep feedforward neural networks*, 2010 (Xavier); K. He,
X. Zhang, S. Ren and J. Sun, *Delving deep into rectifiers*, 2015 (Kaiming); `reset_parameters` of each module (the defaults).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import jit, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from paramwatch.drawn import Kind, Law
from paramwatch.rows import held_under, is_lazy

DEFAULT = "PyTorch default"

ZEROS, ONES = Law("constant", 0.0, 0.0), Law("constant", 1.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Standard:
    """A law with a name. One object for each: equal only to itself."""

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


_NAMES = (
    ("Xavier {}", 0),
    ("Kaiming {}, fan_in", 0),
    ("Kaiming {}, fan_out", 0),
    ("Kaiming {}, a=sqrt(5)", 0),
    ("Kaiming {}, linear gain", 1),
    ("Xavier {}, relu gain", 1),
    ("Xavier {}, tanh gain", 1),
)
OF_SHAPE = len(_NAMES)
_ROUND = 1.0, 0.1, 0.05, 0.02, 0.01, 0.001


@lru_cache(maxsize=1024)
def named_stds(shape: tuple[int, ...]) -> tuple[float, ...]:
    """The standard deviations that have a name for this shape: of `_NAMES`, NaN where there is none; round ones, of normal laws, follow."""
    found = fans(shape)
    if found is None:
        return (*[math.nan] * OF_SHAPE, *_ROUND)
    inputs, outputs = found
    xavier, either = math.sqrt(2 / (inputs + outputs)), math.sqrt(2 / outputs) if inputs != outputs else math.nan
    kaiming, linear = math.sqrt(2 / inputs), math.sqrt(1 / inputs)
    return xavier, kaiming, either, math.sqrt(1 / (3 * inputs)), linear, math.sqrt(4 / (inputs + outputs)), 5 / 3 * xavier, *_ROUND


def standard(shape: tuple[int, ...], kind: Kind, i: int) -> Standard:
    """The law of one of the `named_stds`, uniform or normal."""
    std = named_stds(shape)[i]
    name, rank = _NAMES[i] if i < OF_SHAPE else ("", 1)
    if i == 1 and shape[1] == shape[0]:  # fan_in and fan_out are the same
        name = "Kaiming {}"
    return Standard(name.format(kind), Law(kind, 0.0, std * math.sqrt(3) if kind == "uniform" else std), rank)


def stds_of_layers(shape: tuple[int, ...], above: bool) -> list[float]:
    """What Xavier, Kaiming and their kin give this shape; above what is usual, without those that go by outputs."""
    stds = named_stds(shape)[:OF_SHAPE]
    return [std for (name, _), std in zip(_NAMES, stds, strict=True) if not (math.isnan(std) or (above and "fan_out" in name))]


def default_of(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    """What PyTorch gives this parameter of this module, None where it gives nothing of its own."""
    law = _rule_of(kind_of(module))  # type: ignore[arg-type]  # the checker takes the hash of an instance for that of the class
    return None if law is None else law(module, key, shape)


@lru_cache(maxsize=1024)
def _rule_of(kind: type[nn.Module]) -> _Rule | None:
    return next((law for kinds, law in _DEFAULTS if issubclass(kind, kinds)), None)


class Usual(NamedTuple):
    """The sizes (standard deviations) that a weight of some layer usually begins with."""

    own: float
    """What PyTorch gives it."""
    low: float
    """The least of that and an orthogonal matrix's; 0 for an embedding: GPT-2's have a fiftieth of PyTorch's."""
    high: float
    """The greatest of that and Kaiming's, or Xavier's where the number of inputs says nothing of what is usual (recurrent layers)."""
    widest: str = ""
    """Whose the greatest is."""


@lru_cache(maxsize=1024)
def usual_of(kind: type[nn.Module], key: str, shape: tuple[int, ...], default: Law | None) -> Usual | None:
    """What is usual for a weight that multiplies activations; None for all others: biases, scales, and what is no layer's weight.

    Args:
        kind: As of `kind_of`.
        key: What the parameter is for there.
        shape: Of it.
        default: What PyTorch gives it.
    """
    # a weight of a known layer that PyTorch does not fill is no factor of activations: `weight_g` of a weight normalisation
    multiplies = default is not None and issubclass(kind, _WEIGHTED) and "bias" not in key
    if not issubclass(kind, (*_KNOWN, jit.ScriptModule)):
        multiplies = len(shape) == 2 and key == "weight"
    if default is not None and issubclass(kind, _EMBEDDINGS):
        return Usual(default.std, 0.0, default.std)
    found = fans(shape)
    if found is None or not multiplies:
        return None
    inputs, outputs = found
    own = math.sqrt(1 / (3 * inputs)) if default is None else default.std
    if issubclass(kind, nn.Bilinear):
        # PyTorch makes a bilinear weight by its first input alone
        return Usual(own, own, own)
    if issubclass(kind, _RECURRENT):
        return Usual(own, own, max(own, math.sqrt(2 / (inputs + outputs))), "Xavier")
    return Usual(own, min(own, 1 / math.sqrt(max(found))), max(own, math.sqrt(2 / inputs)), "Kaiming fan_in")


def is_known(module: nn.Module) -> bool:
    """Whether it is a layer of PyTorch, of which it is known what each parameter is for."""
    return issubclass(kind_of(module), _KNOWN)


def is_embedding(module: nn.Module) -> bool:
    """Whether vectors are looked up in it."""
    return issubclass(kind_of(module), _EMBEDDINGS)


def is_norm_scale(module: nn.Module, key: str) -> bool:
    """Whether this is the factor of a normalising layer."""
    return issubclass(kind_of(module), _NORMS) and key == "weight"


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Its class; of a scripted or traced module the class that it was made from, if that is loaded."""
    kind, own = type(module), getattr(module, "_c", None) if isinstance(module, jit.ScriptModule) else None
    if own is None:
        return kind
    # __torch__.torch.nn.modules.linear.___torch_mangle_3.Linear; a class of the main program has no module in front
    path = [part for part in own._type().qualified_name().split(".")[1:] if not part.startswith("___torch_mangle")]
    made_from = getattr(sys.modules.get(".".join(path[:-1]) or "__main__"), path[-1], None)
    return made_from if isinstance(made_from, type) and issubclass(made_from, nn.Module) else kind


def type_name(module: nn.Module) -> str:
    """What to call its class; of a scripted or traced module that is the name of the class that it was made from."""
    original = getattr(module, "original_name", "") if isinstance(module, jit.ScriptModule) else ""
    return str(original) or type(module).__name__


# ---- what `reset_parameters` does, module by module -----------------------------------------


def _by_fan_in(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    if key not in ("weight", "bias"):
        return None
    weight = tuple(shape) if key == "weight" else _weight_shape(module)
    # where the weight is computed from other tensors, a linear layer still knows its inputs
    return (None if weight is None else _by_inputs_of(weight)) or _within(getattr(module, "in_features", 0))


@lru_cache(maxsize=1024)
def _by_inputs_of(weight: Sequence[int]) -> Law | None:
    inputs = fans(weight)
    return None if inputs is None else _within(inputs[0])


@lru_cache(maxsize=1024)
def _within(inputs: int) -> Law | None:
    return Law("uniform", 0.0, 1 / math.sqrt(inputs)) if inputs else None


def _by_first_input(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    weight = shape if key == "weight" else _weight_shape(module)
    known = weight is not None and len(weight) == 3 and weight[1] and key in ("weight", "bias")
    return _within(weight[1]) if weight and known else None


def _weight_shape(module: nn.Module) -> torch.Size | None:
    """Of the weight that a module holds; None if it has no shape yet, or is computed whenever one asks for it."""
    weight = held_under(module, "weight")
    return None if weight is None or is_lazy(weight) else weight.shape


def _attention_output(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return ZEROS if key == "bias" else _by_fan_in(module, key, shape)


def _attention(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    if key == "in_proj_bias":
        return ZEROS
    found = fans(shape)
    if found is None or key not in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"):
        return None
    std = math.sqrt(2 / sum(found))
    return Law("normal", 0.0, std) if key.startswith("bias") else Law("uniform", 0.0, std * math.sqrt(3))


def _by_hidden_size(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    # a traced module has lost its sizes
    hidden = getattr(module, "hidden_size", 0)
    return _within(hidden) if hidden and _OF_RECURRENT(key) else None


def _standard_normal(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return Law("normal", 0.0, 1.0) if key == "weight" else None


def _ones_and_zeros(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return {"weight": ONES, "bias": ZEROS}.get(key)


def _quarter(module: nn.Module, key: str, shape: Sequence[int]) -> Law | None:
    return Law("constant", 0.25, 0.0)


_OF_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?").fullmatch
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
